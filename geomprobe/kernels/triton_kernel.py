"""The read on CUDA: two launches, however many tensors there are, over a table of addresses.

A program reads one chunk of one tensor: w, g and each w*. It writes its part of the sums and of the digests, and adds
its column sums to those of the tensor. Only integers are added by atomics, and they give the same bits in any order.
A last launch has one program a tensor. It adds the parts in the order of the chunks, and mixes the column sums.

The addresses are copied to the device only when they have changed, from pinned memory, without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from geomprobe.kernels.tensor_digests import WIDTH, positions, slots, words_in_rows
from geomprobe.kernels.transfer import moved

CHUNK = 16384  # elements of a program: two tiles of float32, one of 16 bits
STEP = 2048  # elements of one iteration
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _mixed(value, mark):
    mixed = (value + mark) * mark
    mixed ^= mixed >> 29
    return mixed * mark


@triton.jit
def _bits(values, SIZE: tl.constexpr):
    """The bits of floats as signed integers of 64 bits."""
    if SIZE == 8:
        return values.to(tl.int64, bitcast=True)
    else:  # noqa: RET505, of which the compiler sees but one
        return values.to(tl.int32 if SIZE == 4 else tl.int16, bitcast=True).to(tl.int64)


@triton.jit
def _digest(values, at, first, end, head, columns, marks, STEP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The digest of some elements: of whole rows, or of elements that are in no row."""
    IN_ROW: tl.constexpr = 8 * WIDTH // SIZE
    ROWS: tl.constexpr = STEP // IN_ROW
    PER_WORD: tl.constexpr = 8 // SIZE
    bits = _bits(values, SIZE)
    if first < head:
        # A word is the sum of its elements' bits, each in its place: so the sums of words are sums over elements.
        place = (at % PER_WORD) * (8 * SIZE)
        if SIZE == 4:
            bits = bits & 0xFFFFFFFF
        if SIZE == 2:
            bits = bits & 0xFFFF
        words = tl.reshape(bits << place, (ROWS, IN_ROW))
        row = first // IN_ROW + tl.arange(0, ROWS)
        total = tl.sum(_mixed(tl.sum(words, 1), tl.load(marks + row)))
        of_columns = tl.sum(tl.reshape(tl.sum(words, 0), (WIDTH, PER_WORD)), 1)
        tl.atomic_add(columns + tl.arange(0, WIDTH), of_columns, sem="relaxed")
    else:
        position = at - head
        if head > 0:
            position += head // IN_ROW + WIDTH
        inside = at < end
        total = tl.sum(tl.where(inside, _mixed(bits, tl.load(marks + position, inside, 1)), 0))
    return total


