"""Sketches of the weights and of the gradient of a step, by the projection that `geomprobe.trace.projection` defines.

Three ways, chosen by where the tensors are and what is installed:

- ``numba`` on a CPU where numba is installed: one loop over the memory, which lets other Python threads run.
- ``numpy`` on a CPU without it. Both give the same bits.
- ``torch`` elsewhere: packed blocks are turned by a gather and added by a sum, without atomic operations. The same
  input gives the same bits; they differ from the CPU's by the rounding of float64 sums.

`geomprobe.passes.sketching` calls this once at a step for the weights, and once for the gradient.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geomprobe.distributed.dtensor import is_dtensor, to_local
from geomprobe.errors import UnsupportedTraining
from geomprobe.trace import projection
from geomprobe.trace.projection import FACTORS, SEED, STEP

Way = Literal["numba", "numpy", "torch"]
Piece = tuple[int, Tensor]
"""The number of the first element, and values of consecutive elements, in one dimension of contiguous memory."""

CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 22
"""Elements that are converted, or packed, at a time."""


class Projector:
    """Projects vectors to ``size`` numbers each; ``way`` is one of the module's, chosen when None.

    >>> vector = torch.arange(6.0)
    >>> a, b = Projector(4, torch.device("cpu")), Projector(4, torch.device("cpu"), way="torch")
    >>> whole, pieces = [(0, vector)], [(0, vector[:3]), (3, vector[3:])]
    >>> torch.equal(a(whole), a(pieces)), torch.equal(a(whole), b(whole))
    (True, True)
    """

    def __init__(self, size: int, device: torch.device, seed: int = SEED, way: Way | None = None) -> None:
        self.size, self.seed, self._device = size, seed, device
        if way is None:
            on_cpu: Way = "numba" if importlib.util.find_spec("numba") else "numpy"
            way = on_cpu if device.type == "cpu" else "torch"
        self.way: Way = way
        self.chunk = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
        self._add: Callable[[Any, int, Any], None] = functools.partial(projection.add, seed=seed)
        if way == "numba":
            from geomprobe.kernels.numba_sketch import add

            self._add = functools.partial(add, keys=projection.keys(seed))
            self._add(np.empty(0, np.float32), 0, np.empty(size))  # compiles now, not within a training step

    @torch.no_grad()
    def __call__(self, pieces: Iterable[Piece]) -> Tensor:
        """The projection [size], float64 on the device, of a vector that is zero outside its pieces."""
        if self.way == "torch":
            return self._on_device(pieces)
        out = np.zeros(self.size)
        for start, values in pieces:
            for first, array in _arrays(start, values, self.chunk):
                self._add(array, first, out)
        return torch.from_numpy(out)

    def _on_device(self, pieces: Iterable[Piece]) -> Tensor:
        out = torch.zeros(self.size, dtype=torch.float64, device=self._device)
        for start, values in _packed(pieces, self.chunk):
            first = start // self.size
            blocks = -(-(start + len(values)) // self.size) - first
            padded = out.new_zeros(blocks * self.size)
            begin = start - first * self.size
            padded[begin : begin + len(values)] = values
            signs, turns = self._signs(first * self.size, len(padded)), self._turns(first, blocks)
            buckets = torch.arange(self.size, device=self._device)
            places = (buckets - turns.unsqueeze(1)) % self.size
            out += torch.where(signs, -padded, padded).view(blocks, self.size).gather(1, places).sum(0)
        return out

    def _signs(self, start: int, count: int) -> Tensor:
        first, end = start // 64, -(-(start + count) // 64)
        words = _words(projection.keys(self.seed)[0], first, end - first, self._device)
        bits = (words.unsqueeze(1) >> torch.arange(64, device=self._device)) & 1
        return bits.view(-1)[start - 64 * first :][:count].bool()

    def _turns(self, first: int, blocks: int) -> Tensor:
        words = _words(projection.keys(self.seed)[1], first, blocks, self._device)
        return (_shifted(words, 32) * self.size) >> 32


def numbered(
    tensors: Sequence[Tensor | None], parameters: Sequence[Any], owned: Sequence[bool] = ()
) -> Iterator[Piece]:
    """What this process has of a vector, in pieces, each with the number of its first element in the whole vector.

    Args:
        tensors: one a parameter, of its local shape: dense of any dtype and memory layout, sparse COO, or None for
            zero.
        parameters: the parameters in their order, each tensor once; their shapes give the numbers. A DTensor counts
            with its whole shape.
        owned: for each parameter, whether this process's values count; all when empty.

    Raises:
        UnsupportedTraining: a DTensor is sharded in more than one dimension.

    >>> w = [torch.zeros(2, 3), torch.ones(4)]
    >>> [(start, len(values)) for start, values in numbered(w, w)]
    [(0, 6), (6, 4)]
    """
    offset = 0
    for i, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
        if tensor is not None and (not owned or owned[i]):
            tensor = to_local(tensor).detach()
            if not is_dtensor(parameter):
                yield from _flat(tensor, offset)
            elif tensor.numel():
                yield from _of_shard(tensor, parameter, offset)
        offset += parameter.numel()


def _of_shard(tensor: Tensor, parameter: Any, offset: int) -> Iterator[Piece]:
    placed = [(mesh_dim, p) for mesh_dim, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not placed:
        yield from _flat(tensor, offset)
        return
    if len(placed) > 1 or not placed[0][1].is_shard():
        raise UnsupportedTraining(
            f"A DTensor placed as {parameter.placements} is cut in more than one way, so --sketch cannot number its "
            "elements. Record without --sketch."
        )
    (mesh_dim, placement), mesh = placed[0], parameter.device_mesh
    dim = placement.dim % parameter.dim()
    share = -(-parameter.shape[dim] // mesh.size(mesh_dim))  # as torch.chunk cuts
    row = math.prod(parameter.shape[dim + 1 :])
    begin = offset + mesh.get_coordinate()[mesh_dim] * share * row
    tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    for i, run in enumerate(tensor.flatten(0, dim - 1) if dim else tensor.unsqueeze(0)):
        yield from _flat(run, begin + i * parameter.shape[dim] * row)


def _flat(tensor: Tensor, start: int) -> Iterator[Piece]:
    """The values in the order of their numbers, in pieces that lie in memory in that order."""
    if tensor.layout != torch.strided:
        yield from _rows_of_sparse(tensor, start)
    elif tensor.is_contiguous():
        yield start, tensor.reshape(-1)
    else:
        for part in tensor.split(max(1, CPU_CHUNK * len(tensor) // tensor.numel())):
            yield start, part.contiguous().view(-1)
            start += part.numel()


def _rows_of_sparse(tensor: Tensor, start: int) -> Iterator[Piece]:
    """The rows that a sparse tensor has; all others are zero."""
    tensor = tensor.coalesce()
    values = tensor.values()
    shape = tensor.shape[: tensor.sparse_dim()]
    of_dims = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    rows = (tensor.indices() * tensor.indices().new_tensor(of_dims).unsqueeze(1)).sum(0)
    size = math.prod(values.shape[1:])
    for row, of_row in zip(rows.tolist(), values.reshape(len(rows), size), strict=True):
        yield start + row * size, of_row.contiguous()


def _arrays(start: int, values: Tensor, limit: int) -> Iterator[tuple[int, Any]]:
    """Values as numpy has them; those of 16 bits are converted, ``limit`` elements at a time."""
    if values.dtype in (torch.float32, torch.float64):
        yield start, values.numpy()
        return
    for part in values.split(limit):
        yield start, part.float().numpy()
        start += len(part)


def _packed(pieces: Iterable[Piece], limit: int) -> Iterator[Piece]:
    """Pieces whose numbers are consecutive as one, in float64, of at most ``limit`` elements."""
    begin, count = 0, 0
    waiting: list[Tensor] = []
    for start, values in pieces:
        for piece in values.split(limit):
            if waiting and (start != begin + count or count + len(piece) > limit):
                yield begin, torch.cat(waiting)
                waiting, count = [], 0
            if not waiting:
                begin = start
            waiting.append(piece.double())
            count += len(piece)
            start += len(piece)
    if waiting:
        yield begin, torch.cat(waiting)


def _signed(word: int) -> int:
    """An unsigned 64-bit number as torch has it."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, places: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's own keeps the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _words(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """`projection.words`, as int64 with the same bits."""
    z = torch.arange(start + 1, start + count + 1, device=device) * _signed(STEP) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(FACTORS[1])
    return z ^ _shifted(z, 31)
