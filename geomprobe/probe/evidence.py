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
    """The norm and the first value of each tensor, [2, tensors], 0 for none; nothing is waited for.

    The norm sees a change of any value; the first value sees a change of sign.

    >>> evidence([torch.tensor([3.0, -4.0]), None], torch.device("cpu"))
    tensor([[5., 0.],
            [3., 0.]])
    """
    values = [None if t is None else _values(t) for t in tensors]
    present = [t for t in values if t is not None and t.numel()]
    if not present:
        return torch.zeros(2, len(tensors), device=device)
    types = {t.dtype for t in present}
    dtype = None if types.isdisjoint(_HALF) else torch.float64 if torch.float64 in types else torch.float32
    norms = iter(torch._foreach_norm(present, 2, dtype=dtype))
    zero = torch.zeros((), device=device)
    rows: list[Tensor] = []
    firsts: list[Tensor] = []
    for t in values:
        there = t is not None and t.numel()
        rows.append(next(norms) if there else zero)
        firsts.append(t.as_strided((), ()) if t is not None and there else zero)
    every = rows + firsts
    if len({t.dtype for t in every}) > 1 or any(t.device != device for t in every):
        every = [t.to(device, torch.float64) for t in every]
    return torch.stack(every).view(2, -1)


def _values(tensor: Tensor) -> Tensor:
    own = local(tensor.detach())
    return own._values() if own.is_sparse else own
