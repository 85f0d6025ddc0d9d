"""Reads a loss's autograd graph before it is used: its leaves, and what in it has no second derivative."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from geomprobe.errors import GeomprobeError
from geomprobe.probe.graph import graph_nodes

_CLOSURE = "pass probe.backward(loss, closure=...), a function that evaluates this minibatch's loss again"


@dataclass(frozen=True)
class Blocker:
    """An operation whose gradient cannot be differentiated again.

    Attributes:
        operation: its name, as autograd has it.
        reason: why it stops the second derivative.
        remedy: the way round it.
        plain: where there is one, a context in which the same loss evaluates without it.
        wrong: whether it has a second derivative, and that is wrong: then a closure does not help.
    """

    operation: str
    reason: str
    remedy: str
    plain: Callable[[], AbstractContextManager[Any]] | None = None
    wrong: bool = False


class CurvatureUnavailable(GeomprobeError):
    """The loss has no exact Hessian-vector product by any route at hand.

    Attributes:
        blocker: the operation that blocks it, and the way round.

    >>> print(CurvatureUnavailable(Blocker("FooBackward", "has no derivative", "Use bar.")))
    Hg cannot be computed exactly: FooBackward has no derivative. Use bar.
    """

    def __init__(self, blocker: Blocker) -> None:
        super().__init__(f"Hg cannot be computed exactly: {blocker.operation} {blocker.reason}. {blocker.remedy}")
        self.blocker = blocker


# What stops a second derivative, by a pattern of the operation's name in small letters, without underscores.
_KINDS = {
    r"(scaleddotproduct|flash|efficient|cudnn)\w*attention": Blocker(
        "",
        "is a fused attention kernel, and those have no second derivative",
        f"Either {_CLOSURE} (it then runs on the side with the math attention kernel), or train under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
        lambda: sdpa_kernel(SDPBackend.MATH),
    ),
    r"^cudnnrnn": Blocker(
        "",
        "is cuDNN's fused recurrence, which has no second derivative",
        f"Either {_CLOSURE} (it then runs on the side with cuDNN off), or train under "
        "torch.backends.cudnn.flags(enabled=False).",
        lambda: torch.backends.cudnn.flags(enabled=False),
    ),
    r"^compiledfunction": Blocker(
        "",
        "comes from torch.compile, whose backward cannot be differentiated",
        f"Either {_CLOSURE} (it then runs on the side with the compiler off), or train the model that was "
        "passed to torch.compile.",
        lambda: torch.compiler.set_stance("force_eager"),
    ),
    r"^checkpointfunction": Blocker(
        "",
        "is reentrant activation checkpointing, which hides the checkpointed part of the graph",
        "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
    ),
    r"^weightnorminterface": Blocker(
        "",
        "is weight_norm, whose second derivative is wrong in torch (seen in 2.15)",
        "Write w = g v / |v| out with torch's operations.",
        wrong=True,
    ),
    r"^(syncbatchnorm|batchnormbackwardreduce|batchnormbackwardelemt)": Blocker(
        "",
        "is SyncBatchNorm across processes, whose backward has no derivative",
        "Train with BatchNorm, without convert_sync_batchnorm.",
    ),
}
_ONCE = Blocker(
    "",
    "is marked once_differentiable: its backward has no derivative",
    f"Write its backward with differentiable operations and without the mark, or {_CLOSURE} without this function.",
)
_SEVERED = Blocker(
    "",
    "returns gradients that autograd cannot follow, so terms of the Hessian would be missing",
    f"Write its backward with differentiable torch operations, or {_CLOSURE} without this function.",
)
_UNPROVEN = Blocker(
    "",
    "is a torch.autograd.Function of its own, whose backward need not be the derivative of its forward, or leave all "
    "that it depends on to autograd",
    f"Either {_CLOSURE}, so that Hg is compared with finite differences, or take Hg unchecked "
    "(--check-curvature-every 0).",
)
_OTHER = Blocker(
    "",
    "has a backward without a derivative",
    f"Replace it in the model, or {_CLOSURE} without it.",
)

# torch's formulas for these gradients depend on whether they are to be differentiated (derivatives.yaml asks
# GradMode::is_enabled()), and round differently. On a handful of numbers the two can agree by chance.
_TWO_FORMULAS = re.compile(
    "^(silu|mish|nativegroupnorm|fusedrmsnorm|logit|cumprod|weightnorminterface|mkldnnrnnlayer|thnnfused)"
)


@dataclass
class GraphInfo:
    """What one walk over a loss's graph finds.

    Attributes:
        leaves: the tensors whose ``.grad`` a backward pass would fill.
        functions: nodes of Python-defined ``torch.autograd.Function``.
        blockers: what is known to stop a second derivative, one for each operation.
        two_formulas: whether some gradient is known to have other bits when it is to be differentiated.
    """

    leaves: list[Tensor] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    blockers: list[Blocker] = field(default_factory=list)
    two_formulas: bool = False


def inspect_graph(loss: Tensor) -> GraphInfo:
    """Walk the graph of ``loss``; nothing in it is run.

    Args:
        loss: any tensor that requires grad.

    >>> weight = torch.ones(3, requires_grad=True)
    >>> info = inspect_graph((weight**2).sum())
    >>> info.leaves[0] is weight, info.blockers
    (True, [])
    """
    info = GraphInfo()
    names: dict[str, None] = {}
    for node in graph_nodes(loss):
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            leaf = node.variable  # type: ignore[attr-defined]
            if leaf.requires_grad:  # a leaf frozen after the forward pass gets no gradient
                info.leaves.append(leaf)
            continue
        names.setdefault(name)
        if isinstance(node, BackwardCFunction):
            info.functions.append(node)
    for name in names:
        kind, two_formulas = _known_of(name)
        info.two_formulas |= two_formulas
        if kind is not None:
            info.blockers.append(replace(kind, operation=name))
    marked = dict.fromkeys(node.name() for node in info.functions if _is_once_differentiable(node))
    info.blockers += [replace(_ONCE, operation=name) for name in marked]
    return info


def coarsest_epsilon(loss: Tensor) -> float:
    """Machine epsilon of the coarsest floating-point type that the graph of ``loss`` passes through.

    >>> half = torch.ones(2, requires_grad=True).to(torch.bfloat16)
    >>> coarsest_epsilon(half.float().sum())
    0.0078125
    """
    outputs = (output.dtype for node in graph_nodes(loss) for output in node._input_metadata)
    return max((torch.finfo(dtype).eps for dtype in outputs if dtype.is_floating_point), default=0.0)


def explained(error: RuntimeError) -> CurvatureUnavailable:
    """The error that a double backward raised, as one that names the operation and the way round it.

    >>> error = RuntimeError("derivative for aten::_ctc_loss_backward is not implemented")
    >>> explained(error).blocker.operation
    'aten::_ctc_loss_backward'
    """
    text = str(error).strip()
    named = re.search(r"derivative for '?([\w:]+)'? is not implemented", text)
    if named is not None:
        kind = _known_of(named[1].removeprefix("aten::"))[0] or _OTHER
        return CurvatureUnavailable(replace(kind, operation=named[1]))
    return CurvatureUnavailable(Blocker("the double backward", f'failed with "{text}"', _OTHER.remedy))


def own_functions(graph: GraphInfo) -> list[str]:
    """The operations in a graph that are Python functions of the script's, or of a library other than torch."""
    nodes = (node for node in graph.functions if not type(node)._forward_cls.__module__.startswith("torch."))
    return [node.name() for node in nodes]


