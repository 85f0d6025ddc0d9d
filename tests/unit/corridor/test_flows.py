import itertools
import math
import sys

import pytest
import torch
from torch import nn

from geomprobe.corridor import (
    ConvexCone,
    Quadratic,
    epoch_flow,
    gradient_descent,
    gradient_flow,
    momentum,
    runge_kutta_4,
)
from geomprobe.errors import GeomprobeError, UsageError

F64 = torch.float64


def quartic(theta):
    return theta.pow(4).sum() / 4 + theta[0] * theta[1]


def start(*values):
    return torch.tensor(values, dtype=F64)


def test_the_flow_of_a_quadratic_is_the_matrix_exponential():
    a = torch.tensor([[3.0, 1.0], [1.0, 0.5]], dtype=F64)
    bowl = Quadratic(a, start=start(1.0, -2.0))
    times = [0.0, 0.3, 2.0]
    expected = torch.stack([torch.linalg.matrix_exp(-t * a) @ bowl.theta.detach() for t in times])
    torch.testing.assert_close(gradient_flow(bowl, times), expected, rtol=1e-10, atol=1e-12)


def test_a_function_and_a_module_have_the_same_flow():
    bowl = Quadratic([[3.0, 1.0], [1.0, 0.5]], start=[1.0, -2.0])
    assert torch.equal(gradient_flow(bowl, [1.0]), gradient_flow(bowl.double().energy, [1.0], bowl.theta))


def test_the_flow_of_a_network_is_that_of_all_its_trainable_parameters_and_leaves_it_alone():
    torch.manual_seed(0)

    class Fit(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
            self.net[0].bias.requires_grad_(False)
            self.register_buffer("x", torch.randn(6, 2))

        def forward(self):
            return self.net(self.x).square().mean()

    fit = Fit()
    before = {name: value.clone() for name, value in fit.state_dict().items()}
    path = gradient_descent(fit, h=0.1, steps=3)
    flow = gradient_flow(fit, [0.0, 0.1])
    assert all(torch.equal(value, before[name]) for name, value in fit.state_dict().items())

    optimizer = torch.optim.SGD([p for p in fit.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        fit().backward()
        optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in fit.parameters() if p.requires_grad])
    torch.testing.assert_close(path[-1], moved)
    assert (path.dtype, flow.dtype) == (torch.float32, F64)
    torch.testing.assert_close(flow[0].float(), path[0])


def test_descent_and_momentum_are_torch_sgd():
    theta = start(1.0, -0.5)
    for beta in (0.0, 0.9):
        p = nn.Parameter(theta.clone())
        optimizer = torch.optim.SGD([p], lr=0.02, momentum=beta)
        path = momentum(quartic, 0.02, 10, theta, beta=beta)
        for t in range(1, 11):
            optimizer.zero_grad()
            quartic(p).backward()
            optimizer.step()
            torch.testing.assert_close(path[t], p.detach(), rtol=1e-13, atol=1e-14)
        if beta == 0.0:
            assert torch.equal(path, gradient_descent(quartic, 0.02, 10, theta))


def test_momentum_starts_with_the_velocity_it_is_given():
    path = momentum(quartic, 0.0, 2, start(0.0, 0.0), beta=0.5, velocity=start(4.0, 8.0))
    assert path.tolist() == [[0.0, 0.0], [2.0, 4.0], [3.0, 6.0]]


def test_runge_kutta_4_is_of_order_4():
    end = gradient_flow(quartic, [1.0], start(1.0, -0.5))[0]
    errors = [(runge_kutta_4(quartic, 1 / steps, steps, start(1.0, -0.5))[-1] - end).norm() for steps in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.1)


def test_the_epoch_flow_is_what_sgd_follows_in_expectation_over_shufflings():
    energies = [quartic, lambda t: (t - 1).square().sum(), lambda t: torch.sin(t[0] - 2 * t[1])]
    gradients = [torch.func.grad(energy) for energy in energies]
    begin = start(0.8, -0.3)

    def gap(h):
        """The distance between the mean end of an epoch and the modified flow's (CG eq. 19)."""
        ends = []
        for order in itertools.permutations(gradients):
            theta = begin
            for gradient in order:
                theta = theta - h * gradient(theta)
            ends.append(theta)
        flow, steps = begin, 8
        for _ in range(steps):  # midpoint rule: its own error is of the same order, and 64 times smaller
            half = flow + 3 * h / steps / 2 * sum(epoch_flow(energies, h, flow))
            flow = flow + 3 * h / steps * sum(epoch_flow(energies, h, half))
        return (torch.stack(ends).mean(0) - flow).norm()

    assert math.log2(gap(2e-3) / gap(1e-3)) == pytest.approx(3, abs=0.1)


def test_wrong_calls_are_refused():
    with pytest.raises(UsageError, match=r"must increase from 0, but they are \[1.0, 0.5\]"):
        gradient_flow(ConvexCone(), [1.0, 0.5])
    with pytest.raises(UsageError, match="the trajectory has no start: only a module has parameters to start"):
        gradient_descent(quartic, 0.1, 1)


def test_a_flow_that_blows_up_says_when():
    with pytest.raises(GeomprobeError, match=r"stopped between times 0.0 and 2.0, at time 0\.5"):
        gradient_flow(lambda theta: -theta.pow(3).sum() * 2 / 3, [2.0], start(1.0))  # 1 / (1 - 2t)


def test_without_scipy_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(UsageError, match=r"pip install 'geomprobe\[flows\]'"):
        gradient_flow(ConvexCone(), [0.1])
