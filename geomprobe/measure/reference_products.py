"""Inner products of the step's gradient, its weights and their distance from each reference: all of NWT section 3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step
from geomprobe.trace.schema import FINAL, parameter_column, product_column


class ReferenceProducts(Quantity):
    """``g.g, w.g, w.w`` and, of each reference, ``g.d, w.d, d.d``; of each parameter tensor too, if asked for."""

    name = "inner_products"

    def open(self, recorded: Recorded) -> None:
        training, options = self.training, self.training.options
        self._products = InnerProducts(
            training.parameters,
            {name: list(weights.values()) for name, weights in recorded.references.items()},
            owned=training.layout.owned,
            per_parameter=options.per_parameter,
            compiled=options.compiled,
        )
        names = self._products.names
        self._of_final = [i for i, name in enumerate(names) if "/" not in name]
        columns = [product_column(*_product_and_reference(name)) for name in names]
        if options.per_parameter:
            own = [names[i] for i in self._of_final]
            columns += [parameter_column(p, product) for p in training.probe.parameters for product in own]
        self.columns = tuple(columns)

    def local(self, step: Step) -> dict[str, Part]:
        return {"products": Part(self._products.measure(step.gradients, step.grad_scale), Combine.SUM)}

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        products = whole["products"]
        if not self.training.options.per_parameter:
            return products
        return torch.cat([products[0], products[1:, self._of_final].reshape(-1)])


def _product_and_reference(name: str) -> tuple[str, str]:
    """``g.d`` or ``references/best/inner_products/g.d`` as product and reference."""
    *path, product = name.split("/")
    return product, path[1] if path else FINAL
