"""Inner products of w, g and d = w - w*: float64 sums in one read of memory, left on the device.

At a training step the probe has the parameters ``w``, their gradients ``g`` and one or several references
``w*``. Everything that NWT section 3 defines follows from ``g.g``, ``g.d`` and ``d.d`` (see
:mod:`geomprobe.geometry`); ``w.g``, ``w.w`` and ``w.d`` give the same of the weight-decayed gradient
``g + lambda w``.

Every product is formed and summed in float64. Float32 does not do: over 11.7 M elements its sums of
products of either sign (``w.g``, ``w.d``) were off by 4e-6, and the subtraction alone costs ``g.d`` up to
``6e-8 / cosine``. ``w - w*`` of two float32, bfloat16 or float16 numbers within 2^29 of one another in
size is exact in float64, and so is each product of two such numbers.

Two ways, the same sums up to float64 rounding:

- eager: the tensors pass in pieces through a scratch of three float64 rows (6 MiB on a CPU, 24 MiB on
  another device, less for smaller models), which converts any dtype, lines up any memory layout, and packs
  small tensors together;
- compiled: ``torch.compile`` reads each large tensor where it lies, in one fused loop. Small ones still
  go through the scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from geomprobe.errors import GeomprobeError, UnsupportedTraining, UsageError

__all__ = ["InnerProducts"]

SHARED = ("g.g", "w.g", "w.w")
OF_REFERENCE = ("g.d", "w.d", "d.d")

# Large enough that launching ten operations a block is a small share of their time, small enough for the
# last-level cache, where the block is read again (scripts/bench_inner_products.py).
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**20

# Below this a compiled call costs more than packing the tensor with others.
FUSED_MINIMUM = 2**16


class InnerProducts:
    """The sums ``g.g, w.g, w.w`` and, for each reference w*, ``g.d, w.d, d.d`` with ``d = w - w*``.

    Measuring changes nothing of the run: no weight, gradient, autograd graph or random state. It never
    waits for the device, and allocates no temporary of the model's size (exceptions: a sparse gradient is
    coalesced, which waits on CUDA; a large gradient whose memory layout differs from its weight's is
    copied by the compiled way). The same input gives the same bits, for one thread count and build of torch.

    Args:
        parameters: the weights w, any shapes, real floating dtypes and layouts, all on one device. They are
            read anew at each measurement. Tied weights must appear once.
        references: the points w* by name, each with one tensor a parameter, of its shape and on its device.
        per_parameter: also give the sums of each parameter tensor.
        compiled: fuse the sums over large tensors with ``torch.compile``, at once for the dtypes of the
            parameters (some 10 s the first time). Needs a C++ compiler, on CUDA Triton.

    Attributes:
        names: what the columns of a measurement are. ``("g.g", "w.g", "w.w")`` first; then
            ``("g.d", "w.d", "d.d")`` of the reference named ``"final"``, if there is one; then, for every
            other reference in the mapping's order, ``"references/NAME/inner_products/g.d"``, ``.../w.d`` and
            ``.../d.d``.

    Raises:
        UsageError: no parameters, or a reference that does not match them in number, shape or device.
        UnsupportedTraining: a parameter that is complex, integer or not dense, or several devices.
        GeomprobeError: ``compiled=True`` and ``torch.compile`` does not work here.

    >>> w, w_final, g = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
    >>> products = InnerProducts([w], {"final": [w_final]})
    >>> dict(zip(products.names, products.measure([g]).tolist()))
    {'g.g': 25.0, 'w.g': 11.0, 'w.w': 5.0, 'g.d': 8.0, 'w.d': 4.0, 'd.d': 4.0}
    """

    names: tuple[str, ...]

    def __init__(
        self,
        parameters: Sequence[Tensor],
        references: Mapping[str, Sequence[Tensor]],
        *,
        per_parameter: bool = False,
        compiled: bool = False,
    ) -> None:
        self._parameters = tuple(parameters)
        _check_parameters(self._parameters)
        for name, reference in references.items():
            _check_reference(name, reference, self._parameters)
        ordered = sorted(references, key=lambda name: name != "final")
        self.names = SHARED + tuple(column for name in ordered for column in _reference_columns(name))
        self._references = [tuple(references[name]) for name in ordered]
        self._per_parameter = per_parameter
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._orders = [_memory_order(parameter) for parameter in self._parameters]

        device = self._parameters[0].device
        powers = [name.rpartition("/")[2].count("g") for name in self.names]
        self._gradient_powers = torch.tensor(powers, dtype=torch.float64, device=device)
        self._of_gradient = self._gradient_powers > 0
        self._zero = torch.zeros((), dtype=torch.float64, device=device)

        fused = [compiled and parameter.numel() >= FUSED_MINIMUM for parameter in self._parameters]
        packed = sum(size.numel() for size, whole in zip(self._shapes, fused, strict=True) if not whole)
        block = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
        self._scratch = torch.empty(3, min(block, packed), dtype=torch.float64, device=device)
        everything = range(len(self._parameters))
        members = [[index] for index in everything] if per_parameter else [list(everything)]
        self._groups = [self._plan(indices, fused) for indices in members]
        if any(fused):
            self._compile(fused)

    @property
    def scratch_bytes(self) -> int:
        """Memory held for packing, in bytes; nothing else of any size is allocated.

        >>> InnerProducts([torch.ones(10)], {}).scratch_bytes
        240
        """
        return self._scratch.numel() * self._scratch.element_size()

    @torch.no_grad()
    def measure(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | float | None = None) -> Tensor:
        """The sums at the parameters' present values, in the order of :attr:`names`.

        Args:
            gradients: one a parameter, of its shape; strided of any layout and dtype, or sparse COO.
                ``None`` counts as zero.
            grad_scale: what the gradients were multiplied by (a GradScaler's scale, which fused optimizers
                take care of themselves). The sums are those of ``g / grad_scale``.

        Returns:
            float64 on the parameters' device: ``[names]``, or with ``per_parameter``
            ``[1 + parameters, names]``, whose row 0 is the total. Values that are not finite come out as the
            arithmetic makes them.

        Raises:
            UnsupportedTraining: a parameter changed its shape, or a gradient does not match its parameter.

        >>> products = InnerProducts([torch.ones(2), torch.ones(3)], {}, per_parameter=True)
        >>> products.measure([torch.full((2,), 8.0), None], grad_scale=4.0)
        tensor([[8., 4., 5.],
                [8., 4., 2.],
                [0., 0., 3.]], dtype=torch.float64)
        """
        self._check_gradients(gradients)
        sums = torch.stack([self._sums(group, gradients) for group in self._groups])
        if self._per_parameter:
            sums = torch.cat([sums.sum(0, keepdim=True), sums])
        else:
            sums = sums[0]
        if grad_scale is None:
            return sums
        scale = grad_scale.double() if isinstance(grad_scale, Tensor) else grad_scale
        return sums / scale**self._gradient_powers

    def _sums(self, group: _Group, gradients: Sequence[Tensor | None]) -> Tensor:
        terms = [self._fused_sums(index, gradients[index]) for index in group.fused]
        if group.blocks:
            terms.append(self._packed_sums(group, gradients))
        for index in group.members:
            gradient = gradients[index]
            if gradient is not None and gradient.is_sparse:
                terms.extend(self._sparse_sums(index, gradient))
        return torch.stack(terms).sum(0)

    def _packed_sums(self, group: _Group, gradients: Sequence[Tensor | None]) -> Tensor:
        dense = [
            self._zero.expand(shape) if gradient is None or gradient.is_sparse else gradient
            for shape, gradient in zip(self._shapes, gradients, strict=True)
        ]
        g_pieces = self._pieces(group.packed, dense)
        w_pieces = self._pieces(group.packed, self._parameters)
        reference_pieces = [self._pieces(group.packed, reference) for reference in self._references]
        sums: list[Tensor] = []
        for block in group.blocks:
            g, w, d = block.rows
            _fill(block.g, g_pieces)
            _fill(block.w, w_pieces)
            sums += (torch.dot(g, g), torch.dot(w, g), torch.dot(w, w))
            for pieces in reference_pieces:
                _fill(block.d, pieces)
                torch.sub(w, d, out=d)
                sums += (torch.dot(g, d), torch.dot(w, d), torch.dot(d, d))
        return torch.stack(sums).view(len(group.blocks), len(self.names)).sum(0)

    def _fused_sums(self, index: int, gradient: Tensor | None) -> Tensor:
        tensors = [self._flat(index, tensors[index]) for tensors in (self._parameters, *self._references)]
        if gradient is not None and not gradient.is_sparse:
            return _fused()(self._flat(index, gradient), *tensors)
        # Any gradient will do for the sums that have none in them.
        sums = _fused()(self._flat(index, self._parameters[index]), *tensors)
        return torch.where(self._of_gradient, self._zero, sums)

    def _sparse_sums(self, index: int, gradient: Tensor) -> Iterator[Tensor]:
        """What the stored rows of a sparse gradient add to the sums that have a gradient in them."""
        gradient = gradient.coalesce()
        positions, values = gradient.indices(), gradient.values()
        rows = max(1, CPU_BLOCK * values.shape[0] // max(1, values.numel()))
        for position, value in zip(positions.split(rows, 1), values.split(rows), strict=True):
            at = tuple(position)
            w, *references = (tensors[index][at] for tensors in (self._parameters, *self._references))
            yield torch.where(self._of_gradient, _inner_products(value, w, *references), self._zero)

    def _flat(self, index: int, tensor: Tensor) -> Tensor:
        return _by_memory(tensor, self._orders[index]).reshape(-1)

    def _pieces(self, indices: Iterable[int], tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        limit = self._scratch.shape[1]
        for index in indices:
            yield from _split(_by_memory(tensors[index], self._orders[index]), limit)

    def _plan(self, members: list[int], fused: Sequence[bool]) -> _Group:
        packed = [index for index in members if not fused[index]]
        pieces = self._pieces(packed, self._parameters)
        blocks = list(_lay_out([piece.shape for piece in pieces], self._scratch))
        return _Group(members, [index for index in members if fused[index]], packed, blocks)

    @torch.no_grad()
    def _compile(self, fused: Sequence[bool]) -> None:
        dtypes = {
            tuple(tensors[index].dtype for tensors in (self._parameters, *self._references))
            for index, whole in enumerate(fused)
            if whole
        }
        try:
            for w_dtype, *reference_dtypes in dtypes:
                zeros = [self._zero.new_zeros(FUSED_MINIMUM, dtype=d) for d in (w_dtype, *reference_dtypes)]
                _fused()(torch.zeros_like(zeros[0]), *zeros)
        except Exception as error:
            raise GeomprobeError(
                f"torch.compile could not build the fused inner products for {self._zero.device}: {error}. "
                "Install a C++ compiler (Triton on CUDA), or measure with compiled=False."
            ) from error

    def _check_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        if len(gradients) != len(self._parameters):
            raise UnsupportedTraining(
                f"{len(gradients)} gradients for {len(self._parameters)} parameters. "
                "Give one a parameter, None where there is none."
            )
        for index, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            shape = self._shapes[index]
            if parameter.shape != shape:
                raise UnsupportedTraining(
                    f"parameter {index} changed its shape from {tuple(shape)} to {tuple(parameter.shape)} "
                    "during training: its distance to the references is undefined. Keep the shapes fixed."
                )
            if gradient is None:
                continue
            if gradient.shape != shape or gradient.layout not in (torch.strided, torch.sparse_coo):
                raise UnsupportedTraining(
                    f"the gradient of parameter {index} is {gradient.layout} of shape "
                    f"{tuple(gradient.shape)}; the parameter has shape {tuple(shape)}. "
                    "Give a dense or sparse COO gradient of the parameter's shape."
                )


@dataclass(frozen=True)
class _Block:
    """A stretch of the scratch: its rows g, w, d, and each row's places for the pieces that fill it."""

    rows: tuple[Tensor, Tensor, Tensor]
    g: list[Tensor]
    w: list[Tensor]
    d: list[Tensor]


