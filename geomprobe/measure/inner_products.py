"""Inner products of w, g and d = w - w*: float64 sums in one read of memory, left on the device.

At a training step there are the parameters ``w``, their gradients ``g`` and one or several references
``w*``. All of NWT section 3 follows from ``g.g``, ``g.d`` and ``d.d`` (see :mod:`geomprobe.trace.geometry`);
``w.g``, ``w.w`` and ``w.d`` give the same of the weight-decayed gradient ``g + lambda w``.

Every product is formed and summed in float64: the difference of two float32 numbers within a factor 2^29
of one another is exact there, and so is the product of any two. Float32 does not do. Sums of products of
either sign lose what cancels (dots of 2^18 elements lost 4e-6 of ResNet-18's ``w.g`` and ``w.d``), and
rounding ``d`` alone can cost ``g.d`` up to ``6e-8 / cosine``.

Two ways, with the same sums up to float64 rounding:

- eager: the tensors pass in pieces through a scratch of three float64 rows (6 MiB on a CPU, 24 MiB on a GPU,
  less for a smaller model). The copy converts any dtype, lines up any memory layout, packs small tensors.
- compiled: ``torch.compile`` builds one loop that reads a large tensor where it lies; small ones are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import is_dtensor, local, local_gradient
from geomprobe.errors import GeomprobeError
from geomprobe.measure.input_checks import require_gradients, require_parameters, require_reference

SHARED = ("g.g", "w.g", "w.w")
OF_REFERENCE = ("g.d", "w.d", "d.d")

# Large enough that launching ten operations a block is a small share of their time, small enough for the
# last-level cache, where they find the block again.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**20

# A smaller tensor costs more in a compiled call of its own than packed with others.
FUSED_MINIMUM = 2**15


class InnerProducts:
    """The sums ``g.g, w.g, w.w`` and, for each reference w*, ``g.d, w.d, d.d`` with ``d = w - w*``.

    Measuring changes nothing of the run: no weight, gradient, autograd graph or random state. It never
    waits for the device, and allocates no temporary of the model's size. (Two exceptions: a sparse gradient
    is coalesced, which waits on CUDA; the compiled way copies a large gradient whose memory layout is not
    its weight's.) The same input gives the same bits, for one build of torch and one thread count.

    Args:
        parameters: the weights w, dense, of any real dtype, shape and memory layout, all on one device.
            They are read anew at each measurement. Tied weights must appear once. Of DTensors the local values
            count, and so do those of references and gradients: see :class:`geomprobe.distributed.layout.Layout`, whose
            ``sum`` makes the whole of every process's part.
        references: the points w* by name, each with one tensor a parameter, of its shape and on its device,
            as a DTensor or as local values. Any dtype and layout; the parameter's own layout
            (``torch.empty_like``) is the fastest.
        owned: for each parameter, whether its values count here; where one does not, its sums are zero.
        per_parameter: also give the sums of each parameter tensor.
        compiled: read large tensors with a kernel that ``torch.compile`` builds here and now, for the dtypes
            of the parameters and references (some 10 s, once a process). Needs a C++ compiler; Triton on CUDA.

    Attributes:
        names: what the columns of a measurement are: ``("g.g", "w.g", "w.w")``; then
            ``("g.d", "w.d", "d.d")`` of the reference named ``"final"``, if there is one; then, for every
            other reference NAME in the mapping's order, ``"references/NAME/inner_products/g.d"``, ``.../w.d``
            and ``.../d.d``.

    Raises:
        UsageError: no parameters, or a reference that does not match them in number, shape or device.
        UnsupportedTraining: a parameter that is complex, integer or not dense, or several devices.
        GeomprobeError: ``compiled`` was asked for, and ``torch.compile`` does not work here.

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
        owned: Sequence[bool] | None = None,
        per_parameter: bool = False,
        compiled: bool = False,
    ) -> None:
        require_parameters(parameters)
        self._distributed = any(is_dtensor(parameter) for parameter in parameters)
        references = {name: [local(tensor) for tensor in reference] for name, reference in references.items()}
        for name, reference in references.items():
            require_reference(name, reference, [local(parameter) for parameter in parameters])
        ordered = sorted(references, key=lambda name: name != "final")
        prefixes = ["" if name == "final" else f"references/{name}/inner_products/" for name in ordered]
        self.names = SHARED + tuple(prefix + column for prefix in prefixes for column in OF_REFERENCE)

        device = parameters[0].device
        powers = [2.0, 1.0, 0.0] + [1.0, 0.0, 0.0] * len(ordered)
        self._gradient_powers = torch.tensor(powers, dtype=torch.float64, device=device)
        points = zip(parameters, *(references[name] for name in ordered), strict=True)
        self._weights = [_Weight(index, w, stars, compiled) for index, (w, *stars) in enumerate(points)]
        packed = sum(weight.w.numel() for weight in self._weights if not weight.fused)
        block = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
        self._scratch = torch.empty(3, min(block, packed), dtype=torch.float64, device=device)
        self._per_parameter = per_parameter
        counted = [[w] if here else [] for w, here in zip(self._weights, owned or repeat(True), strict=False)]
        groups = counted if per_parameter else [list(chain.from_iterable(counted))]
        self._groups = [_Group(weights, self._scratch, self._gradient_powers > 0) for weights in groups]
        _build_kernel([weight for weight in self._weights if weight.fused], device)

    @property
    def scratch_bytes(self) -> int:
        """Memory held for packing, in bytes.

        >>> InnerProducts([torch.ones(10)], {}).scratch_bytes
        240
        """
        return self._scratch.numel() * self._scratch.element_size()

    @torch.no_grad()
    def measure(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | float | None = None) -> Tensor:
        """The sums at the parameters' present values, in the order of :attr:`names`.

        Args:
            gradients: one a parameter, of its shape: dense of any dtype and layout, sparse COO, or ``None``
                for zero.
            grad_scale: what the gradients were multiplied by (a GradScaler's scale, which fused optimizers
                divide by themselves). The sums are those of ``g / grad_scale``.

        Returns:
            float64 on the parameters' device: ``[names]``, or with ``per_parameter``
            ``[1 + parameters, names]``, whose row 0 is the total. Infinities and NaN come through.

        Raises:
            UnsupportedTraining: a parameter changed its shape, or a gradient does not match its parameter.

        >>> products = InnerProducts([torch.ones(2), torch.ones(3)], {}, per_parameter=True)
        >>> products.measure([torch.full((2,), 8.0), None], grad_scale=4.0)
        tensor([[8., 4., 5.],
                [8., 4., 2.],
                [0., 0., 3.]], dtype=torch.float64)
        """
        if self._distributed:
            pairs = zip(gradients, self._weights, strict=True)
            gradients = [local_gradient(gradient, weight.parameter) for gradient, weight in pairs]
        require_gradients([w.w for w in self._weights], [w.shape for w in self._weights], gradients)
        sums = torch.stack([group.sums(gradients) for group in self._groups])
        sums = torch.cat([sums.sum(0, keepdim=True), sums]) if self._per_parameter else sums[0]
        scale = grad_scale.double() if isinstance(grad_scale, Tensor) else grad_scale
        return sums if scale is None else sums / scale**self._gradient_powers


