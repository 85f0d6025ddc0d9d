"""The read on a CPU: loops that numba compiles, over tables of addresses, in threads of Python that hold no lock.

A tensor is cut into chunks, and a chunk into blocks that stay in the nearest cache while sums and digests look at
them one after the other. Each chunk writes its own partial results, and they are added in the order of the chunks:
no result depends on how many threads there are.

Compiled code is kept on disk, as numba does it: in ``NUMBA_CACHE_DIR`` where that is set, else in ``__pycache__``
beside this file, else in the user's cache folder. Where none can be written, each process compiles for itself.

numba's own threads would not survive a fork, which data loaders do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as _intrinsic
from torch import Tensor

from geomprobe.kernels.tensor_digests import WIDTH, positions, slots, words_in_rows

PIECE = 64  # words of a row: 512 bytes
AHEAD = 4  # pieces: how far ahead of its use memory is fetched
CHUNK = 2**17  # elements: what one call of a thread reads at least, and what has a partial sum
MINIMUM = 2**18  # elements; for fewer, waking another thread costs more than it saves

intrinsic: Any = _intrinsic  # its own annotations speak of the compiler's arguments, not of the call's

# numba has no 16-bit floats. Integers stand for them: these types only say how a number's bits are read.
KINDS = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.uint16, torch.bfloat16: np.int16}


def _pointer(context: Any, builder: Any, address: Any, index: Any, dtype: Any) -> Any:
    pointer = builder.inttoptr(address, context.get_value_type(dtype).as_pointer())
    return builder.gep(pointer, [index])


def _loaded(builder: Any, pointer: Any, alignment: int) -> Any:
    value = builder.load(pointer)
    value.align = alignment
    return value


def _from_half(builder: Any, value: Any) -> Any:
    """float32 of the bits of a float16, by integers: exact for subnormal numbers, whatever the processor flushes."""
    wide, single = ir.IntType(32), ir.FloatType()
    bits = builder.zext(value, wide)
    size = builder.and_(bits, wide(0x7FFF))
    shifted = builder.shl(size, wide(13))
    infinite = builder.icmp_unsigned(">=", size, wide(0x7C00))
    normal = builder.add(shifted, builder.select(infinite, wide(224 << 23), wide(112 << 23)))
    subnormal = builder.fmul(builder.sitofp(size, single), single(2.0**-24))
    small = builder.icmp_unsigned("<", size, wide(0x400))
    magnitude = builder.select(small, builder.bitcast(subnormal, wide), normal)
    sign = builder.shl(builder.and_(bits, wide(0x8000)), wide(16))
    return builder.bitcast(builder.or_(magnitude, sign), single)


def _from_brain(builder: Any, value: Any) -> Any:
    """float32 of the bits of a bfloat16."""
    wide = ir.IntType(32)
    return builder.bitcast(builder.shl(builder.zext(value, wide), wide(16)), ir.FloatType())


@intrinsic
def _number(typing: Any, address: Any, index: Any, kind: Any) -> Any:
    """The element at an index, as float64."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, arguments[0], arguments[1], kind.dtype)
        value = _loaded(builder, pointer, kind.dtype.bitwidth // 8)
        if kind.dtype == types.uint16:
            value = _from_half(builder, value)
        elif kind.dtype == types.int16:
            value = _from_brain(builder, value)
        return value if kind.dtype == types.float64 else builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64, types.int64, kind), code


@intrinsic
def _word(typing: Any, address: Any, index: Any, kind: Any) -> Any:
    """The 64 bits at an index of words; the address need only be aligned for its elements."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, arguments[0], arguments[1], types.int64)
        return _loaded(builder, pointer, kind.dtype.bitwidth // 8)

    return types.int64(types.int64, types.int64, kind), code


@intrinsic
def _bits(typing: Any, address: Any, index: Any, kind: Any) -> Any:
    """The bits of the element at an index, as a signed integer."""
    integer: Any = types.Integer.from_bitwidth(kind.dtype.bitwidth)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, arguments[0], arguments[1], integer)
        value = _loaded(builder, pointer, integer.bitwidth // 8)
        return value if integer.bitwidth == 64 else builder.sext(value, ir.IntType(64))

    return types.int64(types.int64, types.int64, kind), code


@intrinsic
def bytes_of(typing: Any, kind: Any) -> Any:
    """Bytes of an element, as a constant, by which loops are unrolled."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.int64, kind.dtype.bitwidth // 8)

    return types.int64(kind), code


@intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Have a line of memory brought into the cache; any address will do."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = builder.module.globals.get("llvm.prefetch.p0")
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [byte, integer, integer, integer])
            function = ir.Function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], byte), integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


