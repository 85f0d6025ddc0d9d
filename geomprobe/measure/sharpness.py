"""The sharpness: the top eigenvalue of the Hessian of the minibatch's loss, or of one that the script names."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.measure.curvature.lanczos import top_eigenvalue
from geomprobe.measure.quantity import Combine, Part, Quantity, Step


class Sharpness(Quantity):
    """``sharpness``, by Lanczos; see `geomprobe.measure.curvature.lanczos`."""

    name = "sharpness"
    option, cadence = "sharpness_every", "sharpness_every"
    columns = ("steps/sharpness",)

    def local(self, step: Step) -> dict[str, Part] | None:
        losses = self.training.curvature
        product: Callable[[list[Tensor]], list[Tensor]]
        if losses.fixed_loss is not None and losses.curvature is not None:
            product = losses.curvature.products_of(losses.fixed_loss)
        elif losses.fixed_loss is None and losses.ready is not None:
            product = functools.partial(losses.ready.product, keep=True)
        else:
            return None
        like = [local(parameter) for parameter in self.training.parameters]
        value = top_eigenvalue(product, like, total=self.training.layout.total).value
        found = torch.tensor([value], dtype=torch.float64, device=like[0].device)
        return {"sharpness": Part(found, Combine.SAME)}
