"""The quantities of NWT section 3: inner products of gradients with the weights and their distance from references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local_gradient
from geomprobe.errors import UsageError
from geomprobe.measure.curvature.global_loss import LocalGradients
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step, Training
from geomprobe.probe.hooks.global_hooks import unscaled
from geomprobe.trace.schema import FINAL, UNCLIPPED, parameter_column, product_column


class ReferenceProducts(Quantity):
    """``g.g, w.g, w.w`` and, of each reference, ``g.d, w.d, d.d``; of each parameter tensor too, if asked for."""

    name = "inner_products"

    def open(self, recorded: Recorded) -> None:
        training, options = self.training, self.training.options
        names = training.reader.refer_to(
            {name: list(weights.values()) for name, weights in recorded.references.items()},
            owned=training.layout.owned,
            per_parameter=options.per_parameter,
        )
        self._of_final = [i for i, name in enumerate(names) if "/" not in name]
        columns = [product_column(*_product_and_reference(name)) for name in names]
        if options.per_parameter:
            own = [names[i] for i in self._of_final]
            columns += [parameter_column(p, product) for p in training.probe.parameters for product in own]
        self.columns = tuple(columns)

    def local(self, step: Step) -> dict[str, Part]:
        assert step.products is not None
        return {"products": Part(step.products, Combine.SUM)}

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        products = whole["products"]
        if not self.training.options.per_parameter:
            return products
        return torch.cat([products[0], products[1:, self._of_final].reshape(-1)])


def _product_and_reference(name: str) -> tuple[str, str]:
    """``g.d`` or ``references/best/inner_products/g.d`` as product and reference."""
    *path, product = name.split("/")
    return product, path[1] if path else FINAL


class BeforeClipping(Quantity):
    """Inner products, those of `PRODUCTS` against the final iterate, of each step's gradient before it is clipped.

    A step that clips nothing has those of the gradient that the optimizer takes.
    """

    PRODUCTS = ("g.g", "w.g", "g.d", "d.d")
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
        self._products = InnerProducts(self.training.parameters, recorded.final, only=self.PRODUCTS, owned=owned)

    @torch.no_grad()
    def before_clipping(self, factor: Tensor | None) -> None:
        if self._measured is not None or self._kept is not None or not self.due(self.training.probe.step):
            return  # another call has clipped them already, or the step is not measured
        gradients = [local_gradient(p.grad, p) for p in self.training.parameters]
        if self._products is None:  # the first step's, which is clipped before the final iterate is there
            self._kept = [None if g is None else g.detach().clone() for g in gradients], factor
        else:
            self._measured = self._products.measure(gradients, factor)

    def before_backward(self, loss: Tensor) -> None:
        # The pass adds to gradients that are clipped already: the step has no unclipped gradient any more.
        if self._measured is not None or self._kept is not None:
            self.clipping_missed()

    def clipping_missed(self) -> None:
        device = self.training.parameters[0].device
        self._kept = None
        self._measured = torch.full((len(self.PRODUCTS),), torch.nan, dtype=torch.float64, device=device)

    def step_skipped(self) -> None:
        self._kept = self._measured = None

    gradients_dropped = step_skipped

    def local(self, step: Step) -> dict[str, Part]:
        values = self._measured
        if values is None:
            assert self._products is not None
            values = self._products.measure(*(self._kept or (step.gradients, step.grad_scale)))
        return {"products": Part(values, Combine.SUM)}


def require_clipped(measure: MeasureOptions, recorded: Mapping[str, Any]) -> None:
    """Refuse to measure the gradient before clipping where the recording, of this manifest, saw no clipping.

    Raises:
        UsageError: it saw none.
    """
    if measure.before_clipping and not recorded.get("updates", {}).get("clipped_by"):
        raise UsageError(
            "the gradient before clipping was asked for, and the recording saw no call of clip_grad_norm_ or "
            "clip_grad_value_: what is measured is the gradient that they would have been given. Leave the option out."
        )


class PerRankProducts(Quantity):
    """``g.g``, ``w.g`` and, of the final iterate, ``g.d`` of each rank's gradient, before DDP averages it.

    It is the gradient of a smaller minibatch, summed over the rank's micro-batches: one run shows how RSI and EB depend
    on the batch size.

    Raises:
        UsageError: the training does not run under DDP.
    """

    PRODUCTS = ("g.g", "w.g", "g.d")
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
        self._products = InnerProducts(self.training.parameters, recorded.final, only=self.PRODUCTS)
        ranks = range(self.training.layout.world_size)
        self.columns = tuple(f"ranks/{rank}/{product}" for rank in ranks for product in self.PRODUCTS)

    def before_backward(self, loss: Tensor) -> None:
        if self.due(self.training.probe.step):
            self._own.watch(self.training.parameters, unscaled(loss)[1])

    def after_backward(self) -> None:
        self._own.unwatch()

    def gradients_dropped(self) -> None:
        self._own.clear()

    def local(self, step: Step) -> dict[str, Part]:
        own: Sequence[Tensor | None] = [self._own.of.get(p) for p in self.training.parameters]
        return {"products": Part(self._products.measure(own), Combine.GATHER)}
