"""How the processes' gradients make the one that the optimizer gets: measured, once, not assumed.

DDP and FSDP2 take the mean. A communication hook, ``set_gradient_divide_factor`` or the like may take a
sum, or any multiple; whatever it is, the Hessian must be that of the same loss as the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local_gradient
from geomprobe.distributed.layout import Layout
from geomprobe.measure.curvature.autograd_graph import Blocker, CurvatureUnavailable
from geomprobe.measure.curvature.global_loss import SingleProcess
from geomprobe.measure.inner_products import dots
from geomprobe.measure.local_gradients import LocalGradients

_SKEW = 0.05  # as far as compression to 8 bits of mantissa turns a gradient, and more than any rounding
_ROUND = 1e-3  # a factor this near to a whole number of processes is one


class Reduction:
    """Finds the factor between the mean of the processes' gradients and what becomes of them.

    Args:
        global_loss: whose gradients they are.
        layout: of the processes.

    Attributes:
        factor: None until it is known.

    >>> w = torch.ones(1, requires_grad=True)
    >>> reduction = Reduction(SingleProcess([w]), Layout())
    >>> reduction.factor
    1.0
    """

    def __init__(self, global_loss: SingleProcess, layout: Layout) -> None:
        self._loss, self._layout = global_loss, layout
        self.factor: float | None = 1.0 if layout.kind in ("one process", "DTensor") else None
        self._own = LocalGradients()
        self._reduced: list[Tensor | None] = []

    @contextmanager
    def watching(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Around a backward pass, while the factor is unknown: note what each leaf gets, and what comes of it."""
        try:
            self._own.watch(leaves)
            yield
        finally:  # also of a pass that found out that it has no second derivative
            self._own.unwatch()
            gradients = [local_gradient(p.grad, p) for p in self._loss.parameters]
            self._reduced = [None if g is None else g.detach().to_dense().clone() for g in gradients]

    def find(self, tensors: Sequence[Tensor]) -> float:
        """The factor; where it is unknown, from the backward passes watched since the last `discard`.

        Every process must call this at once.

        Args:
            tensors: what the losses were differentiated by.

        Raises:
            CurvatureUnavailable: the reduced gradient is no multiple of the mean.
            UnsupportedTraining: that is so because some processes did not use a parameter that others did.
        """
        if self.factor is not None:
            return self.factor
        own = [self._own.of.get(t, torch.zeros_like(t, requires_grad=False)) for t in tensors]
        mean, reduced = self._loss.mean(own), self._reduced
        products = dots([(reduced, reduced), (reduced, mean), (mean, mean)], self._layout.owned)
        of_reduced, between, of_mean = self._layout.sum(products).tolist()
        if not of_mean or not math.isfinite(of_mean + of_reduced):
            return 1.0  # no gradient, or none that is finite: the next step's may do
        factor, skew = between / of_mean, 1 - between**2 / (of_mean * (of_reduced or 1.0))
        if not skew < _SKEW**2:
            used = {f"parameter {i}": tensor in self._own.of for i, tensor in enumerate(tensors)}
            self._layout.require_same_use(used, self._loss.parameters[0].device)
            raise CurvatureUnavailable(_skewed(factor, skew**0.5))
        counts = factor * self._layout.world_size
        near = abs(counts - round(counts)) <= _ROUND * counts
        self.factor = round(counts) / self._layout.world_size if near else factor
        self.discard()
        return self.factor

    def discard(self) -> None:
        """Forget what was seen: the gradients were thrown away, or the factor is known."""
        self._own.clear()
        self._reduced = []


def _skewed(factor: float, skew: float) -> Blocker:
    return Blocker(
        "the reduction of the gradients",
        f"gives no multiple of the mean of the processes' gradients (the sine of the angle between them is "
        f"{skew:.3g}, the factor along it {factor:.3g})",
        "Average them by DDP or fully_shard within the last backward of a step, without a lossy communication hook.",
    )