class _Weight:
    """A parameter and its references. Tensors of its shape are read in the order of its memory."""

    def __init__(self, index: int, parameter: Tensor, references: Sequence[Tensor], compiled: bool) -> None:
        self.index, self.parameter, self.references = index, parameter, references
        self._distributed = is_dtensor(parameter)
        w = self.w
        self.shape, order = w.shape, w.dim_order()
        self._order = None if order == tuple(range(w.dim())) else order
        flat = (self.in_order(tensor).is_contiguous() for tensor in (w, *references))
        self.fused = compiled and w.numel() >= FUSED_MINIMUM and all(flat)

    @property
    def w(self) -> Tensor:
        return local(self.parameter) if self._distributed else self.parameter

    def in_order(self, tensor: Tensor) -> Tensor:
        return tensor if self._order is None else tensor.permute(self._order)

    def flat(self, tensor: Tensor) -> Tensor:
        # Detached: of a view, torch.compile would build a kernel for each shape of its base.
        return self.in_order(tensor).reshape(-1).detach()


class _Group:
    """Weights that are summed together, each in the way that suits it."""

    def __init__(self, weights: Sequence[_Weight], scratch: Tensor, of_gradient: Tensor) -> None:
        self._weights, self._of_gradient = weights, of_gradient
        packed = [weight for weight in weights if not weight.fused]
        fused = (_Fused(weight, of_gradient) for weight in weights if weight.fused)
        # Packing first: the large tensors sweep all that it needs out of the caches.
        self._ways: list[_Fused | _Packed] = [*([_Packed(packed, scratch)] if packed else []), *fused]

    def sums(self, gradients: Sequence[Tensor | None]) -> Tensor:
        terms = [way.sums(gradients) for way in self._ways]
        for weight in self._weights:
            gradient = gradients[weight.index]
            if gradient is not None and gradient.is_sparse:
                terms.append(torch.where(self._of_gradient, _stored_sums(weight, gradient.coalesce()), 0.0))
        return (
            torch.stack(terms).sum(0) if terms else torch.zeros_like(self._of_gradient, dtype=torch.float64)
        )


class _Fused:
    """One large weight, read where it lies by the compiled kernel."""

    def __init__(self, weight: _Weight, of_gradient: Tensor) -> None:
        self._weight, self._of_gradient = weight, of_gradient
        self._references = [weight.flat(reference) for reference in weight.references]

    def sums(self, gradients: Sequence[Tensor | None]) -> Tensor:
        weight, gradient = self._weight, gradients[self._weight.index]
        w = weight.flat(weight.w)
        if gradient is not None and not gradient.is_sparse:
            return _kernel()(weight.flat(gradient), w, *self._references)
        # Any gradient will do for the sums that have none in them.
        return torch.where(self._of_gradient, 0.0, _kernel()(weight.flat(weight.w), w, *self._references))


