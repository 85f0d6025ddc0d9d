"""Evidence that tensors still hold what they held: it is cheap, stays on their device, and sees any usual change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local

Mark = tuple[int, int, int] | None
_HALF = (torch.float16, torch.bfloat16)


def mark(tensor: Tensor | None) -> Mark:
    """What changes where a tensor is replaced, its memory exchanged, or it is written to; None for no tensor.

    A write through ``.data`` or NumPy leaves it as it is.

    >>> weight = torch.zeros(2); before = mark(weight)
    >>> _ = weight.add_(1); mark(weight) == before
    False
    """
    if tensor is None:
        return None
    own = local(tensor)
    return id(tensor), own._version, 0 if own.is_sparse else own.data_ptr()


def evidence(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The norm, and the first, the middle and the last value of each tensor, [4, tensors], 0 for none.

    The norm sees a change of any value; single values see a change of sign. Nothing is waited for.

    >>> evidence([torch.tensor([3.0, 0.0, -4.0]), None], torch.device("cpu"))
    tensor([[ 5.,  0.],
            [ 3.,  0.],
            [ 0.,  0.],
            [-4.,  0.]])
    """
    values = [None if t is None else _values(t) for t in tensors]
    present = [t for t in values if t is not None and t.numel()]
    if not present:
        return torch.zeros(4, len(tensors), device=device)
    types = {t.dtype for t in present}
    dtype = None if types.isdisjoint(_HALF) else torch.float64 if torch.float64 in types else torch.float32
    norms = iter(torch._foreach_norm(present, 2, dtype=dtype))
    zero = torch.zeros((), device=device)
    rows: list[list[Tensor]] = [[], [], [], []]
    for t in values:
        there = [zero] * 4 if t is None or not t.numel() else [next(norms), *_places(t)]
        for row, value in zip(rows, there, strict=True):
            row.append(value)
    every = [value for row in rows for value in row]
    if len({t.dtype for t in every}) > 1 or any(t.device != device for t in every):
        every = [(t.real if t.is_complex() else t).to(device, torch.float64) for t in every]
    return torch.stack(every).view(4, -1)


def _places(tensor: Tensor) -> list[Tensor]:
    """The values at the beginning, in the middle and at the end of a tensor, without a copy."""
    start = tensor.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    middle = sum(size // 2 * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return [tensor.as_strided((), (), start + place) for place in (0, middle, last)]


def _values(tensor: Tensor) -> Tensor:
    own = local(tensor.detach())
    dense = own._values() if own.is_sparse else own
    return dense if dense.is_floating_point() or dense.is_complex() else dense.double()