def unproven_function(operation: str) -> Blocker:
    """Why a loss with such an operation has no Hg that can be trusted."""
    return replace(_UNPROVEN, operation=operation)


@contextmanager
def no_severed_functions(functions: Sequence[Any]) -> Iterator[None]:
    """Refuse, after a backward pass run inside, Python functions that returned gradients without a graph in it.

    A custom backward that calls a kernel autograd does not know (a Triton or C++ extension, NumPy) raises
    nothing under ``create_graph``: its part of the Hessian is just not there. Started from a root gradient
    that requires grad, every gradient of the pass depends on it linearly, so one that does not is such a loss.

    Raises:
        CurvatureUnavailable: there is one.
    """
    found: list[str] = []

    def watch(node: Any) -> Callable[..., None]:
        def look(returned: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
            if any(g is not None and g.requires_grad for g in given) and any(
                r is not None and not r.requires_grad and bool(r.any()) for r in returned
            ):
                found.append(node.name())

        return look

    with ExitStack() as stack:
        for node in functions:
            stack.callback(node.register_hook(watch(node)).remove)
        yield
    if found:
        raise CurvatureUnavailable(replace(_SEVERED, operation=found[0]))


@functools.lru_cache(maxsize=4096)  # each step's graph has the same names
def _known_of(name: str) -> tuple[Blocker | None, bool]:
    """What is known to block an operation's second derivative, and whether its gradient has two formulas."""
    # One spelling for ScaledDotProductAttentionBackward0 and _scaled_dot_product_attention_backward.
    folded = name.replace("_", "").lower()
    kind = next((kind for pattern, kind in _KINDS.items() if re.search(pattern, folded)), None)
    return kind, _TWO_FORMULAS.search(folded) is not None


def _is_once_differentiable(node: Any) -> bool:
    # The mark leaves no other trace, and it raises only on paths that lead to an input of autograd.grad:
    # without this the function's part of the Hessian would be left out in silence.
    backward = getattr(type(node)._forward_cls, "backward", None)
    while backward is not None:
        if getattr(backward, "__code__", None) is _ONCE_CODE:
            return True
        backward = getattr(backward, "__wrapped__", None)
    return False


# What the decorator puts around any function has one code object, by which the mark is known again.
_ONCE_CODE = once_differentiable(lambda ctx: None).__code__
