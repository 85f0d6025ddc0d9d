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
from itertools import chain, zip_longest

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import is_dtensor, local, local_gradient
from geomprobe.errors import GeomprobeError, UnsupportedTraining, UsageError

SHARED = ("g.g", "w.g", "w.w")
OF_REFERENCE = ("g.d", "w.d", "d.d")
LAYOUTS = (torch.strided, torch.sparse_coo)  # of a gradient

Vectors = Sequence[Tensor | None]

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
            Their values are read at each measurement. Tied weights must appear once. Of DTensors the local values
            count, and so do those of references and gradients: see :class:`geomprobe.distributed.layout.Layout`, whose
            ``sum`` makes the whole of every process's part.
        references: the points w* by name, each with one tensor a parameter, of its shape and on its device,
            as a DTensor or as local values. Any dtype and layout; the parameter's own layout
            (``torch.empty_like``) is the fastest.
        owned: for each parameter, whether its values count here; where one does not, its sums are zero.
        per_parameter: also give the sums of each parameter tensor.
        compiled: read large tensors with a kernel that ``torch.compile`` builds here and now, for the dtypes
            of the parameters and references (some 10 s, once a process). Needs a C++ compiler; Triton on CUDA.
        only: the names of the sums to give, of those below; all of them when None.

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
        only: Sequence[str] | None = None,
    ) -> None:
        _require_parameters(parameters)
        self._parameters = list(parameters)
        self._distributed = any(is_dtensor(parameter) for parameter in parameters)
        weights = [local(parameter) for parameter in parameters]
        references = {name: [local(tensor) for tensor in reference] for name, reference in references.items()}
        for name, reference in references.items():
            _require_reference(name, reference, weights)
        ordered = sorted(references, key=lambda name: name != "final")
        prefixes = ["" if name == "final" else f"references/{name}/inner_products/" for name in ordered]
        names = SHARED + tuple(prefix + column for prefix in prefixes for column in OF_REFERENCE)
        self.names = names if only is None else tuple(only)
        self._chosen = None if only is None else [names.index(name) for name in only]

        device = weights[0].device
        powers = [2.0, 1.0, 0.0] + [1.0, 0.0, 0.0] * len(ordered)
        self._gradient_powers = torch.tensor(powers, dtype=torch.float64, device=device)
        self._shapes = [w.shape for w in weights]
        stars = list(zip(*(references[name] for name in ordered), strict=True)) or [()] * len(weights)
        fused = [compiled and _can_fuse(w, *of_w) for w, of_w in zip(weights, stars, strict=True)]
        packed = sum(w.numel() for w, in_place in zip(weights, fused, strict=True) if not in_place)
        self._scratch = _scratch(3, packed, device)
        self._per_parameter = per_parameter
        counted = [[i] if not owned or owned[i] else [] for i in range(len(weights))]
        members = counted if per_parameter else [list(chain.from_iterable(counted))]
        of_gradient = self._gradient_powers > 0
        self._groups = [_Group(group, weights, stars, fused, self._scratch, of_gradient) for group in members]
        _build_kernel([(weights[i], *stars[i]) for i, in_place in enumerate(fused) if in_place], device)

    @property
    def scratch_bytes(self) -> int:
        """Memory held for packing, in bytes."""
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
        """
        weights: Sequence[Tensor] = self._parameters
        if self._distributed:
            pairs = zip(gradients, self._parameters, strict=True)
            gradients = [local_gradient(gradient, parameter) for gradient, parameter in pairs]
            weights = [local(parameter) for parameter in self._parameters]
        _require_gradients(weights, self._shapes, gradients)
        sums = torch.stack([group.sums(weights, gradients) for group in self._groups])
        sums = torch.cat([sums.sum(0, keepdim=True), sums]) if self._per_parameter else sums[0]
        scale = grad_scale.double() if isinstance(grad_scale, Tensor) else grad_scale
        sums = sums if scale is None else sums / scale**self._gradient_powers
        return sums if self._chosen is None else sums[..., self._chosen]


@torch.no_grad()
def dots(
    pairs: Sequence[tuple[Vectors, Vectors]], owned: Sequence[bool] = (), *, per_parameter: bool = False
) -> Tensor:
    """This process's part of ``a . b`` of each of some pairs of vectors, float64, in one read of each vector.

    A vector is a list of dense tensors, one a parameter; None stands for zero. The second vector of
    the last pair has no None: all are read in the order of its memory.

    Args:
        pairs: the vectors ``(a, b)``.
        owned: for each parameter, whether its values count here; all of them by default.
        per_parameter: also give the products of each parameter's tensors.

    Returns:
        ``[pairs]``, or with ``per_parameter`` ``[1 + parameters, pairs]``, whose row 0 is the total.

    >>> g, hg = [torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 4.0]), torch.ones(1)]
    >>> dots([(g, hg), (hg, hg)])
    tensor([11., 26.], dtype=torch.float64)
    """
    like: list[Tensor] = [tensor for tensor in pairs[-1][1] if tensor is not None]
    vectors = list({id(vector): vector for pair in pairs for vector in pair}.values())
    rows = {id(vector): row for row, vector in enumerate(vectors)}
    chosen = [(rows[id(a)], rows[id(b)]) for a, b in pairs]
    counted = [i for i in range(len(like)) if not owned or owned[i]]
    scratch = _scratch(len(vectors), sum(map(Tensor.numel, like)), like[0].device)
    missing = scratch.new_zeros(len(pairs))
    found = []
    for group in [[i] for i in range(len(like))] if per_parameter else [counted]:
        members = [i for i in group if i in counted]
        if not members:
            found.append(missing)
            continue
        packing = _Packing([like[i] for i in members], scratch)
        pieces = [packing.pieces([vector[i] for i in members]) for vector in vectors]
        sums: list[Tensor] = []
        for block in packing.blocks:
            for row, of_vector in enumerate(pieces):
                block.fill(row, of_vector)
            sums += [torch.dot(block.rows[a], block.rows[b]) for a, b in chosen]
        found.append(torch.stack(sums).view(-1, len(pairs)).sum(0))
    products = torch.stack(found)
    return torch.cat([products.sum(0, keepdim=True), products]) if per_parameter else products[0]


class _Group:
    """Weights that are summed together: small ones packed, large ones where they lie where that is compiled."""

    def __init__(
        self,
        members: Sequence[int],
        weights: Sequence[Tensor],
        references: Sequence[Sequence[Tensor]],
        fused: Sequence[bool],
        scratch: Tensor,
        of_gradient: Tensor,
    ) -> None:
        self._members, self._references, self._of_gradient = members, references, of_gradient
        self._packed = [i for i in members if not fused[i]]
        self._fused = [i for i in members if fused[i]]
        self._flat = {i: [_flat(star, weights[i]) for star in references[i]] for i in self._fused}
        if self._packed:
            self._packing = _Packing([weights[i] for i in self._packed], scratch)
            stars = zip(*(references[i] for i in self._packed), strict=True)
            self._stars = [self._packing.pieces(of_all) for of_all in stars]

    def sums(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        # Packing first: the large tensors sweep all that it needs out of the caches.
        terms = [self._packed_sums(weights, gradients)] if self._packed else []
        terms += [self._fused_sums(i, weights[i], gradients[i]) for i in self._fused]
        for i in self._members:
            gradient = gradients[i]
            if gradient is not None and gradient.is_sparse:
                stored = _stored_sums(weights[i], gradient.coalesce(), self._references[i])
                terms.append(torch.where(self._of_gradient, stored, 0.0))
        if not terms:
            return torch.zeros_like(self._of_gradient, dtype=torch.float64)
        return torch.stack(terms).sum(0)

    def _packed_sums(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        dense = [None if (g := gradients[i]) is None or g.is_sparse else g for i in self._packed]
        g_pieces = self._packing.pieces(dense)
        w_pieces = self._packing.pieces([weights[i] for i in self._packed])
        sums: list[Tensor] = []
        for block in self._packing.blocks:
            g, w, d = block.rows
            block.fill(0, g_pieces)
            block.fill(1, w_pieces)
            sums += (torch.dot(g, g), torch.dot(w, g), torch.dot(w, w))
            for star_pieces in self._stars:
                block.fill(2, star_pieces)
                torch.sub(w, d, out=d)
                sums += (torch.dot(g, d), torch.dot(w, d), torch.dot(d, d))
        return torch.stack(sums).view(len(self._packing.blocks), -1).sum(0)

    def _fused_sums(self, index: int, weight: Tensor, gradient: Tensor | None) -> Tensor:
        w = _flat(weight, weight)
        if gradient is not None and not gradient.is_sparse:
            return _kernel()(_flat(gradient, weight), w, *self._flat[index])
        # Any gradient will do for the sums that have none in them: w again, as another tensor, since torch.compile
        # would build a further kernel for two arguments that are the same one.
        return torch.where(self._of_gradient, 0.0, _kernel()(_flat(weight, weight), w, *self._flat[index]))


@dataclass(frozen=True)
class _Block:
    """As many pieces as fit into the scratch at once: its rows as far as they are filled, and each piece's place."""

    pieces: slice
    rows: list[Tensor]
    places: list[list[Tensor]]

    def fill(self, row: int, pieces: list[Tensor]) -> None:
        torch._foreach_copy_(self.places[row], pieces[self.pieces])


