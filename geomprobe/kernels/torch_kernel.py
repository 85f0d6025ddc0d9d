"""The inner products by plain torch, for any dtype and layout and on every device: block by block in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 2**18  # elements: large enough that calls cost little, small enough that the cache holds it in float64


def products(w: Tensor, g: Tensor, references: Sequence[Tensor]) -> Tensor:
    """``g.g, w.g, w.w`` and, for each reference w*, ``g.d, w.d, d.d`` with ``d = w - w*``, in float64.

    A tensor whose memory is not in the order of the weight's is copied.

    >>> products(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), [torch.tensor([1.0, 0.0])]).tolist()
    [25.0, 11.0, 5.0, 8.0, 4.0, 4.0]
    """
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (w, g, *references)]
    order = memory_order(tensors[0])
    found = []
    for pieces in zip(*(t.permute(order).reshape(-1).split(BLOCK) for t in tensors), strict=True):
        x, y, *stars = (piece.double() for piece in pieces)
        sums = [y.dot(y), x.dot(y), x.dot(x)]
        for star in stars:
            d = x - star
            sums += [y.dot(d), x.dot(d), d.dot(d)]
        found.append(torch.stack(sums))
    return torch.stack(found).sum(0)


def squared_norm(g: Tensor) -> Tensor:
    """``g.g`` in float64, as it lies in memory, ``[1]``.

    >>> squared_norm(torch.tensor([3.0, 4.0])).tolist()
    [25.0]
    """
    g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    blocks = (piece.double() for piece in g.permute(memory_order(g)).reshape(-1).split(BLOCK))
    return torch.stack([block.dot(block) for block in blocks]).sum(0, keepdim=True)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest in memory to the fastest."""
    dimensions = range(tensor.dim())
    return tuple(dimensions if tensor.is_contiguous() else sorted(dimensions, key=tensor.stride, reverse=True))
