"""One read of the weights, the references and the gradients of a step: digests, norms and inner products.

Three ways, with the same digests to the bit, and the same sums up to float64 rounding:

- on CUDA, Triton: a few launches, however many tensors there are;
- on a CPU, numba, where it is installed (``pip install 'geomprobe[fast]'``);
- else plain torch, which reads several times. It also reads each tensor that the others cannot: of another dtype,
  with a gradient or a reference whose memory is not in the order of its weight's, on another device.

Every product is formed and summed in float64: the difference of two float32 numbers within a factor 2^29
of one another is exact there, and so is the product of any two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.kernels.tensor_digests import TensorDigests
from geomprobe.kernels.torch_kernel import memory_order, products, squared_norm
from geomprobe.kernels.transfer import moved

SHARED = ("g.g", "w.g", "w.w")
OF_REFERENCE = ("g.d", "w.d", "d.d")
BACKENDS = ("triton", "numba", "torch")
FASTEST = {"cuda": ("triton",), "cpu": ("numba",)}  # by the type of the device
LAYOUTS = (torch.strided, torch.sparse_coo)  # of a gradient


class Reading(NamedTuple):
    """What one read of a step has found. Everything is on the weights' device.

    Attributes:
        weights: int64 ``[parameters]``, the digest of each weight, as `TensorDigests` gives it.
        gradients: the same of each gradient, in the order of its weight's memory; of indices and values for a sparse
            one; 0 where there is none.
        norms: float64 ``[parameters]``, g.g of each gradient as it lies in memory, unscaled; 0 where there is none.
        sums: float64 ``[names]``, or ``[1 + parameters, names]`` with the total first; None where none were asked for.
    """

    weights: Tensor
    gradients: Tensor
    norms: Tensor
    sums: Tensor | None


class FusedRead:
    """Reads w, g and each reference w* once, and gives a `Reading`.

    Reading changes nothing of the run: no weight, gradient, autograd graph or random state. It never waits for the
    device, and allocates no temporary of the model's size. (The exceptions: a sparse gradient is made dense, and a
    gradient or reference whose memory is not in the order of its weight's is copied, a tensor at a time.)

    Args:
        weights: of each parameter, the values that this process has. They are read where they lie at each read.
        references: the points w* by name, each with one tensor a weight, of its shape and on its device.
        owned: for each weight, whether its values count in the sums; where one does not, its sums are zero.
        per_parameter: also give the sums of each weight.
        backend: ``"triton"``, ``"numba"`` or ``"torch"``; by default the fastest that is there.

    Attributes:
        names: what the columns of the sums are: ``("g.g", "w.g", "w.w")``; then ``("g.d", "w.d", "d.d")`` of the
            reference named ``"final"``, if there is one; then, for every other reference NAME in the mapping's order,
            ``"references/NAME/inner_products/g.d"``, ``.../w.d`` and ``.../d.d``. With ``d = w - w*``.
        backend: the one that is used.

    Raises:
        UsageError: no weights, an unknown or missing backend, or a reference that does not match the weights.

    >>> w, w_final, g = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
    >>> fused = FusedRead([w], {"final": [w_final]}, backend="torch")
    >>> dict(zip(fused.names, fused.read([g]).sums.tolist()))
    {'g.g': 25.0, 'w.g': 11.0, 'w.w': 5.0, 'g.d': 8.0, 'w.d': 4.0, 'd.d': 4.0}
    """

    names: tuple[str, ...]
    backend: str

    def __init__(
        self,
        weights: Sequence[Tensor],
        references: Mapping[str, Sequence[Tensor]] = {},
        *,
        owned: Sequence[bool] | None = None,
        per_parameter: bool = False,
        backend: str | None = None,
    ) -> None:
        if not weights:
            raise UsageError("there are no parameters to measure. Attach to a model that has some.")
        for name, reference in references.items():
            _require_reference(name, reference, weights)
        ordered = sorted(references, key=lambda name: name != "final")
        prefixes = ["" if name == "final" else f"references/{name}/inner_products/" for name in ordered]
        self.names = SHARED + tuple(prefix + column for prefix in prefixes for column in OF_REFERENCE)
        self._weights = list(weights)
        self._device = device = weights[0].device
        self._shapes = [w.shape for w in weights]
        self._stars = list(zip(*(references[name] for name in ordered), strict=True)) or [()] * len(weights)
        self._per_parameter = per_parameter
        self._foreign = None if owned is None or all(owned) else ~moved(owned, device).unsqueeze(1)
        powers = [2.0, 1.0, 0.0] + [1.0, 0.0, 0.0] * len(ordered)
        self._gradient_powers = moved(powers, device, torch.float64)
        self._digests = TensorDigests(device)
        self.backend, self._kind = _chosen(backend, device)
        self._looks: list[Any] = []
        self._plans: dict[bool, _Plan] = {}
        # Compiles now, not within a training step, for gradients that lie as their weights do.
        dense = [_dense(w) for w in weights]
        for sums in {False, bool(references)}:
            self._plan(dense, dense, sums)

    @torch.no_grad()
    def read(
        self,
        gradients: Sequence[Tensor | None],
        *,
        weights: Sequence[Tensor] | None = None,
        grad_scale: Tensor | float | None = None,
        sums: bool = True,
    ) -> Reading:
        """Digests and norms, and with ``sums`` the inner products, at the weights' present values.

        Args:
            gradients: one a weight, of its shape: dense of any dtype and layout, sparse COO, or None for zero.
            weights: the weights, where they are other tensors now than those that this was made with.
            grad_scale: what the gradients were multiplied by (a GradScaler's scale, which fused optimizers
                divide by themselves). The sums are those of ``g / grad_scale``; digests and norms are of ``g``.
            sums: whether the inner products are wanted; the references are not read without.

        Raises:
            UnsupportedTraining: a weight changed its shape, a gradient does not match its weight, or sums are wanted
                of weights that are complex, integer, sparse or on several devices.
        """
        digests, found = self._found(self._weights if weights is None else weights, gradients, sums)
        norms = found[:, 0]
        total = self._summed(found, grad_scale) if sums else None
        return Reading(digests[:, 0], digests[:, 1], norms, total)

    def look(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Digests and norms of tensors that have the weights' shapes, as `read` gives them of gradients.

        Only these tensors are read. Calls of `read` go to another `FusedRead`.

        >>> weight, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> digests, norms = FusedRead([weight, weight]).look([g, None])
        >>> norms.tolist(), digests.tolist()[1]
        ([25.0, 0.0], 0)
        """
        pairs = zip(self._weights, tensors, strict=True)
        instead = [w if t is None or not _lies_as(t, w) else t for w, t in pairs]
        reading = self.read(tensors, weights=instead, sums=False)
        return reading.gradients, reading.norms

    def _summed(self, found: Tensor, grad_scale: Tensor | float | None) -> Tensor:
        if self._foreign is not None:
            found = found.masked_fill(self._foreign, 0.0)
        total = found.sum(0)
        if self._per_parameter:
            total = torch.cat([total.unsqueeze(0), found])
        scale = grad_scale.double() if isinstance(grad_scale, Tensor) else grad_scale
        return total if scale is None else total / scale**self._gradient_powers

    def _found(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None], sums: bool
    ) -> tuple[Tensor, Tensor]:
        """Digests ``[weights, 2]`` and inner products ``[weights, names]``; g.g alone without ``sums``."""
        if len(gradients) != len(self._weights):
            raise UnsupportedTraining(
                f"{len(gradients)} gradients for {len(self._weights)} parameters. Give each one or None."
            )
        given, weights = weights, [_dense(w) for w in weights]
        looks = [(_look(w), _look(g)) for w, g in zip(weights, gradients, strict=True)]
        if looks != self._looks:
            _require_gradients(weights, self._shapes, gradients)
            self._looks, self._plans = looks, {}
        if sums not in self._plans:
            if sums:
                _require_measurable(given)
            self._plans[sums] = self._plan(weights, gradients, sums)
        return self._plans[sums].read(weights, gradients)

    def _plan(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None], sums: bool) -> _Plan:
        return _Plan(self._kind, self._digests, weights, gradients, self._stars if sums else None)


