"""The top eigenvalue of a Hessian, by Lanczos on Hessian-vector products.

The libraries at hand want either the matrix itself (torch.lobpcg) or vectors on the host (SciPy's eigsh),
which would copy all weights to and fro for each product. Here the vectors stay where the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]


class TopEigenvalue(NamedTuple):
    """A largest eigenvalue and what is known of it.

    Attributes:
        value: the largest Ritz value, in 1/lr; it approaches the eigenvalue from below.
        residual: an eigenvalue lies within this of ``value``.
        products: how many Hessian-vector products it took.
    """

    value: float
    residual: float
    products: int


def top_eigenvalue(
    product: Callable[[list[Tensor]], Sequence[Tensor]],
    like: Sequence[Tensor],
    *,
    iterations: int = 30,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    total: Total | None = None,
) -> TopEigenvalue:
    """The largest (not the largest in magnitude) eigenvalue of a symmetric operator: the sharpness of a loss.

    Plain Lanczos, without keeping the basis: three vectors as large as ``like``, however many iterations.
    Rounding then makes converged eigenvalues appear again as copies, which moves none of them (Paige, 1980).
    Gradient descent is unstable along the eigenvector where the value exceeds ``2/lr``.

    Args:
        product: maps a list of tensors shaped as ``like`` to ``H`` times it; it must not write to it.
        like: tensors whose shapes, dtypes and device the vectors take.
        iterations: at most this many products.
        tolerance: stop once the residual is below it, relative to the largest Ritz value in magnitude.
        generator: draws the start, on its own device; None means one of its own with a fixed seed. The global
            RNG is not touched.
        total: where the vectors are spread over processes, makes one sum of every process's sums over each of
            its tensors (float64, one a tensor). Without it they are summed here.

    Returns:
        NaN as value and residual where a product is not finite.

    Raises:
        ValueError: for no iterations, or nothing in ``like``.

    >>> diagonal = torch.tensor([1.0, 2.0, 5.0])
    >>> top = top_eigenvalue(lambda v: [diagonal * v[0]], [diagonal])
    >>> round(top.value, 3), top.products
    (5.0, 3)
    """
    sum_up = total or torch.sum
    device = like[0].device if like else None
    size = int(sum_up(torch.tensor([t.numel() for t in like], dtype=torch.float64, device=device)))
    if iterations < 1 or size == 0:
        raise ValueError(f"top_eigenvalue needs iterations >= 1 (got {iterations}) and tensors with elements")
    previous: list[Tensor] = []
    current = _start(like, generator or torch.Generator().manual_seed(0), sum_up)
    diagonal: list[float] = []
    beside: list[float] = []
    limit = min(iterations, size)
    while True:
        following = [h.to(v) for h, v in zip(product(current), current, strict=True)]
        if previous:
            following = _minus(following, beside[-1], previous)
        diagonal.append(_dot(following, current, sum_up))
        following = _minus(following, diagonal[-1], current)
        norm = _dot(following, following, sum_up) ** 0.5
        if not np.isfinite(norm):
            return TopEigenvalue(float("nan"), float("nan"), len(diagonal))
        value, residual, largest = _ritz(diagonal, beside, norm)
        if residual <= tolerance * largest or len(diagonal) == limit:
            return TopEigenvalue(value, residual, len(diagonal))
        beside.append(norm)
        previous, current = current, [tensor / norm for tensor in following]


def _start(like: Sequence[Tensor], generator: torch.Generator, total: Total) -> list[Tensor]:
    drawn = [torch.randn(t.shape, generator=generator, device=generator.device).to(t) for t in like]
    norm = _dot(drawn, drawn, total) ** 0.5
    return [tensor / norm for tensor in drawn]


def _ritz(diagonal: list[float], beside: list[float], norm: float) -> tuple[float, float, float]:
    """The largest Ritz value, the bound on its residual, and the largest one in magnitude."""
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    return float(values[-1]), norm * abs(float(vectors[-1, -1])), float(np.abs(values).max())


def _minus(a: Sequence[Tensor], factor: float, b: Sequence[Tensor]) -> list[Tensor]:
    return [torch.sub(x, y, alpha=factor) for x, y in zip(a, b, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor], total: Total) -> float:
    # Summed in float64: over millions of weights float32 loses the orthogonality that the recurrence lives on.
    sums = [torch.sum(x * y, dtype=torch.float64) for x, y in zip(a, b, strict=True)]
    return float(total(torch.stack(sums)))
