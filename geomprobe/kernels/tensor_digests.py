"""Digests of tensors, computed where they live, without a host synchronization.

A digest is a 64-bit wrapping integer sum, so it does not depend on the number of threads or the order of
summation. A large tensor is read as a matrix of 64-bit words: its row sums and its column sums see every
changed word and every exchange of two, and only those sums, thousands of times fewer than the words, are
mixed with their positions. That needs no compilation and stays within a few times the cost of one read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH = 256  # words in a row: 2 KiB, so a row sum stays in the nearest cache
TILE = 16  # rows; a tensor of fewer is mixed element by element
_GOLDEN = 0x9E3779B97F4A7C15
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def positions(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """SplitMix64 of 0 .. count-1, odd: multipliers that mark each position."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


def words_in_rows(elements: int, size: int) -> int:
    """How many words of a tensor of ``elements`` of ``size`` bytes are in rows; the rest is mixed one by one."""
    return elements * size // (8 * WIDTH) // TILE * TILE * WIDTH


def slots(elements: int, size: int) -> int:
    """How many numbers of such a tensor are mixed: sums of rows and of columns, and elements."""
    words = words_in_rows(elements, size)
    return (words // WIDTH + WIDTH if words else 0) + elements - words * 8 // size


def _split(tensor: Tensor) -> tuple[Tensor | None, Tensor]:
    """A matrix of 64-bit words, where the tensor is large enough for one, and the bits of the elements left over."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_contiguous():
        # Channels_last or transposed: in the order of its memory, which needs no copy where that has no holes.
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).contiguous()
    flat = tensor.view(-1)
    integers = torch.uint8 if flat.dtype == torch.bool else INTEGERS[flat.element_size()]
    words = words_in_rows(flat.numel(), flat.element_size())
    in_rows = words * 8 // flat.element_size()
    if not words:
        return None, flat.view(integers)
    head = flat[:in_rows]
    if (head.storage_offset() * head.element_size()) % 8:
        head = head.clone()  # a 64-bit view needs alignment
    return head.view(torch.int64).view(-1, WIDTH), flat[in_rows:].view(integers)


class TensorDigests:
    """One 64-bit digest per group of tensors, for groups whose shapes stay the same from call to call.

    Args:
        device: where the digests are returned; tensors on other devices are digested there and carried over.

    Calling it with a sequence of groups (sequences of tensors) returns an int64 tensor, one element per
    group, 0 for an empty group. Bits count, not values: -0.0 differs from 0.0 and any NaN equals itself.

    >>> digests = TensorDigests(torch.device("cpu"))
    >>> a, b = torch.arange(6.0), torch.arange(6.0); b[[1, 2]] = b[[2, 1]]
    >>> x, y = digests([[a], [b]]).tolist()
    >>> x == y, digests([[a.clone()], []]).tolist() == [x, 0]
    (False, True)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._marks = positions(0)

    @torch.no_grad()
    def __call__(self, groups: Sequence[Sequence[Tensor]]) -> Tensor:
        devices = {tensor.device for group in groups for tensor in group} or {self._device}
        if devices == {self._device}:
            return self._on_device(groups, self._device)
        total = torch.zeros(len(groups), dtype=torch.int64, device=self._device)
        for device in sorted(devices, key=str):
            part = self._on_device([[t for t in group if t.device == device] for group in groups], device)
            total += part.to(self._device, non_blocking=True)
        return total

    def _on_device(self, groups: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
        pieces, sizes = [], []
        for group in groups:
            size = 0
            for tensor in group:
                words, rest = piece = _split(tensor)
                pieces.append(piece)
                size += rest.shape[0] if words is None else words.shape[0] + WIDTH + rest.shape[0]
            sizes.append(size)
        slots, multipliers, starts, ends = self._buffers(device, tuple(sizes))
        targets, sources, offset = [], [], 0
        for words, rest in pieces:
            if words is not None:
                rows = words.shape[0]
                torch.sum(words, 1, out=slots[offset : offset + rows])
                # By tiles first, which is half as long as at once: a tile's columns stay in the nearest cache.
                tiles = torch.sum(words.view(-1, TILE, WIDTH), 1)
                torch.sum(tiles, 0, out=slots[offset + rows : offset + rows + WIDTH])
                offset += rows + WIDTH
            if rest.shape[0]:
                targets.append(slots[offset : offset + rest.shape[0]])
                sources.append(rest)
                offset += rest.shape[0]
        if targets:
            torch._foreach_copy_(targets, sources)
        return _mix(slots, multipliers, starts, ends)

    def _buffers(self, device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        key = device, sizes
        if key not in self._slots:
            ends = np.cumsum((0, *sizes))
            if len(self._marks) < max(sizes, default=0):
                self._marks = positions(max(sizes))
            multipliers = np.concatenate([self._marks[:0], *(self._marks[:size] for size in sizes)])
            host = (np.zeros(ends[-1], np.int64), multipliers, ends[:-1], ends[1:])
            if len(self._slots) > 8:  # batches of ever new lengths must not pile up
                self._slots.clear()
            slots, marks, first, last = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in host)
            self._slots[key] = slots, marks, first, last
        return self._slots[key]


def _mix(slots: Tensor, multipliers: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Wrapping sums, per segment, of each slot mixed with its position."""
    mixed = (slots + multipliers) * multipliers
    mixed ^= mixed >> 29
    mixed *= multipliers
    running = torch.zeros(len(slots) + 1, dtype=torch.int64, device=slots.device)
    torch.cumsum(mixed, 0, out=running[1:])
    return running[ends] - running[starts]
