"""Trajectories through a landscape: the gradient flow, and the discrete methods that CG compares with it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from geomprobe.errors import GeomprobeError, UsageError

Energy = Callable[[Tensor], Tensor]


def gradient_flow(
    energy: Energy | nn.Module,
    times: Sequence[float],
    start: Tensor | None = None,
    *,
    rtol: float = 1e-12,
    atol: float = 1e-12,
) -> Tensor:
    """The solution of ``theta' = -g(theta)`` at each of ``times`` (CG section 2), in float64.

    The integrator is SciPy's DOP853, an adaptive Runge-Kutta method of order 8. It ends a step on each of the
    times, so nothing is interpolated. The flow is not defined on a boundary between glued corridors and at the apex
    of a cone: there the integrator fails or takes very small steps, so end before it.

    Args:
        energy: a function from ``theta`` [n] to a scalar, or a module whose ``forward()`` is the loss of its
            own parameters (a copy is used; the flow is that of all its trainable parameters as one vector).
        times: the times of the result, increasing, not negative.
        start: ``theta`` at time 0, [n]; for a module, None means its parameters as they are.
        rtol, atol: tolerances of a step.

    Returns:
        [len(times), n], float64, on the start's device.

    Raises:
        UsageError: SciPy is missing, the times do not increase, or a function was given without a start.
        GeomprobeError: the integrator failed.

    >>> flow = gradient_flow(lambda theta: theta.square().sum() / 2, [0.0, 1.0], torch.tensor([2.0]))
    >>> [round(x, 10) for x in (flow.flatten() / 2).tolist()]  # 1 and exp(-1)
    [1.0, 0.3678794412]
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise UsageError(
            "the gradient flow needs SciPy's integrators: python -m pip install 'geomprobe[flows]'"
        ) from error
    energy, point = _as_function(energy, start, torch.float64)
    moments = [0.0, *map(float, times)]
    if not all(before <= after for before, after in itertools.pairwise(moments)):
        raise UsageError(f"the times of a flow must increase from 0, but they are {list(times)}")

    def velocity(_: float, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        slope = -_gradient(energy, torch.from_numpy(theta).to(point))
        return slope.cpu().numpy()

    path, theta = [], point.cpu().numpy()
    for begin, end in itertools.pairwise(moments):
        if end > begin:
            solution = solve_ivp(velocity, (begin, end), theta, method="DOP853", rtol=rtol, atol=atol)
            if not solution.success:
                raise GeomprobeError(
                    f"the gradient flow stopped between times {begin} and {end}, at time {solution.t[-1]}: "
                    f"{solution.message} A boundary between corridors or an apex may lie there: end before it"
                )
            theta = solution.y[:, -1]
        path.append(torch.from_numpy(theta).to(point))
    return torch.stack(path)


def gradient_descent(energy: Energy | nn.Module, h: float, steps: int, start: Tensor | None = None) -> Tensor:
    """Iterates of ``theta' = theta - h g(theta)``.

    Args:
        energy, start: as for `gradient_flow`.
        h: learning rate.
        steps: how many to take.

    Returns:
        [steps + 1, n], the start first, in the start's dtype.

    >>> gradient_descent(lambda theta: theta.square().sum() / 2, 0.5, 2, torch.tensor([4.0])).flatten()
    tensor([4., 2., 1.])
    """
    energy, point = _as_function(energy, start)
    return _iterate(lambda theta: theta - h * _gradient(energy, theta), point, steps)


def runge_kutta_4(energy: Energy | nn.Module, h: float, steps: int, start: Tensor | None = None) -> Tensor:
    """Iterates of the classical Runge-Kutta method on the gradient flow (CG eq. 14 to 18).

    Eq. 18 is printed without the factor h, which is here: ``theta + h (k1 + 2 k2 + 2 k3 + k4) / 6``.
    Arguments and result are `gradient_descent`'s.

    >>> path = runge_kutta_4(lambda theta: theta.square().sum() / 2, 0.1, 10, torch.tensor([1.0]))
    >>> round(path[-1].item(), 5)  # exp(-1)
    0.36788
    """
    energy, point = _as_function(energy, start)

    def advance(theta: Tensor) -> Tensor:
        k1 = -_gradient(energy, theta)
        k2 = -_gradient(energy, theta + h / 2 * k1)
        k3 = -_gradient(energy, theta + h / 2 * k2)
        k4 = -_gradient(energy, theta + h * k3)
        return theta + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return _iterate(advance, point, steps)


def momentum(
    energy: Energy | nn.Module,
    h: float,
    steps: int,
    start: Tensor | None = None,
    *,
    beta: float = 0.9,
    velocity: Tensor | None = None,
) -> Tensor:
    """Iterates of ``v = beta v - h g(theta)``, ``theta = theta + v`` (CG eq. 4 to 6).

    Args:
        energy, h, steps, start: as for `gradient_descent`.
        beta: decay rate.
        velocity: the initial ``v``, [n]; None is zero, as in eq. 4.

    Returns:
        [steps + 1, n], the start first.

    >>> momentum(lambda theta: theta.sum(), 1.0, 3, torch.tensor([0.0]), beta=0.5).flatten()
    tensor([ 0.0000, -1.0000, -2.5000, -4.2500])
    """
    energy, point = _as_function(energy, start)
    speed = torch.zeros_like(point) if velocity is None else velocity

    def advance(theta: Tensor) -> Tensor:
        nonlocal speed
        speed = beta * speed - h * _gradient(energy, theta)
        return theta + speed

    return _iterate(advance, point, steps)


class EpochFlow(NamedTuple):
    """The three terms of CG eq. 20, each [n]; their sum is the velocity of the modified flow."""

    gradient: Tensor
    gradient_norm: Tensor
    batch_consistency: Tensor


def epoch_flow(energies: Sequence[Energy], h: float, theta: Tensor) -> EpochFlow:
    r"""The flow of SGD over an epoch, in expectation over the order of its minibatches (CG eq. 20).

    .. math:: \dot\theta = -g - \tfrac h4 \nabla\|g\|^2 - \tfrac h{4m} \sum_i \nabla\|g - g_i\|^2

    Args:
        energies: the loss of each of the m minibatches; their mean is the loss whose gradient is g.
        h: learning rate.
        theta: the point, [n].

    >>> energies = [lambda t: t.square().sum(), lambda t: (t - 2).square().sum()]
    >>> [term.tolist() for term in epoch_flow(energies, 0.5, torch.tensor([3.0]))]
    [[-4.0], [-2.0], [-0.0]]
    """
    gradients = [torch.func.grad(energy) for energy in energies]

    def mean(point: Tensor) -> Tensor:
        return torch.stack([gradient(point) for gradient in gradients]).mean(0)

    def inconsistency(point: Tensor) -> Tensor:
        center = mean(point)
        return torch.stack([(center - gradient(point)).square().sum() for gradient in gradients]).mean()

    norm_term = torch.func.grad(lambda point: mean(point).square().sum())(theta)
    return EpochFlow(-mean(theta), -h / 4 * norm_term, -h / 4 * torch.func.grad(inconsistency)(theta))


def _as_function(
    energy: Energy | nn.Module, start: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Energy, Tensor]:
    """The energy as a function of one vector, and that vector at the start; for a module, all its parameters."""
    if not isinstance(energy, nn.Module):
        if start is None:
            raise UsageError("the trajectory has no start: only a module has parameters to start from, so give one")
        return energy, start.detach().to(dtype or start.dtype)
    module = copy.deepcopy(energy).to(dtype)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in parameters.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        return torch.func.functional_call(module, values, ())

    point = parameters_to_vector(parameters.values()) if start is None else start
    return loss, point.detach().to(dtype or point.dtype)


def _gradient(energy: Energy, theta: Tensor) -> Tensor:
    with torch.enable_grad():
        point = theta.detach().requires_grad_()
        return torch.autograd.grad(energy(point), point)[0]


def _iterate(advance: Energy, start: Tensor, steps: int) -> Tensor:
    path = [start]
    for _ in range(steps):
        path.append(advance(path[-1]))
    return torch.stack(path)
