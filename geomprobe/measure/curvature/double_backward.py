"""One backward pass that fills ``.grad`` as ever and stays differentiable, and the product Hv from it.

CG is "Corridor Geometry in Gradient-Based Optimization" (Dherin, Rosca); Hg is the rate at which the
gradient turns along the gradient flow, ``dg/dt = -Hg`` (CG lemma 2.8).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from geomprobe.measure.curvature.autograd_graph import (
    CurvatureUnavailable,
    GraphInfo,
    explained,
    inspect_graph,
    no_severed_functions,
)
from geomprobe.probe.hooks.gradient_hooks import put_first
from geomprobe.reproducibility.digest import same_bits
from geomprobe.reproducibility.isolation import keep_state, silence_hooks

LeafHook = Callable[[Tensor | None], Tensor | None]

# Where each parameter's gradient comes out of the graph of one loss's gradients; None for a parameter that the loss
# does not depend on. It keeps that graph, and through it the activations, alive; no gradient's values.
Graph = list[GradientEdge | None]


def backward_with_graph(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    apart: bool = False,
    module: nn.Module | None = None,
    info: GraphInfo | None = None,
) -> Graph:
    """``loss.backward()``, keeping the graph of the gradients.

    Every leaf's ``.grad`` is what ``loss.backward()`` would have made of it: accumulated in place or new,
    with its strides, plain (no graph of its own), and seen by the leaf's own hooks in the same order.

    Args:
        loss: a scalar.
        parameters: the tensors that `hessian_vector_product` will differentiate by.
        apart: run ``loss.backward()`` itself and a second pass for the graph. It costs one gradient more, and
            is needed where a gradient has other bits when it is to be differentiated. That is done unasked
            where torch is known to have another formula then (SiLU, Mish, GroupNorm, LSTM and others);
            `compared_backward` finds out about the rest.
        module: its buffers are kept as they are in the second pass.
        info: of ``loss``, where it is known.

    Raises:
        CurvatureUnavailable: where the graph holds an operation without a second derivative. For an operation
            known beforehand no gradient is touched; for a custom function found out on the way, all of them
            are as ``loss.backward()`` leaves them.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> graph = backward_with_graph((w**3).sum(), [w])
    >>> w.grad
    tensor([ 3., 12.])
    >>> hessian_vector_product([graph], [w], [w.grad])
    [tensor([ 18., 144.])]
    """
    info = _clear(loss, info)
    if apart or info.two_formulas:
        loss.backward(retain_graph=True)
        return graph_of(loss, parameters, info, module)
    _spend_cycle_warning()
    index = {leaf: position for position, leaf in enumerate(parameters)}
    edges: Graph = [None] * len(parameters)
    hooks = [(leaf, _plain_accumulation(leaf, edges, index.get(leaf))) for leaf in info.leaves]
    with _first_hooks(hooks), no_severed_functions(info.functions):
        loss.backward(_root(loss), create_graph=True)
    return edges


def compared_backward(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    module: nn.Module | None = None,
    info: GraphInfo | None = None,
) -> tuple[Graph, bool]:
    """`backward_with_graph` with ``apart=True``, and whether the two passes' gradients were bitwise equal.

    Where they were, ``apart=False`` saves a pass from then on.
    """
    info = _clear(loss, info)
    plain: dict[Tensor, Tensor | None] = {}
    with _first_hooks([(leaf, functools.partial(plain.__setitem__, leaf)) for leaf in info.leaves]):
        loss.backward(retain_graph=True)
    gradients = _gradients(loss, info.leaves, info, module)
    equal = not info.two_formulas and all(
        _same_memory(plain.get(leaf), g) for leaf, g in zip(info.leaves, gradients, strict=True)
    )
    by_leaf = dict(zip(info.leaves, gradients, strict=True))
    return [_edge(by_leaf.get(parameter)) for parameter in parameters], equal


def graph_of(
    loss: Tensor,
    parameters: Sequence[Tensor],
    info: GraphInfo | None = None,
    module: nn.Module | None = None,
) -> Graph:
    """The graph of the gradients of ``loss``, leaving every ``.grad`` alone; else as `backward_with_graph`."""
    return [_edge(gradient) for gradient in _gradients(loss, parameters, _clear(loss, info), module)]


def hessian_vector_product(
    graphs: Sequence[Graph],
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    *,
    scale: Tensor | float | None = None,
    shares: Sequence[Tensor] | None = None,
    module: nn.Module | None = None,
    keep_graphs: bool = False,
) -> list[Tensor]:
    """``H v`` of the summed losses of ``graphs``, exactly; with ``v = g`` it is CG's Hg.

    Gradients, buffers, RNG streams and ``vectors`` stay as they are. Hooks on the parameters do not run; those
    on other tensors of the graph do, once more.

    Args:
        graphs: one for each accumulated micro-batch.
        parameters: what they were made for, in the same order.
        vectors: one per parameter, of its shape and dtype; None stands for zero.
        scale: the factor on the losses (a GradScaler's), which is divided out.
        shares: a factor on each graph's loss; 1 where they are not given.
        module: its buffers are kept: checkpointing runs parts of the forward pass again.
        keep_graphs: leave the graphs fit for further products; otherwise their activations are freed on the way.

    Returns:
        One tensor per parameter, of its shape; zeros where the gradient does not depend on the parameter. To
        be read, not written: it may share memory with ``vectors``.

    Raises:
        CurvatureUnavailable: naming the operation that has no second derivative, and the way round.

    >>> w = torch.tensor([3.0], requires_grad=True)
    >>> graph = backward_with_graph(w.square().sum() / 2, [w])
    >>> hessian_vector_product([graph], [w], [w.grad])
    [tensor([3.])]
    """
    of_graphs: Sequence[Tensor | None] = shares or [None] * len(graphs)
    pairs = [
        (edge, vector if share is None else vector * share.to(vector.dtype))
        for graph, share in zip(graphs, of_graphs, strict=True)
        for edge, vector in zip(graph, vectors, strict=True)
        if edge is not None and vector is not None
    ]
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    products: dict[Tensor, Tensor] = {}
    if pairs and wanted:
        edges, weights = zip(*pairs, strict=True)
        with keep_state(module), silence_hooks(wanted), explaining():
            found = torch.autograd.grad(edges, wanted, weights, retain_graph=keep_graphs, allow_unused=True)
        products = {p: h for p, h in zip(wanted, found, strict=True) if h is not None}
    result = []
    for parameter in parameters:
        if (product := products.get(parameter)) is None:
            result.append(torch.zeros_like(parameter, requires_grad=False))
        else:
            dense = product.to_dense() if product.is_sparse else product
            result.append(dense if scale is None else dense / scale)
    return result


def _clear(loss: Tensor, info: GraphInfo | None) -> GraphInfo:
    """What is known of the graph of a loss; raises where something in it is known to stop a second derivative."""
    info = inspect_graph(loss) if info is None else info
    if info.blockers:
        raise CurvatureUnavailable(info.blockers[0])
    return info


def _gradients(
    loss: Tensor, parameters: Sequence[Tensor], info: GraphInfo, module: nn.Module | None
) -> list[Tensor | None]:
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    with keep_state(module), silence_hooks(wanted), no_severed_functions(info.functions), explaining():
        found = torch.autograd.grad(loss, wanted, _root(loss), create_graph=True, allow_unused=True)
    by_parameter = dict(zip(wanted, found, strict=True))
    return [by_parameter.get(parameter) for parameter in parameters]


def _plain_accumulation(leaf: Tensor, edges: Graph, position: int | None) -> LeafHook:
    """A hook that keeps the edge of the leaf's gradient, and lets the leaf accumulate as in a plain pass."""
    watched = bool(leaf._backward_hooks)

    def hook(gradient: Tensor | None) -> Tensor | None:
        # torch sets the gradient mode again for each node that it runs, so this holds for the accumulation into this
        # leaf only: it takes the memory over, copies it or adds in place, just as without a graph. With the
        # mode on, create_graph would replace leaf.grad by a tensor that refers to its own graph, which leaks.
        torch.set_grad_enabled(False)
        if gradient is None:
            return None
        if position is not None:
            edges[position] = _edge(gradient)
        # The leaf's other hooks expect a gradient without a graph. It is a copy, since accumulation could not
        # see that two leaves share it.
        return gradient.detach().clone() if watched else None

    return hook


def _root(loss: Tensor) -> Tensor:
    # It requires grad so that every gradient of the pass has a graph: see no_severed_functions.
    return torch.ones_like(loss, memory_format=torch.preserve_format).requires_grad_()


def _edge(gradient: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(gradient) if gradient is not None and gradient.requires_grad else None


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    dense = a.layout == b.layout == torch.strided
    return dense and a.stride() == b.stride() and same_bits(a, b)


@contextmanager
def _first_hooks(hooks: Sequence[tuple[Tensor, LeafHook]]) -> Iterator[None]:
    """Put each hook before those that its leaf has already."""
    handles: list[RemovableHandle] = []
    try:
        for leaf, hook in hooks:
            handles.append(leaf.register_hook(hook))
            put_first(handles[-1], leaf._backward_hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def explaining() -> Iterator[None]:
    """Raise what a double backward raises as `CurvatureUnavailable`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise explained(error) from error


@functools.cache
def _spend_cycle_warning() -> None:
    # torch warns once a process that backward(create_graph=True) leaks; backward_with_graph does not leak.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaf = torch.ones((), requires_grad=True)
        leaf.backward(create_graph=True)
        leaf.grad = None
