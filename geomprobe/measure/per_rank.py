"""Inner products of each rank's own gradient, before DDP averages it with the others'.

What a gradient of a smaller minibatch would have measured is then seen within one run: NWT's question of how
RSI and EB depend on the batch size.
"""

from __future__ import annotations

from torch import Tensor

from geomprobe.errors import UsageError
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.local_gradients import LocalGradients
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step, Training
from geomprobe.probe.hooks.grad_scaler import unscaled

PRODUCTS = ("g.g", "w.g", "g.d")


class PerRankProducts(Quantity):
    """``g.g``, ``w.g`` and, of the final iterate, ``g.d`` of each rank's gradient: the sum over its micro-batches.

    Raises:
        UsageError: the training does not run under DDP.
    """

    name = "per_rank"
    option = "per_rank"

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        if training.layout.kind != "DDP":
            raise UsageError(
                f"Gradients of each rank were asked for, and this training is laid out as {training.layout.kind}: only "
                "under DDP does a rank have a whole gradient of its own. Leave the option out."
            )
        self._own = LocalGradients()

    def open(self, recorded: Recorded) -> None:
        self._products = InnerProducts(self.training.parameters, recorded.final, only=PRODUCTS)
        ranks = range(self.training.layout.world_size)
        self.columns = tuple(f"ranks/{rank}/{product}" for rank in ranks for product in PRODUCTS)

    def before_backward(self, loss: Tensor) -> None:
        if self.due(self.training.probe.step):
            self._own.watch(self.training.parameters, unscaled(loss)[1])

    def after_backward(self) -> None:
        self._own.unwatch()

    def dropped(self) -> None:
        self._own.clear()

    def local(self, step: Step) -> dict[str, Part]:
        own = [self._own.of.get(parameter) for parameter in self.training.parameters]
        return {"products": Part(self._products.measure(own), Combine.GATHER)}
