"""Marks of tensors, which change where a tensor is replaced or written to; nothing of its values is read."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from geomprobe.distributed.dtensor import local

Mark = tuple[int, int, int] | None
_PLAIN = (Tensor, nn.Parameter)


def marks(tensors: Iterable[Tensor | None]) -> list[Mark]:
    """What changes where a tensor is replaced, its memory exchanged, or it is written to; None for no tensor.

    A write through ``.data`` or NumPy leaves it as it is.

    >>> import torch; weight = torch.zeros(2); before = marks([weight])
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