class _Packing:
    """Where tensors, in pieces, lie in the rows of a scratch: block after block, each in the order of its memory.

    Args:
        like: tensors of the shapes and memory layouts that are packed.
        scratch: the rows, float64.
    """

    def __init__(self, like: Sequence[Tensor], scratch: Tensor) -> None:
        self._limit, self._zero = scratch.shape[1], scratch.new_zeros(())
        self._shapes = [tensor.shape for tensor in like]
        self._orders = [_order(tensor) for tensor in like]
        largest = max(map(torch.Size.numel, self._shapes), default=0)
        self._as_they_are = not any(self._orders) and largest <= self._limit
        self.blocks = list(_lay_out([piece.shape for piece in self.pieces(like)], scratch))

    def pieces(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Views of the tensors, of which each fits into the scratch; of zeros for None."""
        whole = [
            self._zero.expand(shape) if tensor is None else tensor
            for tensor, shape in zip(tensors, self._shapes, strict=True)
        ]
        if self._as_they_are:
            return whole
        ordered = (t.permute(order) if order else t for t, order in zip(whole, self._orders, strict=True))
        return [piece for tensor in ordered for piece in _split(tensor, self._limit)]


def _scratch(rows: int, elements: int, device: torch.device) -> Tensor:
    block = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
    return torch.empty(rows, min(block, elements), dtype=torch.float64, device=device)


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions from the slowest in memory to the fastest, None where that is their own order."""
    order = tuple(tensor.dim_order())
    return None if order == tuple(range(tensor.dim())) else order


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements in the memory order of ``like``, without a copy where ``tensor`` lies alike."""
    order = _order(like)
    # Detached: of a view, torch.compile would build a kernel for each shape of its base.
    return (tensor.permute(order) if order else tensor).reshape(-1).detach()


def _can_fuse(weight: Tensor, *references: Tensor) -> bool:
    if weight.numel() < FUSED_MINIMUM:
        return False
    order = _order(weight)
    return all((t.permute(order) if order else t).is_contiguous() for t in (weight, *references))


def _split(tensor: Tensor, limit: int) -> Iterable[Tensor]:
    """Views of at most ``limit`` elements, cut at the same places for every tensor of this shape."""
    if tensor.numel() <= limit:
        return (tensor,)
    rows = limit * tensor.shape[0] // tensor.numel()
    if rows:
        return tensor.split(rows)
    return (piece for row in tensor.unbind() for piece in _split(row, limit))


def _lay_out(shapes: list[torch.Size], scratch: Tensor) -> Iterator[_Block]:
    """Blocks of as many pieces as fit, in order, each from the beginning of the scratch."""
    start = used = 0
    for end in range(1, len(shapes) + 1):
        used += shapes[end - 1].numel()
        if end == len(shapes) or used + shapes[end].numel() > scratch.shape[1]:
            rows = [row[:used] for row in scratch]
            sizes = [shape.numel() for shape in shapes[start:end]]
            flat = [row.split(sizes) for row in rows]
            places = [[part.view(s) for part, s in zip(of_row, shapes[start:end], strict=True)] for of_row in flat]
            yield _Block(slice(start, end), rows, places)
            start, used = end, 0


def _inner_products(g: Tensor, w: Tensor, *references: Tensor) -> Tensor:
    g, w = g.double(), w.double()
    sums = [(g * g).sum(), (w * g).sum(), (w * w).sum()]
    for reference in references:
        d = w - reference.double()
        sums += [(g * d).sum(), (w * d).sum(), (d * d).sum()]
    return torch.stack(sums)


def _stored_sums(weight: Tensor, gradient: Tensor, references: Sequence[Tensor]) -> Tensor:
    """The sums over the elements that a coalesced sparse gradient stores."""
    positions, values = gradient.indices(), gradient.values()
    rows = max(1, CPU_BLOCK * values.shape[0] // max(1, values.numel()))
    terms = []
    for position, value in zip(positions.split(rows, 1), values.split(rows), strict=True):
        at = tuple(position)
        terms.append(_inner_products(value, weight[at], *(star[at] for star in references)))
    return torch.stack(terms).sum(0)


@cache
def _kernel() -> Callable[..., Tensor]:
    return torch.compile(_inner_products, dynamic=True, fullgraph=True)


def _build_kernel(points: Iterable[Sequence[Tensor]], device: torch.device) -> None:
    """Compile now, not within a training step, for gradients of the weights' dtype: each of ``points`` is w, w*, ..."""
    try:
        for dtypes in {tuple(tensor.dtype for tensor in of_weight) for of_weight in points}:
            w, *references = (torch.zeros(FUSED_MINIMUM, dtype=dtype, device=device) for dtype in dtypes)
            with torch.no_grad():
                _kernel()(torch.zeros_like(w), w, *references)
    except Exception as error:
        raise GeomprobeError(
            f"torch.compile could not build the kernel of the inner products: {error}. "
            "Install a C++ compiler (Triton on CUDA), or measure with compiled=False."
        ) from error


def _require_parameters(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that cannot be measured."""
    if not parameters:
        raise UsageError("there are no parameters to measure. Attach to a model that has some.")
    for index, parameter in enumerate(parameters):
        if not parameter.is_floating_point() or parameter.layout is not torch.strided:
            raise UnsupportedTraining(
                f"parameter {index} is {parameter.dtype}, {parameter.layout}: only dense real parameters "
                "are measured. Hold complex ones as real tensors (torch.view_as_real)."
            )
        if parameter.device != parameters[0].device:
            raise UnsupportedTraining(
                f"parameter {index} is on {parameter.device}, parameter 0 on {parameters[0].device}. "
                "Train with all parameters of a process on one device."
            )


def _require_reference(name: str, reference: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Refuse a reference that has not the shapes and the device of the parameters."""
    found, needed = ([f"{list(t.shape)} on {t.device}" for t in ts] for ts in (reference, parameters))
    for index, (a, b) in enumerate(zip_longest(found, needed, fillvalue="missing")):
        if a != b:
            raise UsageError(
                f"reference {name!r} does not match the parameters: tensor {index} is {a}, parameter {index} "
                f"is {b}. Load a reference of this model, onto its device."
            )


def _require_gradients(
    parameters: Sequence[Tensor], shapes: Sequence[torch.Size], gradients: Sequence[Tensor | None]
) -> None:
    """Refuse parameters and gradients that have not the shapes that the parameters had."""
    if len(gradients) != len(parameters):
        raise UnsupportedTraining(
            f"{len(gradients)} gradients for {len(parameters)} parameters. Give each one or None."
        )
    rows = zip(parameters, shapes, gradients, strict=True)
    for index, (parameter, shape, gradient) in enumerate(rows):
        if parameter.shape != shape:
            raise UnsupportedTraining(
                f"parameter {index} changed its shape from {list(shape)} to "
                f"{list(parameter.shape)}: its distance to a reference is undefined. Keep the shapes fixed."
            )
        if gradient is not None and (gradient.shape != shape or gradient.layout not in LAYOUTS):
            raise UnsupportedTraining(
                f"the gradient of parameter {index} is {gradient.layout} {list(gradient.shape)}, the "
                f"parameter {list(shape)}. Give a dense or sparse COO gradient of its shape."
            )
