"""From gradients to updates: the steps that a script attempts, and what it does with their gradients first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from geomprobe.probe.events import Events

if TYPE_CHECKING:
    from geomprobe.probe.probe import Probe


class StepAttempts(Events):
    """Counts the steps that were attempted, and sees which gradients were scaled and clipped before them.

    An attempt is a call of the optimizer's ``step``, or a GradScaler's for it, which leaves the weights alone where a
    gradient has overflowed. Each attempt that is applied is a step, and a row of the trace.

    Args:
        report: where clipped gradients and skipped steps are reported, once there is a probe.

    Attributes:
        skipped: attempts that were not applied.
        scaled: whether a GradScaler was at work in any of them.
        clipped_by: torch's functions that clipped gradients before an attempt.

    >>> updates = StepAttempts(Events())
    >>> updates.described(applied=3)
    {'attempted': 3, 'applied': 3, 'scaled': False, 'gradient': 'as the optimizer takes it', 'clipped_by': []}
    """

    name = "updates"

    def __init__(self, report: Events) -> None:
        self.skipped = 0
        self.scaled = False
        self.clipped_by: list[str] = []
        self._report = report
        self._probe: Probe | None = None
        self._early_skips: dict[Any, int] = {}  # before there is a probe, by optimizer
        self._early_clips: dict[str, set[int]] = {}  # and the ids of what was clipped
        self._factor: Tensor | None = None
        self._attempting = False

    def attached(self, probe: Probe) -> None:
        self._probe = probe  # only its optimizer and parameters count, of what was seen before it too
        self.skipped = self._early_skips.pop(probe.optimizer, 0)
        self.scaled = self.skipped > 0
        own = {id(parameter) for parameter in probe.parameters.values()}
        self.clipped_by = [name for name, ids in self._early_clips.items() if ids & own]
        self._early_skips, self._early_clips = {}, {}

    def described(self, applied: int) -> dict[str, Any]:
        """For the manifest, once all of ``applied`` steps are over."""
        return {
            "attempted": applied + self.skipped,
            "applied": applied,
            "scaled": self.scaled,
            "gradient": "as the optimizer takes it",
            "clipped_by": self.clipped_by,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scaled": self.scaled, "clipped_by": list(self.clipped_by)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.scaled = state["skipped"], state["scaled"]
        self.clipped_by = list(state["clipped_by"])

    def loss_scaled(self, factor: Tensor) -> None:
        self._factor = factor

    # What the hooks on scalers and clipping call

    def unscaled(self, optimizer: Optimizer) -> None:
        """A GradScaler has divided an optimizer's gradients."""
        if self._probe is None or self._is_measured(optimizer):
            self._factor = None

    @contextlib.contextmanager
    def attempting(self, optimizer: Optimizer) -> Iterator[None]:
        """Around a GradScaler's step of an optimizer."""
        if self._attempting:  # from a scaler's own step, which calls torch's
            yield
            return
        before, self._attempting = self._applied, True
        try:
            yield
        finally:
            self._attempting = False
        self._factor = None
        if self._probe is None:
            self._early_skips[_raw(optimizer)] = 1 + self._early_skips.get(_raw(optimizer), 0)
        elif self._is_measured(optimizer):
            self.scaled = True
            if self._applied == before:
                self.skipped += 1
                self._report.step_skipped()

    def clipping(self, name: str, parameters: Sequence[Tensor]) -> None:
        """The function ``name`` of torch is about to clip the gradients of ``parameters``."""
        ids = {id(parameter) for parameter in parameters}
        if self._probe is None:
            self._early_clips.setdefault(name, set()).update(ids)
            return
        if not any(id(parameter) in ids for parameter in self._probe.parameters.values()):
            return
        if name not in self.clipped_by:
            self.clipped_by.append(name)
        self._report.before_clipping(self._factor)

    @property
    def _applied(self) -> int:
        return 0 if self._probe is None else self._probe.step

    def _is_measured(self, optimizer: Any) -> bool:
        return self._probe is not None and _raw(optimizer) is self._probe.optimizer


def _raw(optimizer: Any) -> Any:
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
