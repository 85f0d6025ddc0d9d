"""Hg of the step's own loss and gradient, as its products ``g.Hg`` and ``Hg.Hg``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geomprobe.measure.inner_products import dots
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step
from geomprobe.trace.schema import parameter_column, product_column

PRODUCTS = ("g.Hg", "Hg.Hg")


class HessianGradient(Quantity):
    """``g.Hg`` and ``Hg.Hg``; of each parameter tensor too, if asked for."""

    name = "hg"
    option, cadence = "curvature_interval", "curvature_interval"

    def open(self, recorded: Recorded) -> None:
        columns = [product_column(product) for product in PRODUCTS]
        if self.training.options.per_parameter:
            names = self.training.probe.parameters
            columns += [parameter_column(name, product) for name in names for product in PRODUCTS]
        self.columns = tuple(columns)

    def local(self, step: Step) -> dict[str, Part] | None:
        if (curvature := self.training.curvature.ready) is None:
            return None
        g, hg = step.vectors, curvature.product(step.vectors)
        owned, per_parameter = self.training.layout.owned, self.training.options.per_parameter
        return {"products": Part(dots([(g, hg), (hg, hg)], owned, per_parameter=per_parameter), Combine.SUM)}

    def finish(self, whole: Mapping[str, Tensor]) -> Tensor:
        products = whole["products"]
        return torch.cat([products[0], products[1:].reshape(-1)]) if products.dim() > 1 else products
