"""From gradients to updates: the steps that a script attempts, and what it does with their gradients first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class Training(Protocol):
    """What is known of the training that a probe is on."""

    @property
    def step(self) -> int: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def parameters(self) -> Mapping[str, Tensor]: ...


class StepAttempts:
    """Counts the steps that were attempted, and sees which gradients were scaled and clipped before them.

    An attempt is a call of the optimizer's ``step``, or a GradScaler's for it, which leaves the weights alone where a
    gradient has overflowed. Each attempt that is applied is a step, and a row of the trace.

    Attributes:
        skipped: attempts that were not applied.
        scaled: whether a GradScaler was at work in any of them.
        clipped_by: torch's functions that clipped gradients before an attempt.
        when_clipping: called before gradients are clipped, with what they are multiplied by.
        when_skipped: called after an attempt that was not applied.

    >>> updates = StepAttempts()
    >>> updates.described(applied=3)
    {'attempted': 3, 'applied': 3, 'scaled': False, 'gradient': 'as the optimizer takes it', 'clipped_by': []}
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.scaled = False
        self.clipped_by: list[str] = []
        self.when_clipping: Callable[[Tensor | None], None] = lambda factor: None
        self.when_skipped: Callable[[], None] = lambda: None
        self._probe: Training | None = None
        self._early_skips: dict[Any, int] = {}  # before there is a probe, by optimizer
        self._early_clips: dict[str, set[int]] = {}  # and the ids of what was clipped
        self._factor: Tensor | None = None
        self._attempting = False

    def bind(self, probe: Training) -> None:
        """Only that probe's optimizer and parameters count, of what was seen before it too."""
        self._probe = probe
        skips = self._early_skips.pop(probe.optimizer, 0)
        self.skipped, self.scaled = skips, skips > 0
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
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "scaled": self.scaled, "clipped_by": list(self.clipped_by)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.skipped, self.scaled = state["skipped"], state["scaled"]
        self.clipped_by = list(state["clipped_by"])

    # What is seen

    def loss_scaled(self, factor: Tensor) -> None:
        """The next gradients come multiplied by ``factor``."""
        self._factor = factor

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
                self.when_skipped()

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
        self.when_clipping(self._factor)

    @property
    def _applied(self) -> int:
        return 0 if self._probe is None else self._probe.step

    def _is_measured(self, optimizer: Any) -> bool:
        return self._probe is not None and _raw(optimizer) is self._probe.optimizer


def _raw(optimizer: Any) -> Any:
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
