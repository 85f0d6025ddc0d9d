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


class Updates:
    """Counts the steps that were attempted, and sees which gradients were scaled and clipped before them.

    An attempt is a call of the optimizer's ``step``, or a GradScaler's for it, which leaves the weights alone where a
    gradient has overflowed. Each attempt that is applied is a step, and a row of the trace.

    Attributes:
        skipped: attempts that were not applied.
        scaled: whether a GradScaler was at work in any of them.
        clipped_by: torch's functions that clipped gradients before an attempt.
        when_clipping: called before gradients are clipped, with what they are multiplied by.
        when_skipped: called after an attempt that was not applied.

    >>> updates = Updates()
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
        self._factor: Tensor | None = None
        self._attempting = False

    def bind(self, probe: Training) -> None:
        """From here on only the optimizer of that probe counts. Before, there is only one."""
        self._probe = probe

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
        if self._is_measured(optimizer):
            self._factor = None

    @contextlib.contextmanager
    def attempting(self, optimizer: Optimizer) -> Iterator[None]:
        """Around a GradScaler's step of an optimizer."""
        if self._attempting or not self._is_measured(optimizer):
            yield
            return
        before, self._attempting = self._applied, True
        try:
            yield
        finally:
            self._attempting = False
        self.scaled, self._factor = True, None
        if self._applied == before:
            self.skipped += 1
            self.when_skipped()

    def clipping(self, name: str, parameters: Sequence[Tensor]) -> None:
        """The function ``name`` of torch is about to clip the gradients of ``parameters``."""
        if self._probe is not None:
            own = {id(parameter) for parameter in self._probe.parameters.values()}
            if not any(id(parameter) in own for parameter in parameters):
                return
        if name not in self.clipped_by:
            self.clipped_by.append(name)
        self.when_clipping(self._factor)

    @property
    def _applied(self) -> int:
        return 0 if self._probe is None else self._probe.step

    def _is_measured(self, optimizer: Any) -> bool:
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        return self._probe is None or optimizer is self._probe.optimizer
