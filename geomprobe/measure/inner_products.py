"""Inner products of vectors of the weights' shapes, beside those that the step's own read of w and g gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.kernels.fused_read import FusedRead
from geomprobe.reproducibility.step_reader import StepReader

Vectors = Sequence[Tensor | None]


class InnerProducts:
    """Some of ``g.g, w.g, w.w`` and, of the final iterate w*, ``g.d, w.d, d.d`` with ``d = w - w*``, of any gradient.

    Args:
        parameters: the weights w, as `StepReader` takes them.
        final: w*, one tensor a parameter: DTensors or this process's local values.
        only: the names of the sums to give.
        owned: for each parameter, whether its values count here; where one does not, its sums are zero.

    >>> w, w_final, g = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
    >>> InnerProducts([w], [w_final], only=("g.d", "d.d")).measure([g])
    tensor([8., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        final: Sequence[Tensor],
        *,
        only: Sequence[str],
        owned: Sequence[bool] | None = None,
    ) -> None:
        self._reader = StepReader(parameters)
        names = self._reader.refer_to({"final": final}, owned=owned)
        self._chosen = [names.index(name) for name in only]

    def measure(self, gradients: Vectors, grad_scale: Tensor | float | None = None) -> Tensor:
        """The sums, float64 ``[only]``, of ``gradients / grad_scale`` at the parameters' present values."""
        sums = self._reader.read(gradients, grad_scale).sums
        assert sums is not None
        return sums[self._chosen]


class PairProducts:
    """``a.a``, ``a.b`` and ``b.b`` of two vectors: this process's part of the sums, float64, in one read of each.

    Args:
        like: the parameters: a vector has one tensor of each one's shape, or None for zero.
        owned: as for `InnerProducts`.
        per_parameter: give the products of each parameter's tensors too, ``[1 + parameters, 3]``, the total first.

    >>> g, hg = [torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 4.0]), torch.ones(1)]
    >>> PairProducts(hg)(g, hg)
    tensor([ 5., 11., 26.], dtype=torch.float64)
    """

    def __init__(
        self, like: Sequence[Tensor], owned: Sequence[bool] | None = None, *, per_parameter: bool = False
    ) -> None:
        self._like = [local(each).detach() for each in like]
        self._read = FusedRead(self._like, owned=owned, per_parameter=per_parameter)

    def __call__(self, a: Vectors, b: Vectors) -> Tensor:
        whole = [torch.zeros_like(w) if t is None else t for t, w in zip(b, self._like, strict=True)]
        sums = self._read.read(a, weights=whole).sums
        assert sums is not None
        return sums
