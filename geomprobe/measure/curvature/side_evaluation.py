"""Evaluates a step's loss again beside the training run, which stays as it is, bit for bit.

This serves models whose training kernels have no second derivative, and the gradient at other weights.
CG is "Corridor Geometry in Gradient-Based Optimization" (Dherin, Rosca).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from geomprobe.errors import GeomprobeError
from geomprobe.measure.curvature.double_backward import Graph, graph_of
from geomprobe.reproducibility.isolation import RNGState, move_weights, restore_rng, side_computation

Closure = Callable[[], Tensor]


class ClosureMismatch(GeomprobeError):
    """A closure did not evaluate the loss of the step's own minibatch."""


class StepChange(NamedTuple):
    """What changes over a whole step along a direction ``v``, on one minibatch.

    Attributes:
        turned: ``(g(w) - g(w - lr v)) / lr``, one tensor per parameter.
        gap: ``E(w - lr v) - (E(w) - lr g(w).v)``, float64: how far the loss lies above its linear decrease.
    """

    turned: list[Tensor]
    gap: Tensor


@dataclass(frozen=True)
class SideLoss:
    """The loss of one micro-batch, to be evaluated again on the side.

    RNG streams, the buffers of ``module`` and every ``.grad`` are put back as they were. Each method raises
    `ClosureMismatch` where the closure returns another loss than the step's.

    Attributes:
        closure: takes nothing, runs the model on the step's own minibatch and returns the loss.
        value: the step's own loss, unscaled, for comparison.
        rng: the RNG streams as they were before the step's forward pass, which makes the dropout masks those
            of the training; None leaves them as they are.
        module: whose buffers and gradients are kept.
        tolerance: how far the two losses may differ, relatively; 0 means bitwise equal. It is for evaluations
            by other kernels than the training's, see `loss_tolerance`.

    >>> from geomprobe.measure.curvature.double_backward import hessian_vector_product
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> cubes = SideLoss(lambda: (w**3).sum(), torch.tensor(9.0))
    >>> hessian_vector_product([cubes.graph([w])], [w], [torch.ones(2)])
    [tensor([ 6., 12.])]
    >>> squares = SideLoss(lambda: (w**2).sum(), torch.tensor(5.0))
    >>> squares.over_step([w], [torch.ones(2)], 0.5)
    StepChange(turned=[tensor([2., 2.])], gap=tensor(0.5000, dtype=torch.float64))
    """

    closure: Closure
    value: Tensor
    rng: RNGState | None = None
    module: nn.Module | None = None
    tolerance: float = 0.0

    def graph(self, parameters: Sequence[Tensor], scale: Tensor | None = None) -> Graph:
        """The graph of the gradients by ``parameters`` of the loss, times ``scale``.

        Raises:
            CurvatureUnavailable: its graph holds an operation without a second derivative.
        """
        with side_computation(self.module, parameters), torch.enable_grad():
            loss = self._evaluated(parameters)
            return graph_of(loss if scale is None else loss * scale, parameters)

    def over_step(self, parameters: Sequence[Tensor], direction: Sequence[Tensor | None], lr: float) -> StepChange:
        """How gradient and loss change over a step of ``lr``, not 0, along ``direction``, whose None stands for zero.

        ``turned`` tends to ``H v`` as ``lr`` goes to 0 where the loss is twice differentiable on the way (CG theorem
        3.1 takes that limit). Across the kinks of a ReLU network it does not: ``g`` jumps there, and ``H`` does not
        see it. It is therefore a quantity of its own and never stands in for ``H v``. Inside a corridor ``turned``
        and, with ``v = g``, ``gap`` are 0 (CG lemma 2.9, proposition 2.10). ``g(w)`` is the closure's: the direction
        may be clipped or summed over micro-batches, ``g(w)`` is neither.
        """
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        with side_computation(self.module, parameters), torch.enable_grad():
            before = self._evaluated(parameters)
            here = torch.autograd.grad(before, wanted, materialize_grads=True)
            with move_weights(parameters, direction, -lr):
                self._rewind()
                after = self.closure()
                there = torch.autograd.grad(after, wanted, materialize_grads=True)
        gradient = dict(zip(wanted, here, strict=True))
        turned = {p: (a - b) / lr for p, a, b in zip(wanted, here, there, strict=True)}
        gap = after.detach().double() - before.detach().double()
        for parameter, along in zip(parameters, direction, strict=True):
            if along is not None and parameter in gradient:
                gap += lr * torch.sum(gradient[parameter].double() * along.double())
        return StepChange([turned[p] if p in turned else torch.zeros_like(p) for p in parameters], gap)

    def _evaluated(self, parameters: Sequence[Tensor]) -> Tensor:
        self._rewind()
        again = self.closure()
        if not isinstance(again, Tensor) or not again.requires_grad:
            raise ClosureMismatch(
                f"The closure returned {again!r}, which has no graph to differentiate. It must return the loss as a "
                "tensor, before .item() or .detach(), and outside torch.no_grad()."
            )
        if any(parameter.grad is not None for parameter in parameters):
            raise ClosureMismatch(
                "The closure called backward, which uses up the graph of its loss. It must only evaluate the loss and "
                "return it."
            )
        here, before = float(again.detach()), float(self.value)
        if here == before or (math.isnan(here) and math.isnan(before)):
            return again
        difference = abs(here - before) / max(abs(here), abs(before))
        if not difference <= self.tolerance:
            raise ClosureMismatch(
                f"The closure returned another loss than the step's: {here!r} against {before!r}, relative difference "
                f"{difference:.3g} (at most {self.tolerance:.3g} allowed). It must evaluate the step's own minibatch, "
                "with the model in the same mode, the same autocast, and the division by the number of micro-batches "
                "where there is one. Dropout draws the same mask only where the same kernel draws it."
            )
        return again

    def _rewind(self) -> None:
        if self.rng is not None:
            restore_rng(self.rng)


def loss_tolerance(epsilon: float) -> float:
    """How far two kernels may put one loss apart, relatively, where its coarsest type has this machine epsilon.

    Between the rounding of single operations (``epsilon``) and the half of all digits (``epsilon^(1/2)``) that
    no right evaluation loses: 6e-6 in float32, 2e-12 in float64, 3e-2 in bfloat16. Another dropout mask or
    another minibatch is further off.
    """
    return float(epsilon**0.75)