class Loop:
    """A function that numba compiles for the types of its arguments, and keeps on disk where that can be done."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        try:
            self._compiled = njit(nogil=True, cache=True)(function)
        except RuntimeError:  # no folder for the cache can be written
            self._compiled = njit(nogil=True)(function)

    def __call__(self, *arguments: Any) -> None:
        try:
            self._compiled(*arguments)
        except OSError:  # the folder is full, or has gone
            self._compiled = njit(nogil=True)(self._function)
            self._compiled(*arguments)


# With a `star_kind` of None, numba compiles nothing of what is there where it is not None: g.g is the one sum.
# Sums may be added in any order, as long as it is the same one each time: nothing else of floats is loosened.
_summing = njit(nogil=True, fastmath={"reassoc", "contract"})
_counting = njit(nogil=True)


@_summing
def _products(w, g, star, first, last, kind, star_kind):
    gg = wg = ww = gd = wd = dd = 0.0
    for i in range(first, last):
        a = _number(g, i, kind)
        gg += a * a
        if star_kind is not None:
            b = _number(w, i, kind)
            d = b - _number(star, i, star_kind)
            wg += a * b
            ww += b * b
            gd += a * d
            wd += b * d
            dd += d * d
    return gg, wg, ww, gd, wd, dd


@_summing
def _piece(w, g, star, at, of_w, of_g, kind, star_kind):
    """Of some words of a row: the six sums, and the sums of the words, which are also added to their columns."""
    gg = wg = ww = gd = wd = dd = 0.0
    row_of_w = row_of_g = 0
    for j in range(PIECE):
        x, y = _word(w, j, kind), _word(g, j, kind)
        row_of_w += x
        row_of_g += y
        of_w[at + j] += x
        of_g[at + j] += y
        # As many elements as a word has, although not its own: so both are read as they lie, in whole vectors.
        for k in range(8 // bytes_of(kind)):
            i = k * PIECE + j
            a = _number(g, i, kind)
            gg += a * a
            if star_kind is not None:
                b = _number(w, i, kind)
                d = b - _number(star, i, star_kind)
                wg += a * b
                ww += b * b
                gd += a * d
                wd += b * d
                dd += d * d
    return gg, wg, ww, gd, wd, dd, row_of_w, row_of_g


@_summing
def _row(w, g, star, of_w, of_g, kind, star_kind):
    """Of one row: the six sums, and the sums of its words."""
    gg = wg = ww = gd = wd = dd = 0.0
    row_of_w = row_of_g = 0
    bytes_of_star = 0
    if star_kind is not None:
        bytes_of_star = PIECE * 8 // bytes_of(kind) * bytes_of(star_kind)
    for piece in range(WIDTH // PIECE):
        for line in range(0, 8 * PIECE, 64):
            _prefetch(w + AHEAD * 8 * PIECE + line)
            _prefetch(g + AHEAD * 8 * PIECE + line)
        for line in range(0, bytes_of_star, 64):
            _prefetch(star + AHEAD * bytes_of_star + line)
        found = _piece(w, g, star, piece * PIECE, of_w, of_g, kind, star_kind)
        gg += found[0]
        wg += found[1]
        ww += found[2]
        gd += found[3]
        wd += found[4]
        dd += found[5]
        row_of_w += found[6]
        row_of_g += found[7]
        w += 8 * PIECE
        g += 8 * PIECE
        star += bytes_of_star
    return gg, wg, ww, gd, wd, dd, row_of_w, row_of_g


@_counting
def _mixed(value, mark):
    mixed = (value + mark) * mark
    mixed ^= mixed >> 29
    return mixed * mark


@_counting
def _rest(x, first, last, marks, kind):
    """The digest of elements that are in no row; the first of these has the first of the marks."""
    total = 0
    for i in range(last - first):
        total += _mixed(_bits(x, first + i, kind), marks[i])
    return total


@Loop
def _read_chunks(chunks, table, marks, first, last, parts, digests, columns, kind, star_kind):
    """Some of the chunks, which are (tensor, its first element, its last, where the rows of the tensor end)."""
    size, star_size = bytes_of(kind), 0
    if star_kind is not None:
        star_size = bytes_of(star_kind)
    of_row = 8 * WIDTH // size
    for chunk in range(first, last):
        tensor, begin, end, head = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2], chunks[chunk, 3]
        w, g, star = table[tensor, 0], table[tensor, 1], table[tensor, min(2, table.shape[1] - 1)]
        part = parts[chunk]
        columns_of_w, columns_of_g = columns[chunk, 0], columns[chunk, 1]
        # Loops, where slices would be shorter: numba takes seconds to compile what these say of shapes that differ.
        for k in range(part.size):
            part[k] = 0.0
        for j in range(WIDTH):
            columns_of_w[j] = columns_of_g[j] = 0
        gg = wg = ww = gd = wd = dd = 0.0
        of_w = of_g = 0
        at = begin
        while at < end:
            if at < head:
                to = at + of_row
                found = _row(
                    w + at * size, g + at * size, star + at * star_size, columns_of_w, columns_of_g, kind, star_kind
                )
                gg += found[0]
                wg += found[1]
                ww += found[2]
                gd += found[3]
                wd += found[4]
                dd += found[5]
                of_w += _mixed(found[6], marks[at // of_row])
                of_g += _mixed(found[7], marks[at // of_row])
            else:
                to = min(at + of_row, end)
                sums = _products(w, g, star, at, to, kind, star_kind)
                gg += sums[0]
                wg += sums[1]
                ww += sums[2]
                gd += sums[3]
                wd += sums[4]
                dd += sums[5]
                position = at - head + (head // of_row + WIDTH if head else 0)
                of_w += _rest(w, at, to, marks[position:], kind)
                of_g += _rest(g, at, to, marks[position:], kind)
            if star_kind is not None:
                for k in range(3, table.shape[1]):
                    sums = _products(w, g, table[tensor, k], at, to, kind, star_kind)
                    part[3 * k - 3] += sums[3]
                    part[3 * k - 2] += sums[4]
                    part[3 * k - 1] += sums[5]
            at = to
        part[0] = gg
        if star_kind is not None:
            part[1], part[2], part[3], part[4], part[5] = wg, ww, gd, wd, dd
        digests[chunk, 0], digests[chunk, 1] = of_w, of_g


@Loop
def _add_chunks(chunks, marks, parts, digests, columns, totals, found, kind):
    """What the chunks of each tensor have found, in their order; the column sums are mixed here."""
    of_row = 8 * WIDTH // bytes_of(kind)
    count = chunks.shape[0]
    for chunk in range(count):
        tensor, begin, head = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 3]
        for k in range(parts.shape[1]):
            totals[tensor, k] += parts[chunk, k]
        last = chunk + 1 == count or chunks[chunk + 1, 0] != tensor
        for side in range(2):
            found[tensor, side] += digests[chunk, side]
            if begin:
                for j in range(WIDTH):
                    columns[chunk, side, j] += columns[chunk - 1, side, j]
            if last and head:
                for j in range(WIDTH):
                    found[tensor, side] += _mixed(columns[chunk, side, j], marks[head // of_row + j])


class NumbaKernel:
    """The read of dense tensors of one dtype, each in the order of its memory, on the CPU.

    Args:
        sizes: of each weight, its number of elements.
        dtype: of the weights and their gradients.
        star_dtype: of the references.
        references: how many there are; with none, g.g is the only product.
        device: the CPU.
    """

    DTYPES = tuple(KINDS)

    def __init__(
        self, sizes: Sequence[int], dtype: torch.dtype, star_dtype: torch.dtype, references: int, device: torch.device
    ) -> None:
        # A kind of None has code of its own, which computes g.g alone.
        self._kinds = np.empty(0, KINDS[dtype]), np.empty(0, KINDS[star_dtype]) if references else None
        self._tensors, self._width = len(sizes), 3 + 3 * references if references else 1
        cuts = [
            (tensor, first, min(first + CHUNK, size), words_in_rows(size, dtype.itemsize) * 8 // dtype.itemsize)
            for tensor, size in enumerate(sizes)
            for first in range(0, size, CHUNK)
        ]
        self._chunks = np.array(cuts, np.int64).reshape(-1, 4)
        self._read_up_to = np.cumsum(self._chunks[:, 2] - self._chunks[:, 1])
        self._marks = positions(max((slots(size, dtype.itemsize) for size in sizes), default=0))
        # Compiles now, not within a training step.
        self._run(np.zeros((0, 2 + references), np.int64), np.zeros((0, 4), np.int64))

    def read(self, addresses: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Digests ``[tensors, 2]`` and products ``[tensors, 3 + 3 references]`` of w, g and each w*, by address.

        Without references, the products are g.g alone, ``[tensors, 1]``.
        """
        return self._run(np.array(addresses, np.int64).reshape(self._tensors, -1), self._chunks)

    def _run(self, table: Any, chunks: Any) -> tuple[Tensor, Tensor]:
        parts = np.empty((len(chunks), self._width))
        digests = np.empty((len(chunks), 2), np.int64)
        columns = np.empty((len(chunks), 2, WIDTH), np.int64)

        def read(first: int, last: int) -> None:
            _read_chunks(chunks, table, self._marks, first, last, parts, digests, columns, *self._kinds)

        _in_threads(read, self._cuts(len(chunks)))
        products, found = np.zeros((self._tensors, self._width)), np.zeros((self._tensors, 2), np.int64)
        _add_chunks(chunks, self._marks, parts, digests, columns, products, found, self._kinds[0])
        return torch.from_numpy(found), torch.from_numpy(products)

    def _cuts(self, chunks: int) -> list[int]:
        """Where the chunks of one thread end and those of the next begin."""
        total = int(self._read_up_to[-1]) if chunks else 0
        threads = max(1, min(torch.get_num_threads(), total // MINIMUM))
        inner = [int(np.searchsorted(self._read_up_to, total * n // threads)) + 1 for n in range(1, threads)]
        return [0, *inner, chunks]


def _in_threads(read: Callable[[int, int], None], cuts: Sequence[int]) -> None:
    ranges = list(itertools.pairwise(cuts))
    others = [_pool(os.getpid(), len(ranges) - 1).submit(read, *part) for part in ranges[1:]]
    read(*ranges[0])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork's child has none of those that its parent had."""
    return ThreadPoolExecutor(threads, "geomprobe-read")
