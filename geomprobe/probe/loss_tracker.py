"""The losses of the step that is being made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geomprobe.probe.events import Events
from geomprobe.probe.hooks.grad_scaler import tag_scaled, unscaled


class LossTracker(Events):
    """Collects the losses that backward passes are called on since the last update, as they were before scaling.

    Attributes:
        values: these losses: several under gradient accumulation.

    >>> losses = LossTracker()
    >>> losses.losses_seen([torch.tensor(2.0)]); losses.losses_seen([torch.tensor(3.0)])
    >>> losses.total(torch.device("cpu"))
    tensor(5., dtype=torch.float64)
    >>> losses.after_update(); losses.values
    []
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self._factor: Tensor | None = None

    def loss_scaled(self, factor: Tensor) -> None:
        self._factor = factor

    def losses_seen(self, losses: Sequence[Tensor]) -> None:
        for loss in losses:
            if self._factor is not None:
                tag_scaled(loss, self._factor)
                self._factor = None
            self.values.append(unscaled(loss)[0].detach())

    def gradients_dropped(self) -> None:
        self.values.clear()

    def after_update(self) -> None:
        self.values.clear()

    def restored(self) -> None:
        self.values.clear()

    def total(self, device: torch.device) -> Tensor:
        """The step's loss, float64 on ``device``; NaN where none was seen or one is no scalar."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for loss in self.values:
            total += loss.to(total) if loss.numel() == 1 else torch.nan
        return total if self.values else total + torch.nan
