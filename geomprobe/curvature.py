"""Hg of each optimizer step's own loss, by the route that fits the model.

Two routes lead to the exact product. The first differentiates the training graph itself again: no second
forward pass. The second evaluates the loss again on the side, by kernels that have a second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geomprobe.determinism import RNGState
from geomprobe.double_backward import (
    Graph,
    backward_with_graph,
    compared_backward,
    hessian_vector_product,
)
from geomprobe.errors import UsageError
from geomprobe.preflight import CurvatureUnavailable, Obstacle, coarsest_epsilon, dissect
from geomprobe.reevaluation import (
    Closure,
    ClosureMismatch,
    FiniteStep,
    finite_step,
    loss_tolerance,
    side_graph,
    side_product,
)

__all__ = [
    "ClosureMismatch",
    "Curvature",
    "CurvatureUnavailable",
    "FiniteStep",
    "Graph",
    "backward_with_graph",
    "finite_step",
    "hessian_vector_product",
    "side_product",
]


@dataclass
class _Part:
    """One micro-batch of the step: its graph, or what it takes to make one."""

    loss: Tensor
    closure: Closure | None
    rng: RNGState | None
    scale: Tensor | None
    obstacles: list[Obstacle]
    tolerance: float = 0.0
    graph: Graph | None = None


class Curvature:
    """``H v`` of the loss of each optimizer step: `backward` for each micro-batch, then one `product`.

    The first `backward` finds out which route fits, see `route`.

    Args:
        parameters: the tensors to differentiate by.
        module: its buffers are kept as they are by everything but the training's own passes.

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

    def __init__(self, parameters: Sequence[Tensor], module: nn.Module | None = None) -> None:
        self.route: str | None = None
        self._parameters = list(parameters)
        self._module = module
        self._parts: list[_Part] = []

    def backward(
        self,
        loss: Tensor,
        *,
        closure: Closure | None = None,
        rng: RNGState | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """``loss.backward()``, to the bit, remembering what the step's `product` needs.

        Under accumulation it is called once per micro-batch, and each one's graph stays in memory until
        `product`, or `discard` for a step that does not come.

        Args:
            loss: a scalar; times ``scale`` where a GradScaler is at work.
            closure: evaluates the same loss again, unscaled: the second route.
            rng: the RNG streams before this micro-batch's forward pass, for ``closure``.
            scale: the GradScaler's factor. ``H`` is of the unscaled loss.

        Raises:
            CurvatureUnavailable: the graph holds an operation without a second derivative, and there is no
                ``closure``.
        """
        value = loss.detach() if scale is None else loss.detach() / scale
        part = _Part(value, closure, rng, scale, dissect(loss).obstacles)
        if closure is None and part.obstacles:
            raise CurvatureUnavailable(part.obstacles[0])
        if closure is not None:
            part.tolerance = loss_tolerance(coarsest_epsilon(loss))
        self._parts.append(part)
        if part.obstacles or self.route == "closure":
            self.route = "closure"
            loss.backward()
            return
        try:
            part.graph = self._backward_with_graph(loss)
        except CurvatureUnavailable as blocked:  # found on the way; the gradients are complete
            self._fall_back(blocked)

    def product(self, vectors: Sequence[Tensor | None], *, keep: bool = False) -> list[Tensor]:
        """``H v`` of the summed losses since the last `product` or `discard`.

        Args:
            vectors: one per parameter, of its shape and dtype, such as the gradient; None stands for zero.
            keep: leave everything fit for another product with the same ``H``.

        Returns:
            One tensor per parameter, of its shape, to be read only; zeros where the gradient does not depend
            on the parameter.

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
        try:
            total = self._through_graphs(vectors, keep)
        except CurvatureUnavailable as blocked:
            self._fall_back(blocked)
            total = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        for part in self._parts:
            if part.graph is None:
                total = [a + b for a, b in zip(total, self._aside(part, vectors, keep), strict=True)]
        if not keep:
            self.discard()
        return total

    def over_step(self, direction: Sequence[Tensor | None], lr: float) -> FiniteStep | None:
        """How the gradient and the summed loss change over a whole step; see `finite_step`.

        Args:
            direction: one tensor per parameter, such as the gradient; None stands for zero.
            lr: the step along it, not 0.

        Returns:
            The change, or None where a micro-batch came without a closure that evaluates its loss again.

        Raises:
            ClosureMismatch: a closure returned another loss than its micro-batch's.
        """
        total: FiniteStep | None = None
        for part in self._parts:
            if part.closure is None:
                return None
            step = finite_step(
                part.closure,
                self._parameters,
                direction,
                lr,
                loss=part.loss,
                rng=part.rng,
                module=self._module,
                tolerance=part.tolerance,
            )
            if total is not None:
                turned = [a + b for a, b in zip(total.turned, step.turned, strict=True)]
                step = FiniteStep(turned, total.gap + step.gap)
            total = step
        return total

    def discard(self) -> None:
        """Forget the losses so far and free their graphs: the gradients they left were thrown away."""
        self._parts.clear()

    def _backward_with_graph(self, loss: Tensor) -> Graph:
        if self.route is None:
            graph, equal = compared_backward(loss, self._parameters, module=self._module)
            self.route = "graph" if equal else "graph, apart"
            return graph
        apart = self.route == "graph, apart"
        return backward_with_graph(loss, self._parameters, apart=apart, module=self._module)

    def _through_graphs(self, vectors: Sequence[Tensor | None], keep: bool) -> list[Tensor]:
        graphs = [part.graph for part in self._parts if part.graph is not None]
        return hessian_vector_product(
            graphs,
            self._parameters,
            vectors,
            scale=self._parts[0].scale,
            module=self._module,
            keep_graphs=keep,
        )

    def _aside(self, part: _Part, vectors: Sequence[Tensor | None], keep: bool) -> list[Tensor]:
        assert part.closure is not None
        with ExitStack() as plain_kernels:
            for plain in {obstacle.plain for obstacle in part.obstacles if obstacle.plain is not None}:
                plain_kernels.enter_context(plain())
            graph = side_graph(
                part.closure,
                self._parameters,
                loss=part.loss,
                rng=part.rng,
                module=self._module,
                tolerance=part.tolerance,
                scale=part.scale,
            )
            product = hessian_vector_product(
                [graph], self._parameters, vectors, scale=part.scale, module=self._module, keep_graphs=keep
            )
        part.graph = graph if keep else None
        return product

    def _fall_back(self, blocked: CurvatureUnavailable) -> None:
        """Take the second route for every part of this step and from then on, or say why there is none."""
        if any(part.closure is None for part in self._parts):
            self.discard()
            raise blocked
        self.route = "closure"
        for part in self._parts:
            part.graph = None
            part.obstacles.append(blocked.obstacle)
