"""The sketch on a CPU: `geomprobe.trace.projection.add` as a loop that numba compiles, with the same bits.

It is bound by computing, not by memory. So signs, conversions and sums are made of `LANES` elements at once, and each
hash serves 64. The vectors are written out here: what the compiler finds by itself needs half as much time again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from geomprobe.kernels.numba_kernel import Loop, bytes_of, intrinsic

LANES = 16  # elements; divides 64

_U = np.uint64


def _adder(lanes: int) -> Any:
    """A function that adds consecutive elements to consecutive buckets, negated where the word's bits are set."""

    @intrinsic
    def add(typing: Any, x: Any, out: Any, word: Any, kind: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of_x, of_out = (ir.VectorType(kind_, lanes) for kind_ in (context.get_value_type(kind.dtype), _DOUBLE))
            ins, outs = (
                builder.inttoptr(address, vector.as_pointer())
                for address, vector in zip(arguments, (of_x, of_out), strict=False)
            )
            values, sums = builder.load(ins), builder.load(outs)
            values.align, sums.align = kind.dtype.bitwidth // 8, 8
            if kind.dtype != types.float64:
                values = builder.fpext(values, of_out)
            bits = builder.trunc(arguments[2], ir.IntType(lanes))
            negative = builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes))
            signed = builder.select(negative, builder.fneg(values), values)
            builder.store(builder.fadd(sums, signed), outs).align = 8
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.uint64, kind), code

    return add


_DOUBLE = ir.DoubleType()
_add_lanes, _add_one = _adder(LANES), _adder(1)


@njit(nogil=True)
def _word(key, index):
    """`projection.words` of one index."""
    z = key + (index + _U(1)) * _U(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U(27))) * _U(0x94D049BB133111EB)
    return z ^ (z >> _U(31))


@Loop
def _add(x, out, start, sign_key, turn_key):
    size, of_x = len(out), bytes_of(x)
    source, to = x.ctypes.data, out.ctypes.data
    done, count = 0, len(x)
    while done < count:
        block = (start + done) // size
        place = start + done - block * size
        bucket = place + np.int64(((_word(turn_key, _U(block)) >> _U(32)) * _U(size)) >> _U(32))
        if bucket >= size:
            bucket -= size
        end = done + min(count - done, size - place, size - bucket)  # of a run of buckets
        while done < end:
            number = start + done
            word = _word(sign_key, _U(number >> 6)) >> _U(number & 63)
            after = min(end, done + 64 - (number & 63))
            if after - done == 64:  # most; a loop of known length is unrolled, and takes half the time
                for _ in range(64 // LANES):
                    _add_lanes(source + done * of_x, to + 8 * bucket, word, x)
                    word >>= _U(LANES)
                    done += LANES
                    bucket += LANES
            while done + LANES <= after:
                _add_lanes(source + done * of_x, to + 8 * bucket, word, x)
                word >>= _U(LANES)
                done += LANES
                bucket += LANES
            while done < after:
                _add_one(source + done * of_x, to + 8 * bucket, word, x)
                word >>= _U(1)
                done += 1
                bucket += 1


def add(x: Any, start: int, out: Any, keys: tuple[int, int]) -> None:
    """`geomprobe.trace.projection.add`, of contiguous float32 or float64; the keys are those of the seed.

    >>> from geomprobe.trace import projection
    >>> x, here, there = np.array([1.0, 2.0, 3.0]), np.zeros(4), np.zeros(4)
    >>> add(x, 2, here, projection.keys(0)); projection.add(x, 2, there, seed=0)
    >>> here.tolist() == there.tolist()
    True
    """
    _add(x, out, start, _U(keys[0]), _U(keys[1]))
