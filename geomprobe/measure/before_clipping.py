"""The gradient as it was before the script clipped it, measured beside the one that the optimizer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local_gradient
from geomprobe.errors import UsageError
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step, Training
from geomprobe.trace.schema import UNCLIPPED

PRODUCTS = ("g.g", "w.g", "g.d", "d.d")


class BeforeClipping(Quantity):
    """Inner products, those of `PRODUCTS` against the final iterate, of each step's gradient before it is clipped.

    A step that clips nothing has those of the gradient that the optimizer takes.
    """

    name = UNCLIPPED
    option = "before_clipping"
    columns = tuple(f"{UNCLIPPED}/inner_products/{product}" for product in PRODUCTS)

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self._products: InnerProducts | None = None
        self._kept: tuple[list[Tensor | None], Tensor | None] | None = None
        self._measured: Tensor | None = None

    def open(self, recorded: Recorded) -> None:
        owned = self.training.layout.owned
        self._products = InnerProducts(self.training.parameters, recorded.final, owned=owned, only=PRODUCTS)

    @torch.no_grad()
    def clipping(self, factor: Tensor | None) -> None:
        if self._measured is not None or self._kept is not None or not self.due(self.training.probe.step):
            return  # another call has clipped them already, or nobody asks
        gradients = [local_gradient(p.grad, p) for p in self.training.parameters]
        if self._products is None:  # the first step's, which is clipped before the final iterate is there
            self._kept = [None if g is None else g.detach().clone() for g in gradients], factor
        else:
            self._measured = self._sums(gradients, factor)

    def before_backward(self, loss: Tensor) -> None:
        # The pass adds to gradients: once they are clipped, the step's unclipped gradient is nowhere to be had.
        if self._measured is not None or self._kept is not None:
            self.clipping_missed()

    def clipping_missed(self) -> None:
        device = self.training.parameters[0].device
        self._kept, self._measured = (
            None,
            torch.full((len(PRODUCTS),), torch.nan, dtype=torch.float64, device=device),
        )

    def skipped(self) -> None:
        self._kept = self._measured = None

    dropped = skipped

    def local(self, step: Step) -> dict[str, Part]:
        values = self._measured
        if values is None:
            values = self._sums(*(self._kept or (step.gradients, step.grad_scale)))
        return {"products": Part(values, Combine.SUM)}

    def _sums(self, gradients: Sequence[Tensor | None], factor: Tensor | None) -> Tensor:
        assert self._products is not None
        return self._products.measure(gradients, factor)


def require_clipped(measure: MeasureOptions, recorded: Mapping[str, Any]) -> None:
    """Refuse to measure the gradient before clipping where there was none.

    Args:
        measure: what is asked for.
        recorded: the manifest of the recording.

    Raises:
        UsageError: the recording saw no clipping.

    >>> require_clipped(MeasureOptions(before_clipping=True), {"updates": {"clipped_by": ["clip_grad_norm_"]}})
    """
    if measure.before_clipping and not recorded.get("updates", {}).get("clipped_by"):
        raise UsageError(
            "the gradient before clipping was asked for, and the recording saw no call of clip_grad_norm_ or "
            "clip_grad_value_: what is measured is the gradient that they would have been given. Leave the option out."
        )
