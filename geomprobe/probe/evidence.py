"""Evidence that tensors still hold what they held: it is cheap, stays on their device, and sees any usual change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomprobe.distributed.dtensor import local

Mark = tuple[int, int, int] | None
_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)


def moved(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of what the host knows on a device, without waiting for it; a step makes none that it can keep.

    >>> moved([True, False], torch.device("cpu"))
    tensor([ True, False])
    """
    tensor = torch.tensor(values, dtype=dtype)
    # The allocator of pinned memory gives none of it to others before the copy has been made.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def marks(tensors: Iterable[Tensor | None]) -> list[Mark]:
    """What changes where a tensor is replaced, its memory exchanged, or it is written to; None for no tensor.

    A write through ``.data`` or NumPy leaves it as it is.

    >>> weight = torch.zeros(2); before = marks([weight])
    >>> _ = weight.add_(1); marks([weight]) == before
    False
    """
    found: list[Mark] = []
    for tensor in tensors:  # called several times a step for each parameter: no function of ours for a plain one
        if tensor is None:
            found.append(None)
            continue
        own = tensor if type(tensor) in _PLAIN else local(tensor)
        found.append((id(tensor), own._version, 0 if own.is_sparse else own.data_ptr()))
    return found


def evidence(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The norm, and the first, the middle and the last value of each tensor, [4, tensors], 0 for none.

    The norm sees a change of any value; single values see a change of sign. Nothing is waited for.

    >>> evidence([torch.tensor([3.0, 0.0, -4.0]), None], torch.device("cpu"))
    tensor([[ 5.,  0.],
            [ 3.,  0.],
            [ 0.,  0.],
            [-4.,  0.]])
    """
    values: list[Tensor | None] = []
    for t in tensors:
        own = None if t is None else t.detach() if type(t) in _PLAIN else local(t.detach())
        values.append(own if own is None or (own.is_floating_point() and not own.is_sparse) else _dense(own))
    present = [t for t in values if t is not None and t.numel()]
    if not present:
        return torch.zeros(4, len(tensors), device=device)
    types = {t.dtype for t in present}
    dtype = None if types.isdisjoint(_HALF) else torch.float64 if torch.float64 in types else torch.float32
    norms = iter(torch._foreach_norm(present, 2, dtype=dtype))
    of_none = torch.zeros((), device=device) if any(t is None or not t.numel() for t in values) else present[0]
    rows: list[list[Tensor]] = []
    for t in values:
        if t is None or not t.numel():
            rows.append([of_none] * 4)
        elif t.is_contiguous():
            start, count = t.storage_offset(), t.numel()
            places = [t.as_strided((), (), start), t.as_strided((), (), start + count // 2)]
            rows.append([next(norms), *places, t.as_strided((), (), start + count - 1)])
        else:
            rows.append([next(norms), *_places(t)])
    every = [value for row in rows for value in row]
    if (
        len(types) > 1
        or dtype is not None
        or torch.get_default_dtype() not in types
        or len({t.device for t in every}) > 1
    ):
        every = [(t.real if t.is_complex() else t).to(device, torch.float64) for t in every]
    return torch.stack(every).view(-1, 4).T


def _places(tensor: Tensor) -> list[Tensor]:
    """The values at the beginning, in the middle and at the end of a tensor, without a copy."""
    start = tensor.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    middle = sum(size // 2 * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return [tensor.as_strided((), (), start + place) for place in (0, middle, last)]


def _dense(tensor: Tensor) -> Tensor:
    dense = tensor._values() if tensor.is_sparse else tensor
    return dense if dense.is_floating_point() or dense.is_complex() else dense.double()
