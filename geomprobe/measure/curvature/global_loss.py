"""The global loss: what each process differentiates of it, and how their products become those of the whole.

The loss whose gradient the optimizer gets is the mean of the processes' own losses, times a factor (see
`Reduction`). Its Hessian is linear in them: each process takes ``H v`` of its own loss with the global ``v``, and
the mean of these is the global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from geomprobe.distributed.dtensor import like_local, local, local_gradient
from geomprobe.distributed.layout import ElsewhereFailed, Layout, fsdp_modules
from geomprobe.measure.curvature.autograd_graph import Blocker, CurvatureUnavailable
from geomprobe.measure.inner_products import PairProducts
from geomprobe.reproducibility.isolation import keep_gradients

Closure = Callable[[], Tensor]

_SKEW = 0.05  # as far as compression to 8 bits of mantissa turns a gradient, and more than any rounding
_ROUND = 1e-3  # a factor this near to a whole number of processes is one
_MIXED_PRECISION = Blocker(
    "DDP's mixed_precision",
    "frees the weights that the backward pass used",
    "Train under torch.autocast, without it.",
)


class SingleProcess:
    """One process: its loss is the global one.

    Attributes:
        later: whether the graph of a loss's gradients is only made where products are taken of it.
        blocker: what stops all of it, if anything does.
    """

    later = False
    blocker: Blocker | None = None

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)

    @contextmanager
    def tensors(self) -> Iterator[list[Tensor]]:
        """The tensors that this process's loss is differentiated by, one a parameter, whole."""
        yield self.parameters

    def vectors(self, values: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Local values, one tensor a parameter, as vectors that fit ``tensors``."""
        return list(values)

    def mean(self, products: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the processes of what each found for its ``tensors``: local values of it."""
        return list(products)

    def beside(self, closure: Closure) -> Closure:
        """``closure``, evaluated without a trace in what averages the gradients, and sending nothing."""
        return closure


class DataParallel(SingleProcess):
    """DDP. `torch.autograd.grad` passes its reducer by, so each process's graph is that of its own loss."""

    def __init__(self, parameters: Sequence[Tensor], layout: Layout) -> None:
        super().__init__(parameters)
        self._layout = layout
        if any(getattr(replica, "mixed_precision", None) is not None for replica in layout.replicas):
            self.blocker = _MIXED_PRECISION

    def mean(self, products: Sequence[Tensor]) -> list[Tensor]:
        return _mean(products, self._layout.world_size)

    def beside(self, closure: Closure) -> Closure:
        def evaluate() -> Tensor:
            with ExitStack() as stack:
                for replica in self._layout.replicas:
                    stack.enter_context(_without_reducer(replica))
                return closure()

        return evaluate


class FullySharded(SingleProcess):
    """FSDP2. All parameters are gathered at once, and its hooks neither reduce nor free anything meanwhile."""

    later = True

    def __init__(self, parameters: Sequence[Tensor], layout: Layout, module: nn.Module) -> None:
        super().__init__(parameters)
        self._layout = layout
        self._modules = fsdp_modules(module)
        slots = {id(p): (m, name) for m in module.modules() for name, p in m._parameters.items()}
        self._slots = [slots[id(parameter)] for parameter in parameters]

    @contextmanager
    def tensors(self) -> Iterator[list[Tensor]]:
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_gathered(module))
            stack.enter_context(keep_gradients(self.parameters))
            gathered = [owner._parameters[name] for owner, name in self._slots]
            yield [tensor for tensor in gathered if tensor is not None]

    def vectors(self, values: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        rows = zip(values, self.parameters, tensors, strict=True)
        return [None if v is None else like_local(v, p).full_tensor().to(t.dtype) for v, p, t in rows]  # type: ignore[attr-defined]

    def mean(self, products: Sequence[Tensor]) -> list[Tensor]:
        whole = _mean(products, self._layout.world_size)
        return [_shard(tensor, p) for tensor, p in zip(whole, self.parameters, strict=True)]


class ReplicatedDTensors(SingleProcess):
    """Replicated DTensors: the loss is a DTensor itself, and global."""

    def vectors(self, values: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if v is None else like_local(v, t) for v, t in zip(values, tensors, strict=True)]

    def mean(self, products: Sequence[Tensor]) -> list[Tensor]:
        rows = zip(products, self.parameters, strict=True)
        return [h for product, p in rows if (h := local_gradient(product.detach(), p)) is not None]


def global_loss(parameters: Sequence[Tensor], layout: Layout, module: nn.Module | None) -> SingleProcess:
    """What differentiates the global loss of a training that is laid out as ``layout`` says."""
    if layout.kind == "DDP":
        return DataParallel(parameters, layout)
    if layout.kind == "FSDP2":
        assert module is not None  # the layout was found in it
        return FullySharded(parameters, layout, module)
    return ReplicatedDTensors(parameters) if layout.kind == "DTensor" else SingleProcess(parameters)


class LocalGradients:
    """Sums what backward passes send to the leaves of a graph, before anything else sees it.

    Attributes:
        of: the sum by leaf, in memory of its own.

    >>> import torch
    >>> w, own = torch.ones(2, requires_grad=True), LocalGradients()
    >>> own.watch([w])
    >>> (3 * w).sum().backward()
    >>> own.unwatch()
    >>> own.of[w]
    tensor([3., 3.])
    """

    def __init__(self) -> None:
        self.of: dict[Tensor, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, leaves: Sequence[Tensor], scale: Tensor | None = None) -> None:
        """Before a backward pass. The leaves' own hooks run first.

        Args:
            leaves: the tensors to watch, until `unwatch`.
            scale: what the loss was multiplied by.
        """
        hooks = ((leaf, self._adding(leaf, scale)) for leaf in leaves if leaf.requires_grad)
        self._handles += [leaf.register_hook(hook) for leaf, hook in hooks]

    def unwatch(self) -> None:
        """After the backward pass."""
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        """Forget all of it."""
        self.of = {}

    def _adding(self, leaf: Tensor, scale: Tensor | None) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            # A copy: the gradient's memory may become leaf.grad, and be averaged in place.
            dense = dense.clone() if scale is None else dense / scale
            self.of[leaf] = self.of[leaf] + dense if leaf in self.of else dense

        return hook


class Reduction:
    """Measures, once, the factor between the mean of the processes' gradients and the gradient that the optimizer gets.

    DDP and FSDP2 take the mean. A communication hook, ``set_gradient_divide_factor`` or the like may take a
    sum, or any multiple; whatever it is, the Hessian must be that of the same loss as the gradient.

    Attributes:
        factor: None until it is known.
    """

    def __init__(self, global_loss: SingleProcess, layout: Layout) -> None:
        self._loss, self._layout = global_loss, layout
        self.factor: float | None = 1.0 if layout.kind in ("one process", "DTensor") else None
        self._own = LocalGradients()
        self._reduced: list[Tensor | None] = []

    @contextmanager
    def watching(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Around a backward pass, while the factor is unknown: note what each leaf gets, and what comes of it."""
        try:
            self._own.watch(leaves)
            yield
        finally:  # also of a pass that found out that it has no second derivative
            self._own.unwatch()
            gradients = [local_gradient(p.grad, p) for p in self._loss.parameters]
            self._reduced = [None if g is None else g.detach().to_dense().clone() for g in gradients]

    def find(self, tensors: Sequence[Tensor]) -> float:
        """The factor; where it is unknown, from the backward passes watched since the last `discard`.

        Every process must call this at once, with what its losses were differentiated by.

        Raises:
            CurvatureUnavailable: the reduced gradient is no multiple of the mean.
            UnsupportedTraining: that is so because some processes did not use a parameter that others did.
        """
        if self.factor is not None:
            return self.factor
        own = [self._own.of.get(t, torch.zeros_like(t, requires_grad=False)) for t in tensors]
        mean, reduced = self._loss.mean(own), self._reduced
        products = PairProducts(self._loss.parameters, self._layout.owned)(reduced, mean)
        of_reduced, between, of_mean = self._layout.sum(products).tolist()
        if not of_mean or not math.isfinite(of_mean + of_reduced):
            return 1.0  # no gradient, or none that is finite: the next step's may do
        factor, skew = between / of_mean, 1 - between**2 / (of_mean * (of_reduced or 1.0))
        if not skew < _SKEW**2:
            used = {f"parameter {i}": tensor in self._own.of for i, tensor in enumerate(tensors)}
            self._layout.require_same_use(used, self._loss.parameters[0].device)
            raise CurvatureUnavailable(
                Blocker(
                    "the reduction of the gradients",
                    "gives no multiple of the mean of the processes' gradients (the sine of the angle between them is "
                    f"{skew**0.5:.3g}, the factor along it {factor:.3g})",
                    "Average them by DDP or fully_shard within the last backward of a step, without a lossy "
                    "communication hook.",
                )
            )
        counts = factor * self._layout.world_size
        near = abs(counts - round(counts)) <= _ROUND * counts
        self.factor = round(counts) / self._layout.world_size if near else factor
        self.discard()
        return self.factor

    def discard(self) -> None:
        """Forget what was seen: the gradients were thrown away, or the factor is known."""
        self._own.clear()
        self._reduced = []


def fail_together(layout: Layout, failure: Exception | None, device: torch.device) -> None:
    """Raise on every process if one has failed, so that none waits for another's product.

    Raises:
        CurvatureUnavailable: this or another process's loss has no exact product.
        ElsewhereFailed: another process failed in a way that ends it.
        Exception: ``failure``, with which this process failed.
    """
    reasons = layout.failures(failure, device)
    mild = failure is None or isinstance(failure, CurvatureUnavailable)
    fatal = {rank: text for rank, (kind, text) in reasons.items() if kind != CurvatureUnavailable.__name__}
    if mild and fatal:
        raise ElsewhereFailed(fatal)
    if failure is not None:
        raise failure
    for rank, (_, text) in reasons.items():
        raise CurvatureUnavailable(Blocker("the global loss", f'has none on rank {rank} ("{text}")', "See there."))


def without_gradients(parameters: Iterable[Tensor], module: nn.Module | None) -> bool:
    """Whether no backward pass has left a gradient: none in the parameters, and none that FSDP2 holds back.

    It keeps those of a micro-batch to itself where they are not to be reduced before the last one's.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            return False
    if not (owners := fsdp_modules(module)):
        return True
    groups = [group for owner in owners for group in _groups(owner)]
    members = [member for group in groups for member in group.fsdp_params]
    held = [getattr(group, "_partial_reduce_output", None) for group in groups]
    held += [member.unsharded_accumulated_grad for member in members]
    held += [getattr(getattr(member, "_unsharded_param", None), "grad", None) for member in members]
    return all(gradient is None for gradient in held)


def _groups(module: Any) -> list[Any]:
    """The groups of parameters that one FSDP2 module manages."""
    state = module._get_fsdp_state()
    groups: list[Any] | None = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # a module had at most one before torch named it so
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return groups


def _mean(tensors: Sequence[Tensor], world_size: int) -> list[Tensor]:
    """In one all-reduce a dtype, of no less than single precision."""
    if world_size == 1:
        return list(tensors)
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(wide):
        indices = [i for i, of_tensor in enumerate(wide) if of_tensor == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1).to(dtype) for i in indices])
        dist.all_reduce(flat)
        pieces = (flat / world_size).split([tensors[i].numel() for i in indices])
        found |= {i: piece.view(tensors[i].shape) for i, piece in zip(indices, pieces, strict=True)}
    return [found[i] for i in range(len(tensors))]