class _Plan:
    """Which weights a kernel reads, and which plain torch, with gradients that lie as these do.

    Without ``stars``, g.g is the only product; with empty ones, those of w and g are.
    """

    def __init__(
        self,
        kind: Any,
        digests: TensorDigests,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        stars: Sequence[Sequence[Tensor]] | None,
    ) -> None:
        self._device = device = weights[0].device
        self._sums = stars is not None
        self._stars = stars = stars or [()] * len(weights)
        of_gradient = ([True, True, False] + [True, False, False] * len(stars[0])) if self._sums else [True]
        self._width = len(of_gradient)
        self._digests = digests
        members: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        self._slow: list[int] = []
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            tensors = [w, w if g is None else g, *(stars[i] or [w])]
            if kind is not None and w.device == device and _lie_alike(tensors, kind.DTYPES):
                members.setdefault((w.dtype, tensors[2].dtype), []).append(i)
            else:
                self._slow.append(i)
        self._groups = [
            (self._kernel(kind, [weights[i] for i in group], star_dtype), group, moved(group, device))
            for (_, star_dtype), group in members.items()
        ]
        missing = [[g is None] for g in gradients]
        self._missing = moved(missing, device) if [True] in missing else None
        self._of_gradient = moved(of_gradient, device)
        self._slow_rows = moved(self._slow, device)

    def _kernel(self, kind: Any, weights: Sequence[Tensor], star_dtype: torch.dtype) -> Any:
        sizes = tuple(w.numel() for w in weights)
        references = max(1, len(self._stars[0])) if self._sums else 0
        return _kernel(kind, sizes, weights[0].dtype, star_dtype, references, self._device)

    def read(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Digests ``[weights, 2]``, and inner products ``[weights, names]``."""
        width = self._width
        digests = found = torch.empty(0)
        if self._slow or len(self._groups) > 1:
            digests = torch.empty(len(weights), 2, dtype=torch.int64, device=self._device)
            found = torch.empty(len(weights), width, dtype=torch.float64, device=self._device)
        if self._slow:
            digests[self._slow_rows], found[self._slow_rows] = self._slowly(weights, gradients)
        for kernel, group, rows in self._groups:
            words, sums = kernel.read([self._addresses(i, weights[i], gradients[i]) for i in group])
            if len(group) == len(weights):
                digests, found = words, sums[:, :width]
            else:
                digests[rows], found[rows] = words, sums[:, :width]
        if self._missing is not None:
            digests[:, 1:].masked_fill_(self._missing, 0)
            found.masked_fill_(self._missing & self._of_gradient, 0.0)
        return digests, found

    def _addresses(self, i: int, weight: Tensor, gradient: Tensor | None) -> tuple[int, ...]:
        w = weight.data_ptr()
        pair = w, w if gradient is None else gradient.data_ptr()
        return pair + (tuple([star.data_ptr() for star in self._stars[i]]) or (w,)) if self._sums else pair

    def _slowly(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        groups, found = [], []
        for i in self._slow:
            w, g = weights[i].resolve_neg(), gradients[i]
            groups += [[w], _gradient_parts(g, w)]
            g = w if g is None else _dense(g).resolve_neg()
            found.append(products(w, g, self._stars[i]) if self._sums else squared_norm(g))
        digests = self._digests(groups).view(-1, 2)
        return digests, torch.stack([sums.to(self._device, non_blocking=True) for sums in found])


@lru_cache(maxsize=16)
def _kernel(
    kind: Any,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    star_dtype: torch.dtype,
    references: int,
    device: torch.device,
) -> Any:
    return kind(sizes, dtype, star_dtype, references, device)


def _chosen(backend: str | None, device: torch.device) -> tuple[str, Any]:
    """The backend's name and its kernel, None for plain torch."""
    if backend is None:
        wanted = [*FASTEST.get(device.type, ()), "torch"]
    elif backend in BACKENDS:
        wanted = [backend]
    else:
        raise UsageError(f"there is no backend {backend!r}. Choose one of {', '.join(BACKENDS)}.")
    for name in wanted:
        try:
            return name, _imported(name)
        except ImportError as error:
            missing = error
    raise UsageError(f"the backend {backend!r} cannot be imported: {missing}. Install it, or choose 'torch'.")


def _imported(backend: str) -> Any:
    if backend == "numba":
        from geomprobe.kernels.numba_kernel import NumbaKernel

        return NumbaKernel
    if backend == "triton":
        from geomprobe.kernels.triton_kernel import TritonKernel

        return TritonKernel
    return None


def _dense(tensor: Tensor | None) -> Any:
    return tensor if tensor is None or tensor.layout is torch.strided else tensor.to_dense()


def _gradient_parts(gradient: Tensor | None, weight: Tensor) -> list[Tensor]:
    """The tensors that hold a gradient, in the order of the weight's memory, whatever the gradient's own is."""
    if gradient is None:
        return []
    if gradient.layout is torch.sparse_coo:
        return [gradient._indices(), gradient._values()]
    if gradient.layout is torch.strided and not _lies_as(gradient, weight):
        gradient = gradient.permute(memory_order(weight)).contiguous()
    return [gradient.resolve_neg()]


def _lies_as(tensor: Tensor, other: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.stride() == other.stride()


def _look(tensor: Tensor | None) -> Any:
    """All that says how a tensor lies in memory, but for where."""
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        return tensor.layout
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg()


def _lie_alike(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a kernel can read w, g and each w*, as they lie, in the order of their memory."""
    w, g, star, *others = tensors
    order = memory_order(w)
    return (
        g.layout is torch.strided
        and w.dtype == g.dtype
        and w.dtype in dtypes
        and star.dtype in (w.dtype, torch.float32)  # the pairs that occur; each is compiled for itself
        and all(other.dtype == star.dtype for other in others)
        and all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg() for t in tensors)
        and all(t.device == w.device and t.permute(order).is_contiguous() for t in tensors)
    )


def _require_measurable(weights: Sequence[Tensor]) -> None:
    """Refuse weights that have no inner products."""
    for index, w in enumerate(weights):
        if not w.is_floating_point() or w.layout is not torch.strided:
            raise UnsupportedTraining(
                f"parameter {index} is {w.dtype}, {w.layout}: only dense real parameters "
                "are measured. Hold complex ones as real tensors (torch.view_as_real)."
            )
        if w.device != weights[0].device:
            raise UnsupportedTraining(
                f"parameter {index} is on {w.device}, parameter 0 on {weights[0].device}. "
                "Train with all parameters of a process on one device."
            )


def _require_reference(name: str, reference: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Refuse a reference that has not the shapes and the device of the weights."""
    found, needed = ([f"{list(t.shape)} on {t.device}" for t in ts] for ts in (reference, weights))
    for index, (a, b) in enumerate(zip_longest(found, needed, fillvalue="missing")):
        if a != b:
            raise UsageError(
                f"reference {name!r} does not match the parameters: tensor {index} is {a}, parameter {index} "
                f"is {b}. Load a reference of this model, onto its device."
            )


def _require_gradients(
    weights: Sequence[Tensor], shapes: Sequence[torch.Size], gradients: Sequence[Tensor | None]
) -> None:
    """Refuse weights and gradients that have not the shapes that the weights had."""
    for index, (w, shape, gradient) in enumerate(zip(weights, shapes, gradients, strict=True)):
        if w.shape != shape:
            raise UnsupportedTraining(
                f"parameter {index} changed its shape from {list(shape)} to "
                f"{list(w.shape)}: its distance to a reference is undefined. Keep the shapes fixed."
            )
        if gradient is not None and (gradient.shape != shape or gradient.layout not in LAYOUTS):
            raise UnsupportedTraining(
                f"the gradient of parameter {index} is {gradient.layout} {list(gradient.shape)}, the "
                f"parameter {list(shape)}. Give a dense or sparse COO gradient of its shape."
            )