@triton.jit
def _read(
    table,
    chunks,
    marks,
    parts,
    digests,
    columns,
    TYPE: tl.constexpr,
    STAR_TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    REFERENCES: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One chunk, which is (tensor, its first element, its last, where the rows of the tensor end)."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 4 * program)
    begin = tl.load(chunks + 4 * program + 1)
    end = tl.load(chunks + 4 * program + 2)
    head = tl.load(chunks + 4 * program + 3)
    row = table + (2 + REFERENCES) * tensor
    w_at = tl.load(row).to(tl.pointer_type(TYPE))
    g_at = tl.load(row + 1).to(tl.pointer_type(TYPE))
    PRODUCTS: tl.constexpr = 3 + 3 * REFERENCES if REFERENCES else 1
    part = parts + PRODUCTS * program
    of_columns = columns + 2 * WIDTH * tensor
    of_w = tl.zeros((), tl.int64)
    of_g = tl.zeros((), tl.int64)
    gg = tl.zeros((STEP,), tl.float64)
    wg = tl.zeros((STEP,), tl.float64)
    ww = tl.zeros((STEP,), tl.float64)
    gd = tl.zeros((STEP,), tl.float64)
    wd = tl.zeros((STEP,), tl.float64)
    dd = tl.zeros((STEP,), tl.float64)
    star_at = tl.load(row + (2 if REFERENCES else 0)).to(tl.pointer_type(STAR_TYPE))
    for first in range(begin, end, STEP):
        at = first + tl.arange(0, STEP)
        inside = at < end
        w = tl.load(w_at + at, inside, 0.0)
        g = tl.load(g_at + at, inside, 0.0)
        of_w += _digest(w, at, first, end, head, of_columns, marks, STEP, SIZE, WIDTH)
        of_g += _digest(g, at, first, end, head, of_columns + WIDTH, marks, STEP, SIZE, WIDTH)
        y = g.to(tl.float64)
        gg += y * y
        if REFERENCES > 0:
            x = w.to(tl.float64)
            d = x - tl.load(star_at + at, inside, 0.0).to(tl.float64)
            wg += x * y
            ww += x * x
            gd += y * d
            wd += x * d
            dd += d * d
    tl.store(digests + 2 * program, of_w)
    tl.store(digests + 2 * program + 1, of_g)
    tl.store(part, tl.sum(gg))
    if REFERENCES > 0:
        tl.store(part + 1, tl.sum(wg))
        tl.store(part + 2, tl.sum(ww))
        tl.store(part + 3, tl.sum(gd))
        tl.store(part + 4, tl.sum(wd))
        tl.store(part + 5, tl.sum(dd))
    # Of each further reference. The chunk's w and g come from the nearest cache.
    for k in tl.static_range(1, REFERENCES):
        other_at = tl.load(row + 2 + k).to(tl.pointer_type(STAR_TYPE))
        gd = tl.zeros((STEP,), tl.float64)
        wd = tl.zeros((STEP,), tl.float64)
        dd = tl.zeros((STEP,), tl.float64)
        for first in range(begin, end, STEP):
            at = first + tl.arange(0, STEP)
            inside = at < end
            x = tl.load(w_at + at, inside, 0.0).to(tl.float64)
            y = tl.load(g_at + at, inside, 0.0).to(tl.float64)
            d = x - tl.load(other_at + at, inside, 0.0).to(tl.float64)
            gd += y * d
            wd += x * d
            dd += d * d
        tl.store(part + 3 + 3 * k, tl.sum(gd))
        tl.store(part + 4 + 3 * k, tl.sum(wd))
        tl.store(part + 5 + 3 * k, tl.sum(dd))


@triton.jit
def _add(
    bounds,
    marks,
    parts,
    digests,
    columns,
    products,
    found,
    PRODUCTS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of one tensor, which is (its first chunk, its last, its number of rows): what its chunks have found."""
    tensor = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds + 3 * tensor)
    end = tl.load(bounds + 3 * tensor + 1)
    rows = tl.load(bounds + 3 * tensor + 2)
    for k in tl.static_range(PRODUCTS):
        total = tl.zeros((LANES,), tl.float64)
        for first in range(begin, end, LANES):
            at = first + tl.arange(0, LANES)
            total += tl.load(parts + PRODUCTS * at + k, at < end, 0.0)
        tl.store(products + PRODUCTS * tensor + k, tl.sum(total))
    for side in tl.static_range(2):
        digest = tl.zeros((LANES,), tl.int64)
        for first in range(begin, end, LANES):
            at = first + tl.arange(0, LANES)
            digest += tl.load(digests + 2 * at + side, at < end, 0)
        column = tl.arange(0, WIDTH)
        inside = column < rows * WIDTH  # a tensor without rows has no columns either
        of_columns = tl.load(columns + WIDTH * (2 * tensor + side) + column)
        mixed = tl.where(inside, _mixed(of_columns, tl.load(marks + rows + column, inside, 1)), 0)
        tl.store(found + 2 * tensor + side, tl.sum(digest) + tl.sum(mixed))


class TritonKernel:
    """The read of dense tensors of one dtype, each in the order of its memory, on one GPU.

    Args:
        sizes: of each weight, its number of elements.
        dtype: of the weights and their gradients.
        star_dtype: of the references.
        references: how many there are; with none, g.g is the only product.
        device: the GPU.
    """

    DTYPES = tuple(TYPES)

    def __init__(
        self, sizes: Sequence[int], dtype: torch.dtype, star_dtype: torch.dtype, references: int, device: torch.device
    ) -> None:
        self._device, self._references, self._size = device, references, dtype.itemsize
        self._types = TYPES[dtype], TYPES[star_dtype]
        heads = [words_in_rows(size, dtype.itemsize) * 8 // dtype.itemsize for size in sizes]
        chunks: list[tuple[int, int, int, int]] = []
        bounds: list[tuple[int, int, int]] = []
        for tensor, (size, head) in enumerate(zip(sizes, heads, strict=True)):
            first = len(chunks)
            chunks += [(tensor, a, min(a + CHUNK, size), head) for a in range(0, size, CHUNK)]
            bounds.append((first, len(chunks), head * dtype.itemsize // (8 * WIDTH)))
        self._counts = len(sizes), len(chunks)
        self._chunks = torch.tensor(chunks, dtype=torch.int64).to(device)
        self._bounds = torch.tensor(bounds, dtype=torch.int64).to(device)
        longest = max((slots(size, dtype.itemsize) for size in sizes), default=0)
        self._marks = torch.from_numpy(positions(longest)).to(device)
        self._last: tuple[Any, Any] = None, None
        # Compiles now, not within a training step.
        w = torch.zeros(STEP, dtype=dtype, device=device)
        star = w.to(star_dtype)
        one = torch.tensor([[0, 0, 1, 0]], device=device)
        row = (w.data_ptr(), w.data_ptr(), *([star.data_ptr()] * references))
        self._run(torch.tensor([row], device=device), one, torch.tensor([[0, 1, 0]], device=device), 1, 1)

    def read(self, addresses: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Digests ``[tensors, 2]`` and products ``[tensors, 3 + 3 references]`` of w, g and each w*, by address.

        Without references, the products are g.g alone, ``[tensors, 1]``.
        """
        last, table = self._last
        if addresses != last:
            table = moved(addresses, self._device, torch.int64)
            self._last = addresses, table
        return self._run(table, self._chunks, self._bounds, *self._counts)

    def _run(self, table: Tensor, chunks: Tensor, bounds: Tensor, tensors: int, programs: int) -> tuple[Tensor, Tensor]:
        width = 3 + 3 * self._references if self._references else 1
        floats: dict[str, Any] = {"dtype": torch.float64, "device": self._device}
        integers: dict[str, Any] = {"dtype": torch.int64, "device": self._device}
        parts, digests = torch.empty(programs, width, **floats), torch.empty(programs, 2, **integers)
        columns = torch.zeros(tensors, 2, WIDTH, **integers)
        products, found = torch.empty(tensors, width, **floats), torch.empty(tensors, 2, **integers)
        with torch.cuda.device_of(table):  # launches go to the current device
            if programs:
                _read[(programs,)](
                    table,
                    chunks,
                    self._marks,
                    parts,
                    digests,
                    columns,
                    *self._types,
                    self._size,
                    self._references,
                    CHUNK,
                    STEP,
                    WIDTH,
                    num_warps=8,
                    enable_fp_fusion=True,
                )
            _add[(tensors,)](
                bounds, self._marks, parts, digests, columns, products, found, width, 256, WIDTH, enable_fp_fusion=True
            )
        return found, products
