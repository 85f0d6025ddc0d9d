"""What a whole step changes on its own minibatch: the turn of the gradient, the loss above its linear decrease."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geomprobe.measure.inner_products import dots
from geomprobe.measure.quantity import Combine, Part, Quantity, Step


class FiniteStep(Quantity):
    """``secant_residual`` and ``linear_decrease_gap``; see `finite_step` in `measure.curvature.side_evaluation`."""

    name = "finite_step"
    option, cadence = "finite_step", "curvature_interval"
    columns = ("steps/secant_residual", "steps/linear_decrease_gap")

    def local(self, step: Step) -> dict[str, Part] | None:
        lr = float(self.training.probe.optimizer.param_groups[0].get("lr", 0.0))
        if (curvature := self.training.curvature.ready) is None or not lr:
            return None
        if (change := curvature.over_step(step.vectors, lr)) is None:
            return None
        g, turn = step.vectors, change.turned
        return {
            "squares": Part(dots([(g, g), (turn, turn)], self.training.layout.owned), Combine.SUM),
            "gap": Part(change.gap, Combine.SAME),
        }

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        of_gradient, of_turn = whole["squares"]
        return torch.stack([(of_turn / of_gradient).sqrt(), whole["gap"]])
