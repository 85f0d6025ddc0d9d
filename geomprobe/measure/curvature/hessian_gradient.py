"""Hg of each optimizer step's own loss, by the route that fits the model.

Two routes lead to the exact product. The first differentiates the training graph itself again: no second
forward pass. The second evaluates the loss again on the side, by kernels that have a second derivative.

Across processes the loss is the global one: see `geomprobe.measure.curvature.global_loss`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from geomprobe.distributed.dtensor import is_dtensor
from geomprobe.distributed.layout import Layout
from geomprobe.errors import UsageError
from geomprobe.measure.curvature.autograd_graph import (
    Blocker,
    CurvatureUnavailable,
    GraphInfo,
    coarsest_epsilon,
    inspect_graph,
)
from geomprobe.measure.curvature.double_backward import (
    Graph,
    backward_with_graph,
    compared_backward,
    explaining,
    graph_of,
    hessian_vector_product,
)
from geomprobe.measure.curvature.global_loss import Reduction, fail_together, global_loss
from geomprobe.measure.curvature.side_evaluation import Closure, SideLoss, StepChange, loss_tolerance
from geomprobe.measure.gradient_sources import BackwardPass
from geomprobe.reproducibility.isolation import RNGState, keep_state, silence_hooks


@dataclass(eq=False)
class _Part:
    """One micro-batch of the step: the graph of its gradients, or what it takes to make one."""

    again: SideLoss | None  # None without a closure
    scale: Tensor | None
    blockers: list[Blocker]
    source: BackwardPass | None = None  # knows its share of the step's gradient
    root: tuple[GradientEdge, Tensor] | None = None  # of the loss, which the script may detach, and the gradient by it
    graph: Graph | None = None
    live: Tensor | None = None  # the loss with its own graph, where that of the gradients is made later


class Curvature:
    """``H v`` of the loss of each optimizer step: `backward` for each micro-batch, then one `product`.

    The first `backward` finds out which route fits, see `route`.

    Args:
        parameters: the tensors to differentiate by.
        module: its buffers are kept as they are by everything but the training's own passes.
        layout: how the training is spread over processes. Then vectors and products are local values, and every
            process must take the products at once.

    Attributes:
        route: None before the first `backward`; then ``"graph"`` (the training's own backward pass, made
            differentiable), ``"graph, apart"`` (a second backward pass, where a differentiable one has other
            bits) or ``"closure"`` (the loss evaluated again on the side).

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> curvature = Curvature([w])
    >>> curvature.backward((w**3).sum())
    >>> curvature.product([w.grad]), curvature.route
    ([tensor([ 18., 144.])], 'graph')
    """

    def __init__(
        self, parameters: Sequence[Tensor], module: nn.Module | None = None, layout: Layout | None = None
    ) -> None:
        self.route: str | None = None
        self._layout = Layout() if layout is None else layout
        self._loss = global_loss(parameters, self._layout, module)
        self._reduction = Reduction(self._loss, self._layout)
        self._module = module
        self._parts: list[_Part] = []

    def blocker(self, graph: GraphInfo, closure: Closure | None) -> Blocker | None:
        """What is known beforehand to stop the product of a loss with this graph; see `backward`."""
        wrong = [blocker for blocker in graph.blockers if blocker.wrong]
        if self._loss.blocker is not None or closure is not None:
            return self._loss.blocker or next(iter(wrong), None)
        return graph.blockers[0] if graph.blockers else None

    def backward(
        self,
        loss: Tensor,
        *,
        closure: Closure | None = None,
        rng: RNGState | None = None,
        scale: Tensor | None = None,
        graph: GraphInfo | None = None,
        source: BackwardPass | None = None,
    ) -> None:
        """``loss.backward()``, to the bit, remembering what the step's `product` needs.

        Under accumulation it is called once per micro-batch, and each one's graph stays in memory until
        `product`, or `discard` for a step that does not come.

        Args:
            loss: a scalar; times ``scale`` where a GradScaler is at work.
            closure: evaluates the same loss again, unscaled: the second route.
            rng: the RNG streams before this micro-batch's forward pass, for ``closure``.
            scale: the GradScaler's factor. ``H`` is of the unscaled loss.
            graph: what `inspect_graph` finds of ``loss``, where that is known.
            source: this pass; its ``share`` multiplies the loss in `product`, where it is known by then.

        Raises:
            CurvatureUnavailable: the graph holds an operation without a second derivative, and there is no
                ``closure``.
        """
        graph = inspect_graph(loss) if graph is None else graph
        if (blocker := self.blocker(graph, closure)) is not None:
            raise CurvatureUnavailable(blocker)
        again = None
        if closure is not None:
            value = loss.detach() if scale is None else loss.detach() / scale
            tolerance = loss_tolerance(coarsest_epsilon(loss))
            again = SideLoss(self._loss.beside(closure), value, rng, self._module, tolerance)
        root = get_gradient_edge(loss), torch.ones_like(loss, requires_grad=False)
        part = _Part(again, scale, graph.blockers, source, root)
        self._parts.append(part)
        try:
            known = self._reduction.factor is not None
            with contextlib.nullcontext() if known else self._reduction.watching(graph.leaves):
                self._backward(loss, part, graph)
        except BaseException:  # such as out of memory, which a script may catch
            if part in self._parts:
                self._parts.remove(part)
            raise

    def product(self, vectors: Sequence[Tensor | None], *, keep: bool = False) -> list[Tensor]:
        """``H v`` of the summed losses since the last `product` or `discard`.

        Args:
            vectors: one per parameter, of its shape and dtype, such as the gradient; None stands for zero.
            keep: leave everything fit for another product with the same ``H``.

        Raises:
            UsageError: there was no `backward` to take the product of.
            CurvatureUnavailable: naming the operation without a second derivative, and the way round.
            ClosureMismatch: a closure returned another loss than its micro-batch's.
        """
        if not self._parts:
            raise UsageError(
                "Curvature.product was called with no backward since the last product: no loss is known whose "
                "Hessian it would be. Call Curvature.backward(loss) instead of loss.backward()."
            )
        total = self._globally(lambda tensors: self._summed(tensors, vectors, keep))
        if not keep:
            self.discard()
        return total

    def gradient(self) -> list[Tensor] | None:
        """The gradient of the summed losses once more, from the graphs that are kept; None on the second route.

        It is the one that the backward passes gave, unless something that they saved was written to since.

        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature = Curvature([w])
        >>> curvature.backward((w**3).sum())
        >>> curvature.gradient()
        [tensor([ 3., 12.])]
        """
        if self.route == "closure":
            return None
        return self._globally(self._gradient)

    def _gradient(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        total = [torch.zeros_like(tensor, requires_grad=False) for tensor in wanted]
        shares: Sequence[Tensor | None] = self._shares(self._parts) or [None] * len(self._parts)
        with keep_state(self._module), silence_hooks(wanted), explaining():
            for part, share in zip(self._parts, shares, strict=True):
                assert part.root is not None
                edge, one = part.root
                found = torch.autograd.grad(
                    edge, wanted, one, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                dense = [g.to_dense() if g.is_sparse else g for g in found]
                total = [t + (g if share is None else g * share.to(g.dtype)) for t, g in zip(total, dense, strict=True)]
        by_tensor = dict(zip(wanted, total, strict=True))
        return [by_tensor[t] if t in by_tensor else torch.zeros_like(t, requires_grad=False) for t in tensors]

    def products_of(self, closure: Closure) -> Callable[[Sequence[Tensor | None]], list[Tensor]]:
        """``H v`` for any number of vectors ``v``, of the loss that ``closure`` evaluates, once, at the first.

        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> Curvature([w]).products_of(lambda: (w**3).sum())([torch.ones(2)])
        [tensor([ 6., 12.])]
        """
        graphs: list[Graph] = []

        def product(vectors: Sequence[Tensor | None], tensors: list[Tensor]) -> list[Tensor]:
            whole = self._loss.vectors(vectors, tensors)
            if not graphs:
                with keep_state(self._module), torch.enable_grad():
                    loss = self._loss.beside(closure)()
                    graphs.append(graph_of(loss, tensors, module=self._module))
            return hessian_vector_product(graphs, tensors, whole, module=self._module, keep_graphs=True)

        return lambda vectors: self._globally(functools.partial(product, vectors), scaled=False)

    def over_step(self, direction: Sequence[Tensor | None], lr: float) -> StepChange | None:
        """How the gradient and the summed loss change over a whole step; see `SideLoss.over_step`.

        None where a micro-batch came without a closure that evaluates its loss again, or that loss is a DTensor.
        """
        again = [part.again for part in self._parts]
        losses = [loss for loss in again if loss is not None and not is_dtensor(loss.value)]
        if self._layout.largest([len(again) - len(losses)], self._device)[0]:
            return None
        gap = torch.zeros((), dtype=torch.float64, device=self._device)

        def turned(tensors: list[Tensor]) -> list[Tensor]:
            along = self._loss.vectors(direction, tensors)
            total = [torch.zeros_like(t, requires_grad=False) for t in tensors]
            for loss in losses:
                change = loss.over_step(tensors, along, lr)
                total = [a + b for a, b in zip(total, change.turned, strict=True)]
                gap.add_(change.gap)
            return total

        found = self._globally(turned)
        mean = self._layout.exchange(gap.new_empty(0), gap.reshape(1))[1][0]
        return StepChange(found, mean * (self._reduction.factor or 1.0))

    def discard(self) -> None:
        """Forget the losses so far and free their graphs: the gradients they left were thrown away."""
        if not self._parts:
            return
        self._parts.clear()
        self._reduction.discard()

    @property
    def _device(self) -> torch.device:
        return self._loss.parameters[0].device

    def _globally(self, compute: Callable[[list[Tensor]], list[Tensor]], *, scaled: bool = True) -> list[Tensor]:
        """What ``compute`` finds of this process's loss, made that of the global one, on every process."""
        with self._loss.tensors() as tensors:
            if self._layout.kind == "one process":
                return self._loss.mean(compute(tensors))
            failure: Exception | None = None
            found: list[Tensor] = []
            try:
                found = compute(tensors)
            except Exception as error:
                failure = error
            fail_together(self._layout, failure, self._device)
            factor = self._reduction.find(tensors) if scaled else 1.0
            mean = self._loss.mean(found)
        return mean if factor == 1.0 else [factor * tensor for tensor in mean]

    def _backward(self, loss: Tensor, part: _Part, info: GraphInfo) -> None:
        if part.blockers or self.route == "closure":
            self.route = "closure"
            loss.backward()
            return
        if self._loss.later:
            self.route = "graph, apart"
            loss.backward(retain_graph=True)
            part.live = loss
            return
        parameters, module = self._loss.parameters, self._module
        try:
            if self.route is None:
                part.graph, equal = compared_backward(loss, parameters, module=module, info=info)
                self.route = "graph" if equal else "graph, apart"
            else:
                apart = self.route == "graph, apart"
                part.graph = backward_with_graph(loss, parameters, apart=apart, module=module, info=info)
        except CurvatureUnavailable as blocked:  # found on the way; the gradients are complete
            self._fall_back(blocked)

    def _summed(self, tensors: Sequence[Tensor], vectors: Sequence[Tensor | None], keep: bool) -> list[Tensor]:
        whole, module = self._loss.vectors(vectors, tensors), self._module
        try:
            for part in self._parts:
                if part.live is not None:
                    part.graph, part.live = graph_of(part.live, tensors, module=module), None
            made = [part for part in self._parts if part.graph is not None]
            graphs = [part.graph for part in made if part.graph is not None]
            scale, shares = self._parts[0].scale, self._shares(made)
            total = hessian_vector_product(
                graphs, tensors, whole, scale=scale, shares=shares, module=module, keep_graphs=keep
            )
        except CurvatureUnavailable as blocked:
            self._fall_back(blocked)
            total = [torch.zeros_like(t, requires_grad=False) for t in tensors]
        for part in self._parts:
            if part.graph is None:
                product = self._on_the_side(part, tensors, whole, keep)
                total = [a + b for a, b in zip(total, product, strict=True)]
        return total

    def _on_the_side(
        self, part: _Part, tensors: Sequence[Tensor], vectors: Sequence[Tensor | None], keep: bool
    ) -> list[Tensor]:
        assert part.again is not None
        with ExitStack() as plain_kernels:
            for plain in {blocker.plain for blocker in part.blockers if blocker.plain is not None}:
                plain_kernels.enter_context(plain())
            graph = part.again.graph(tensors, part.scale)
            product = hessian_vector_product(
                [graph],
                tensors,
                vectors,
                scale=part.scale,
                shares=self._shares([part]),
                module=self._module,
                keep_graphs=keep,
            )
        part.graph = graph if keep else None
        return product

    def _shares(self, parts: Sequence[_Part]) -> list[Tensor] | None:
        """What each part is multiplied by; None where that is 1, as for a step of one backward pass."""
        shares = [part.source.share for part in parts if part.source is not None and part.source.share is not None]
        return shares if len(self._parts) > 1 and len(shares) == len(parts) else None

    def _fall_back(self, blocked: CurvatureUnavailable) -> None:
        """Take the second route for every part of this step and from then on, or say why there is none."""
        if any(part.again is None for part in self._parts):
            self.discard()
            raise blocked
        self.route = "closure"
        for part in self._parts:
            part.graph = part.live = None
            part.blockers.append(blocked.blocker)