def _shard(whole: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(placements=parameter.placements)).clone()


@contextmanager
def _gathered(module: Any) -> Iterator[None]:
    """Hold the parameters that one FSDP2 module manages whole, and its hooks still."""
    state, groups = module._get_fsdp_state(), _groups(module)
    stilled = {"reduce_grads": False, "reshard_after_backward": False, "post_forward_mesh_info": None}
    kept = [({name: getattr(group, name) for name in stilled}, group.is_unsharded) for group in groups]
    for group in groups:
        for name, value in stilled.items():
            setattr(group, name, value)
    try:
        module.unshard()
        yield
    finally:
        if state._state_ctx.post_backward_final_callback_queued:  # a backward pass failed before its end
            state._root_post_backward_final_callback()
        for group, (values, was_whole) in zip(groups, kept, strict=True):
            for name, value in values.items():
                setattr(group, name, value)
            if not was_whole:
                group.reshard()


@contextmanager
def _without_reducer(replica: Any) -> Iterator[None]:
    """Let a DDP module run the module in it, and nothing else."""

    def forward(*inputs: Any, **options: Any) -> Any:
        if replica.device_ids:
            device = torch.device(replica.device_type, replica.device_ids[0])
            inputs, options = torch.utils._pytree.tree_map_only(
                Tensor, lambda tensor: tensor.to(device), (inputs, options)
            )
        return replica.module(*inputs, **options)

    # Set on the instance, which hides the class's forward: DDP's own sets up the reducer for the next backward pass.
    # The hooks of the module's call still run.
    before = replica.__dict__.get("forward")
    replica.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del replica.__dict__["forward"]
        else:
            replica.__dict__["forward"] = before
