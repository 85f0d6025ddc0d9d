"""Digests of a batch, of random states and of bytes; and whether two tensors have the same bits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomprobe.kernels.tensor_digests import INTEGERS


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one type and shape have the same bits: a NaN equals itself, and -0.0 is not 0.0.

    >>> nan, zero = torch.full((1,), torch.nan), torch.zeros(1)
    >>> same_bits(nan, nan.clone()), same_bits(zero, -zero)
    (True, False)
    """
    integers = INTEGERS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))


def host_digest(*parts: bytes) -> int:
    """A 64-bit digest of bytes, signed, as the int64 columns hold it."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return int.from_bytes(state.digest(), "little", signed=True)


def fold(digest: int, more: int) -> int:
    """Chain two digests, in order; the result is a signed 64-bit integer."""
    return host_digest(digest.to_bytes(8, "little", signed=True), more.to_bytes(8, "little", signed=True))


def leaves(batch: Any) -> tuple[list[Tensor], list[bytes]]:
    """The tensors of a batch, in order, and the bytes of everything else in it, shapes and keys included.

    Handles tensors, NumPy arrays, mappings, sequences, strings and numbers, nested; an object of another
    type counts by its attributes where it has any.

    >>> tensors, rest = leaves({"x": torch.zeros(2), "name": ["a", "b"]})
    >>> len(tensors), rest[0]
    (1, b'dict')
    """
    tensors: list[Tensor] = []
    rest: list[bytes] = []
    _collect(batch, tensors, rest)
    return tensors, rest


def _collect(item: Any, tensors: list[Tensor], rest: list[bytes], above: tuple[int, ...] = ()) -> None:
    rest.append(type(item).__name__.encode())
    inside = (*above, id(item))
    if isinstance(item, Tensor):
        tensors.append(item)
        rest.append(f"{tuple(item.shape)} {item.dtype}".encode())
    elif isinstance(item, np.ndarray):
        rest.append(f"{item.shape} {item.dtype}".encode())
        rest.append(repr(item.tolist()).encode() if item.dtype.hasobject else item.tobytes())
    elif isinstance(item, (str, bytes, int, float, complex, bool, type(None), np.generic)):
        rest.append(repr(item).encode())
    elif id(item) in above:
        rest.append(str(above.index(id(item))).encode())  # an object that holds itself
    elif isinstance(item, Mapping):
        rest.append(str(len(item)).encode())  # or a nested end could move unseen
        for key, value in item.items():
            rest.append(repr(key).encode())
            _collect(value, tensors, rest, inside)
    elif isinstance(item, (Sequence, set, frozenset)):
        rest.append(str(len(item)).encode())
        for value in sorted(item, key=repr) if isinstance(item, (set, frozenset)) else item:
            _collect(value, tensors, rest, inside)
    else:
        _collect(_attributes(item), tensors, rest, inside)


def _attributes(item: Any) -> dict[str, Any]:
    slots = [getattr(kind, "__slots__", ()) for kind in type(item).__mro__]
    names = [name for found in slots for name in ([found] if isinstance(found, str) else found)]
    own = {name: getattr(item, name) for name in names if hasattr(item, name) and name[:2] != "__"}
    return {**own, **getattr(item, "__dict__", {})}


def rng_digests() -> dict[str, int]:
    """Digests of the global generators' states by name, drawing nothing."""
    _, words, gauss = random.getstate()
    kind, key, *rest = np.random.get_state()  # the legacy form: the global generator is always MT19937
    numpy = [str(kind).encode(), np.asarray(key).tobytes(), repr(rest).encode()]
    found = {
        "python": host_digest(np.asarray(words, np.uint64).tobytes(), repr(gauss).encode()),
        "numpy": host_digest(*numpy),
        "torch": host_digest(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_initialized():
        for index, cuda in enumerate(torch.cuda.get_rng_state_all()):
            found[f"cuda:{index}"] = host_digest(cuda.numpy().tobytes())
    return found