@dataclass(frozen=True)
class _Row:
    """A row of the scratch, as far as it is filled, and the places in it for the pieces that fill it."""

    flat: Tensor
    places: list[Tensor]

    def fill(self, pieces: Iterator[Tensor]) -> None:
        torch._foreach_copy_(self.places, list(islice(pieces, len(self.places))))


class _Packed:
    """Several weights, in pieces, block by block through the scratch."""

    def __init__(self, weights: Sequence[_Weight], scratch: Tensor) -> None:
        self._weights = weights
        self._limit = scratch.shape[1]
        self._zero = scratch.new_zeros(())
        shapes = [piece.shape for piece in self._pieces(weight.w for weight in weights)]
        self._blocks = list(_lay_out(shapes, scratch))

    def sums(self, gradients: Sequence[Tensor | None]) -> Tensor:
        g_pieces = self._pieces(self._dense(gradients[weight.index], weight) for weight in self._weights)
        w_pieces = self._pieces(weight.w for weight in self._weights)
        stars = zip(*(weight.references for weight in self._weights), strict=True)
        star_pieces = [self._pieces(reference) for reference in stars]
        sums: list[Tensor] = []
        for g, w, d in self._blocks:
            g.fill(g_pieces)
            w.fill(w_pieces)
            sums += (torch.dot(g.flat, g.flat), torch.dot(w.flat, g.flat), torch.dot(w.flat, w.flat))
            for pieces in star_pieces:
                d.fill(pieces)
                torch.sub(w.flat, d.flat, out=d.flat)
                sums += (torch.dot(g.flat, d.flat), torch.dot(w.flat, d.flat), torch.dot(d.flat, d.flat))
        return torch.stack(sums).view(len(self._blocks), -1).sum(0)

    def _dense(self, gradient: Tensor | None, weight: _Weight) -> Tensor:
        return self._zero.expand(weight.shape) if gradient is None or gradient.is_sparse else gradient

    def _pieces(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        for weight, tensor in zip(self._weights, tensors, strict=True):
            yield from _split(weight.in_order(tensor), self._limit)


def _split(tensor: Tensor, limit: int) -> Iterable[Tensor]:
    """Views of at most ``limit`` elements, cut at the same places for every tensor of this shape."""
    if tensor.numel() <= limit:
        return (tensor,)
    rows = limit * tensor.shape[0] // tensor.numel()
    if rows:
        return tensor.split(rows)
    return (piece for row in tensor.unbind() for piece in _split(row, limit))


def _lay_out(shapes: list[torch.Size], scratch: Tensor) -> Iterator[list[_Row]]:
    """The scratch's rows g, w, d with places for as many pieces as fit, in order; again until all had one."""
    start = used = 0
    for end in range(1, len(shapes) + 1):
        used += shapes[end - 1].numel()
        if end == len(shapes) or used + shapes[end].numel() > scratch.shape[1]:
            yield [_row(row[:used], shapes[start:end]) for row in scratch]
            start, used = end, 0


def _row(flat: Tensor, shapes: list[torch.Size]) -> _Row:
    parts = flat.split([shape.numel() for shape in shapes])
    return _Row(flat, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)])


def _inner_products(g: Tensor, w: Tensor, *references: Tensor) -> Tensor:
    g, w = g.double(), w.double()
    sums = [(g * g).sum(), (w * g).sum(), (w * w).sum()]
    for reference in references:
        d = w - reference.double()
        sums += [(g * d).sum(), (w * d).sum(), (d * d).sum()]
    return torch.stack(sums)


def _stored_sums(weight: _Weight, gradient: Tensor) -> Tensor:
    """The sums over the elements that a coalesced sparse gradient stores."""
    positions, values = gradient.indices(), gradient.values()
    rows = max(1, CPU_BLOCK * values.shape[0] // max(1, values.numel()))
    terms = []
    for position, value in zip(positions.split(rows, 1), values.split(rows), strict=True):
        at = tuple(position)
        terms.append(_inner_products(value, weight.w[at], *(star[at] for star in weight.references)))
    return torch.stack(terms).sum(0)


@cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(_inner_products, dynamic=True, fullgraph=True)


def _build_kernel(weights: Iterable[_Weight], device: torch.device) -> None:
    """Compile for gradients of the weights' dtype now, not within a training step."""
    try:
        for dtypes in {(weight.w.dtype, *(star.dtype for star in weight.references)) for weight in weights}:
            w, *references = (torch.zeros(FUSED_MINIMUM, dtype=dtype, device=device) for dtype in dtypes)
            with torch.no_grad():
                _kernel()(torch.zeros_like(w), w, *references)
    except Exception as error:
        raise GeomprobeError(
            f"torch.compile could not build the kernel of the inner products: {error}. "
            "Install a C++ compiler (Triton on CUDA), or measure with compiled=False."
        ) from error
