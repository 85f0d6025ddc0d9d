"""CIFAR-10's batches as Python 2 pickled them, opcode by opcode: protocol 2, with byte strings and long lists."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def dumps(value: Any) -> bytes:
    return b"\x80\x02" + _written(value) + b"."


def _written(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_written, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_written, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_written(item) for pair in value.items() for item in pair) + b"u"
    return _array(value)


def _array(array: np.ndarray[Any, Any]) -> bytes:
    empty = b"cnumpy.core.multiarray\n_reconstruct\n" + b"(cnumpy\nndarray\n" + _written((0,)) + _written(b"b") + b"tR"
    kind = b"cnumpy\ndtype\n" + _written((array.dtype.str[1:].encode(), 0, 1)) + b"R"
    kind += _written((3, array.dtype.str[:1].encode(), None, None, None, -1, -1, 0)) + b"b"
    state = b"(" + _written(1) + _written(array.shape) + kind + _written(False) + _written(array.tobytes()) + b"t"
    return empty + state + b"b"