@dataclass(frozen=True)
class _Group:
    """The parameters that are summed together, by index, and the way of each."""

    members: list[int]
    fused: list[int]
    packed: list[int]
    blocks: list[_Block]


def _inner_products(g: Tensor, w: Tensor, *references: Tensor) -> Tensor:
    g, w = g.double(), w.double()
    sums = [(g * g).sum(), (w * g).sum(), (w * w).sum()]
    for reference in references:
        d = w - reference.double()
        sums += [(g * d).sum(), (w * d).sum(), (d * d).sum()]
    return torch.stack(sums)


@cache
def _fused() -> Callable[..., Tensor]:
    return torch.compile(_inner_products, dynamic=True, fullgraph=True)


def _reference_columns(name: str) -> tuple[str, ...]:
    if name == "final":
        return OF_REFERENCE
    return tuple(f"references/{name}/inner_products/{column}" for column in OF_REFERENCE)


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the slowest in memory to the fastest; None if that is how they stand."""
    order = sorted(range(tensor.dim()), key=lambda dimension: -int(tensor.stride(dimension)))
    return None if order == list(range(tensor.dim())) else order


def _by_memory(tensor: Tensor, order: list[int] | None) -> Tensor:
    return tensor if order is None else tensor.permute(order)


def _split(tensor: Tensor, limit: int) -> Iterable[Tensor]:
    """Pieces of at most ``limit`` elements: views, and the same ones for every tensor of this shape."""
    if tensor.numel() <= limit:
        return (tensor,)
    rows = limit * tensor.shape[0] // tensor.numel()
    if rows:
        return tensor.split(rows)
    return (piece for row in tensor.unbind() for piece in _split(row, limit))


def _lay_out(shapes: Sequence[torch.Size], scratch: Tensor) -> Iterator[_Block]:
    """Places for pieces of these shapes, in order, block after block."""
    start = 0
    while start < len(shapes):
        places, used = [], 0
        while start < len(shapes) and used + shapes[start].numel() <= scratch.shape[1]:
            size = shapes[start].numel()
            places.append([row[used : used + size].view(shapes[start]) for row in scratch])
            start, used = start + 1, used + size
        g, w, d = ([place[row] for place in places] for row in range(3))
        yield _Block((scratch[0, :used], scratch[1, :used], scratch[2, :used]), g, w, d)


def _fill(places: list[Tensor], pieces: Iterator[Tensor]) -> None:
    torch._foreach_copy_(places, list(islice(pieces, len(places))))


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise UsageError("there are no parameters to measure. Attach to a model that has some.")
    for index, parameter in enumerate(parameters):
        if not parameter.is_floating_point() or parameter.layout is not torch.strided:
            raise UnsupportedTraining(
                f"parameter {index} is {parameter.dtype}, {parameter.layout}: inner products are defined here "
                "for dense real parameters. Hold it as real tensors (torch.view_as_real)."
            )
        if parameter.device != parameters[0].device:
            raise UnsupportedTraining(
                f"parameter {index} is on {parameter.device}, parameter 0 on {parameters[0].device}: "
                "one process measures one device. Train on a single device, or one process a device."
            )


def _check_reference(name: str, reference: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    if len(reference) != len(parameters):
        raise UsageError(
            f"reference {name!r} has {len(reference)} tensors for {len(parameters)} parameters. "
            "Give one a parameter, in the same order."
        )
    for index, (point, parameter) in enumerate(zip(reference, parameters, strict=True)):
        if point.shape != parameter.shape or point.device != parameter.device:
            raise UsageError(
                f"reference {name!r}, tensor {index}, has shape {tuple(point.shape)} on {point.device}; "
                f"the parameter has shape {tuple(parameter.shape)} on {parameter.device}. "
                "Load the reference for this model, onto its device."
            )
