"""Evaluates a step's loss again beside the training run, which stays as it is, bit for bit.

This serves models whose training kernels have no second derivative, and the gradient at other weights.
CG is "Corridor Geometry in Gradient-Based Optimization" (Dherin, Rosca).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from geomprobe.errors import GeomprobeError
from geomprobe.measure.curvature.double_backward import Graph, graph_of
from geomprobe.reproducibility.isolation import move_weights, side_computation
from geomprobe.reproducibility.rng import RNGState, restore_rng

Closure = Callable[[], Tensor]


class ClosureMismatch(GeomprobeError):
    """A closure did not evaluate the loss of the step's own minibatch."""


def side_graph(
    closure: Closure,
    parameters: Sequence[Tensor],
    *,
    loss: Tensor,
    rng: RNGState | None = None,
    module: nn.Module | None = None,
    tolerance: float = 0.0,
    scale: Tensor | None = None,
) -> Graph:
    """The graph of the gradients of the loss that ``closure`` evaluates, with the run left untouched.

    RNG streams, the buffers of ``module`` and every ``.grad`` are put back as they were.

    Args:
        closure: takes nothing, runs the model on the step's own minibatch and returns the loss.
        parameters: the tensors to differentiate by.
        loss: the step's own loss, unscaled, for comparison.
        rng: the RNG streams as they were before the step's forward pass, which makes the dropout masks those
            of the training; None leaves them as they are.
        module: whose buffers and gradients are kept.
        tolerance: how far the two losses may differ, relatively; 0 means bitwise equal. It is for evaluations
            by other kernels than the training's, see `loss_tolerance`.
        scale: a factor on the evaluated loss before it is differentiated.

    Raises:
        ClosureMismatch: the closure returned another loss than the step's.
        CurvatureUnavailable: its graph holds an operation without a second derivative.

    >>> from geomprobe.measure.curvature.double_backward import hessian_vector_product
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> graph = side_graph(lambda: (w**3).sum(), [w], loss=torch.tensor(9.0))
    >>> hessian_vector_product([graph], [w], [torch.ones(2)])
    [tensor([ 6., 12.])]
    """
    with side_computation(module, parameters), torch.enable_grad():
        again = _evaluated(closure, parameters, loss, rng, tolerance)
        return graph_of(again if scale is None else again * scale, parameters)


class FiniteStep(NamedTuple):
    """What changes over a whole step along a direction ``v``, on one minibatch.

    Attributes:
        turned: ``(g(w) - g(w - lr v)) / lr``, one tensor per parameter.
        gap: ``E(w - lr v) - (E(w) - lr g(w).v)``, float64: how far the loss lies above its linear decrease.
    """

    turned: list[Tensor]
    gap: Tensor


def finite_step(
    closure: Closure,
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    lr: float,
    *,
    loss: Tensor,
    rng: RNGState | None = None,
    module: nn.Module | None = None,
    tolerance: float = 0.0,
) -> FiniteStep:
    """How gradient and loss change over a step along ``direction``, with the run left untouched.

    ``turned`` tends to ``H v`` as ``lr`` goes to 0 where the loss is twice differentiable on the way (CG theorem
    3.1 takes that limit). Across the kinks of a ReLU network it does not: ``g`` jumps there, and ``H`` does not
    see it. It is therefore a quantity of its own and never stands in for ``H v``. Inside a corridor ``turned``
    and, with ``v = g``, ``gap`` are 0 (CG lemma 2.9, proposition 2.10).

    Args:
        direction: ``v``, one tensor per parameter, None for zero. ``g(w)`` is evaluated by ``closure``: the
            direction may be clipped or summed over micro-batches, ``g(w)`` is neither.
        lr: the step along ``v``, not 0.
        closure, parameters, loss, rng, module, tolerance: as for `side_graph`.

    Raises:
        ClosureMismatch: the closure returned another loss than the step's at the step's own weights.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> step = finite_step(lambda: (w**2).sum(), [w], [torch.ones(2)], 0.5, loss=torch.tensor(5.0))
    >>> step.turned, float(step.gap)
    ([tensor([2., 2.])], 0.5)
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    with side_computation(module, parameters), torch.enable_grad():
        before = _evaluated(closure, parameters, loss, rng, tolerance)
        here = torch.autograd.grad(before, wanted, materialize_grads=True)
        with move_weights(parameters, direction, -lr):
            _rewind(rng)
            after = closure()
            there = torch.autograd.grad(after, wanted, materialize_grads=True)
    gradient = dict(zip(wanted, here, strict=True))
    turned = {p: (a - b) / lr for p, a, b in zip(wanted, here, there, strict=True)}
    gap = after.detach().double() - before.detach().double()
    for parameter, along in zip(parameters, direction, strict=True):
        if along is not None and parameter in gradient:
            gap += lr * torch.sum(gradient[parameter].double() * along.double())
    return FiniteStep([turned[p] if p in turned else torch.zeros_like(p) for p in parameters], gap)


def loss_tolerance(epsilon: float) -> float:
    """How far two kernels may put one loss apart, relatively: ``epsilon^(3/4)``.

    Between the rounding of single operations (``epsilon``) and the half of all digits (``epsilon^(1/2)``) that
    no right evaluation loses: 6e-6 in float32, 2e-12 in float64, 3e-2 in bfloat16. Another dropout mask or
    another minibatch is further off.

    Args:
        epsilon: the machine epsilon of the coarsest type that the loss passes through.

    >>> loss_tolerance(2.0**-52)
    1.8189894035458565e-12
    """
    return float(epsilon**0.75)


def _evaluated(
    closure: Closure, parameters: Sequence[Tensor], loss: Tensor, rng: RNGState | None, tolerance: float
) -> Tensor:
    _rewind(rng)
    again = closure()
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
    here, before = float(again.detach()), float(loss)
    if here == before or (math.isnan(here) and math.isnan(before)):
        return again
    difference = abs(here - before) / max(abs(here), abs(before))
    if not difference <= tolerance:
        raise ClosureMismatch(
            f"The closure returned another loss than the step's: {here!r} against {before!r}, relative difference "
            f"{difference:.3g} (at most {tolerance:.3g} allowed). It must evaluate the step's own minibatch, with "
            "the model in the same mode, the same autocast, and the division by the number of micro-batches where "
            "there is one. Dropout draws the same mask only where the same kernel draws it."
        )
    return again


def _rewind(rng: RNGState | None) -> None:
    if rng is not None:
        restore_rng(rng)
