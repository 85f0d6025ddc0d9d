"""What the two papers prove, one test a statement, in float64 against dense autograd and closed forms."""

import math

import numpy as np
import pytest
import torch

from geomprobe.corridor import (
    CLR,
    ConcaveCone,
    ConvexCone,
    GluedCorridors,
    LinearPiece,
    Quadratic,
    RuledSurface,
    SinusoidalMixture,
    epoch_flow,
    gradient_descent,
    gradient_flow,
    momentum,
    runge_kutta_4,
)
from geomprobe.trace import geometry

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


# A landscape, and a point from which the line of steepest descent stays in one corridor for a time of 1.
CORRIDORS = {
    "convex cone": ConvexCone(2.0, center=vector(1.0, 0.0, 0.0), start=vector(3.0, 1.0, -2.0)),
    "concave cone": ConcaveCone(2.0, beta=9.0, start=vector(3.0, 1.0, -2.0)),
    "linear piece": LinearPiece(vector(1.0, -2.0), start=vector(3.0, 1.0)),
    "ruled surface": RuledSurface(1.5, axes=vector(2.0, 0.5), start=vector(3.0, 2.5)),
    "ruled surface in 4-d": RuledSurface(1.5, axes=vector(2.0, 0.5, 1.0, 3.0), start=vector(3.0, 2.5, 1.0, 2.0)),
    "glued corridors": GluedCorridors.figure_1b(vector(-3.0, 1.5)),
}
ONE_PIECE = {name: landscape for name, landscape in CORRIDORS.items() if name != "glued corridors"}
CURVED = {
    "quadratic": Quadratic(vector(3.0, 1.0, 0.2).diag(), b=vector(1.0, 0.0, -1.0), start=vector(1.0, -2.0, 0.5)),
    "sinusoidal mixture": SinusoidalMixture(3, dtype=F64),
}

each_corridor = pytest.mark.parametrize("landscape", CORRIDORS.values(), ids=CORRIDORS.keys())
few_corridors = pytest.mark.parametrize(  # where the flow is integrated, which takes a second
    "landscape",
    [
        pytest.param(landscape, marks=() if name in ("convex cone", "glued corridors") else pytest.mark.slow, id=name)
        for name, landscape in CORRIDORS.items()
    ],
)
each_curved = pytest.mark.parametrize("landscape", CURVED.values(), ids=CURVED.keys())


def gradient(landscape, theta=None):
    return torch.func.grad(landscape.energy)(landscape.theta.detach() if theta is None else theta)


def hessian(landscape, theta=None):
    # Reverse over reverse: torch.func.hessian's forward mode warns of torch.jit in some releases.
    point = landscape.theta.detach() if theta is None else theta
    return torch.func.jacrev(torch.func.grad(landscape.energy))(point)


def hg(landscape, theta=None):
    return hessian(landscape, theta) @ gradient(landscape, theta)


def around(landscape, count=100):
    """Points spread about a landscape, all of which are off its seams with probability one."""
    source = torch.Generator().manual_seed(0)
    return 3 * torch.randn(count, landscape.theta.numel(), dtype=F64, generator=source)


def products(g, d):
    """``g.g``, ``g.d`` and ``d.d``, for `geomprobe.trace.geometry`."""
    return (g * g).sum(-1).numpy(), (g * d).sum(-1).numpy(), (d * d).sum(-1).numpy()


# Corridors (CG section 2).


@each_corridor
def test_cg_examples_2_2_to_2_6_hg_vanishes_off_the_seams(landscape):
    at_each = torch.func.vmap(lambda theta: hg(landscape, theta))(around(landscape))
    assert at_each.norm(dim=1).max() < 1e-10


@each_corridor
def test_cg_examples_2_2_to_2_6_are_not_all_linear(landscape):
    curved = hessian(landscape).norm() > 1e-3
    assert curved == (not isinstance(landscape, LinearPiece))


def test_cg_example_2_7_the_quadratic_decays_at_no_constant_speed():
    bowl = Quadratic(torch.eye(2, dtype=F64), start=vector(3.0, -1.0))
    torch.testing.assert_close(hg(bowl), bowl.theta.detach())
    times = [0.0, 0.5, 3.0]
    expected = torch.exp(-vector(*times))[:, None] * bowl.theta.detach()
    torch.testing.assert_close(gradient_flow(bowl, times), expected, rtol=1e-10, atol=0)


@each_curved
def test_cg_lemma_2_8_minus_hg_is_the_rate_of_change_of_the_gradient_under_the_flow(landscape):
    e = 1e-4
    path = gradient_flow(landscape, [0.0, e, 2 * e])
    rate = (gradient(landscape, path[2]) - gradient(landscape, path[0])) / (2 * e)
    torch.testing.assert_close(rate, -hg(landscape, path[1]), rtol=1e-3, atol=1e-6)


@each_corridor
def test_cg_lemma_2_9_the_gradient_is_constant_on_a_line_of_steepest_descent(landscape):
    theta, g = landscape.theta.detach(), gradient(landscape)
    for t in (0.1, 0.5, 1.0):
        torch.testing.assert_close(gradient(landscape, theta - t * g), g, rtol=1e-12, atol=1e-12)


@each_corridor
def test_cg_prop_2_10_the_loss_decreases_linearly(landscape):
    theta, g = landscape.theta.detach(), gradient(landscape)
    for t in (0.1, 0.5, 1.0):
        expected = landscape.energy(theta) - t * g.square().sum()
        torch.testing.assert_close(landscape.energy(theta - t * g), expected, rtol=1e-12, atol=1e-12)


@each_curved
def test_cg_prop_2_10_fails_outside_corridors_by_half_g_hg(landscape):
    theta, g = landscape.theta.detach(), gradient(landscape)
    t = 1e-4 / g.norm()
    gap = landscape.energy(theta - t * g) - landscape.energy(theta) + t * g.square().sum()
    torch.testing.assert_close(gap, t**2 / 2 * (g @ hg(landscape)), rtol=1e-2, atol=0)


@pytest.mark.parametrize("landscape", ONE_PIECE.values(), ids=ONE_PIECE.keys())
def test_cg_theorem_2_11_makes_a_corridor_a_solution_of_the_eikonal_equation(landscape):
    """Hg is half the gradient of ||g||^2, so that ||g|| is one number on a connected corridor."""
    points = around(landscape)
    on_corridor = points[landscape.energy(points) != 0]
    assert len(on_corridor) > 50
    norms = torch.func.vmap(lambda theta: gradient(landscape, theta))(on_corridor).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(len(norms)), rtol=1e-12, atol=0)


# Gradient descent and the flow (CG section 3).


@few_corridors
def test_cg_theorem_3_1_in_a_corridor_descent_steps_on_the_flow(landscape):
    h, steps = 0.1, 10
    flow = gradient_flow(landscape, [n * h for n in range(steps + 1)])
    torch.testing.assert_close(gradient_descent(landscape, h, steps), flow, rtol=1e-10, atol=1e-10)


@each_curved
def test_cg_theorem_3_1_outside_descent_leaves_the_flow_by_half_h_squared_hg_to_third_order(landscape):
    def remainder(h):
        flow = gradient_flow(landscape, [h], rtol=1e-13, atol=1e-14)[0]
        gap = flow - gradient_descent(landscape, h, 1)[1]
        leading = h**2 / 2 * hg(landscape)
        drift = geometry.flow_drift(h, hg(landscape).square().sum().item())
        assert leading.norm().item() == pytest.approx(float(drift), rel=1e-12)
        return (gap - leading).norm() / gap.norm(), (gap - leading).norm()

    scale = 1e-2 / hessian(landscape).norm().item()
    (share, coarse), (_, fine) = remainder(scale), remainder(scale / 2)
    assert share < 0.05
    assert math.log2(coarse / fine) == pytest.approx(3, abs=0.1)


# The corridor learning rate (CG section 4).


@pytest.mark.parametrize(
    ("landscape", "e_star"),
    [
        (CORRIDORS["convex cone"], 0.0),
        (CORRIDORS["linear piece"], 0.0),
        (CORRIDORS["ruled surface"], 0.0),
        (CORRIDORS["ruled surface in 4-d"], 0.0),
        (CORRIDORS["glued corridors"], 0.0),
        (CORRIDORS["concave cone"], -5.0),
    ],
    ids=[
        "convex cone",
        "linear piece",
        "ruled surface",
        "ruled surface in 4-d",
        "glued",
        "concave cone to -5",
    ],
)
def test_cg_eq_3_in_a_corridor_clr_reaches_the_minimum_in_one_step(landscape, e_star):
    landscape.zero_grad()
    before = landscape.theta.detach().clone()
    loss = landscape()
    loss.backward()
    optimizer = CLR(landscape.parameters(), e_star=e_star)
    optimizer.step(loss=loss)
    after = landscape().item()
    square = landscape.theta.grad.square().sum().item()
    landscape.theta.data.copy_(before)
    assert after == pytest.approx(e_star, abs=1e-12)
    rate = optimizer.param_groups[0]["lr"].item()
    assert rate == pytest.approx(float(geometry.clr(loss.item() - e_star, square)), rel=1e-14)


# Beyond gradient descent (CG appendix A).


@each_corridor
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_cg_lemma_a_1_momentum_in_a_corridor(landscape, beta):
    h, steps = 0.01, 10
    path = momentum(landscape, h, steps, beta=beta)
    theta, g = landscape.theta.detach(), gradient(landscape)
    for t in range(1, steps + 1):
        velocity = -h * (1 - beta**t) / (1 - beta) * g
        place = theta - h / (1 - beta) * sum(1 - beta**i for i in range(1, t + 1)) * g
        torch.testing.assert_close(path[t] - path[t - 1], velocity, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(path[t], place, rtol=1e-12, atol=1e-12)


@each_corridor
def test_cg_remark_a_2_momentum_keeps_to_the_line_only_if_its_velocity_is_aligned_with_it(landscape):
    g = gradient(landscape)
    direction = g / g.norm()

    def distance_from_line(velocity):
        moved = momentum(landscape, 0.01, 10, beta=0.5, velocity=velocity)[-1] - landscape.theta.detach()
        return (moved - (moved @ direction) * direction).norm().item()

    across = torch.zeros_like(g)
    across[:2] = vector(-g[1], g[0])
    assert distance_from_line(-0.1 * g) < 1e-12
    assert distance_from_line(0.1 * across) > 1e-2


@few_corridors
def test_cg_remark_a_3_momentum_is_the_flow_at_another_speed(landscape):
    h, beta, steps = 0.01, 0.9, 10
    times = np.cumsum([0.0, *(h * (1 - beta**n) / (1 - beta) for n in range(1, steps + 1))])
    flow = gradient_flow(landscape, times.tolist())
    torch.testing.assert_close(momentum(landscape, h, steps, beta=beta), flow, rtol=1e-10, atol=1e-10)


@few_corridors
def test_cg_a_2_runge_kutta_4_follows_the_flow_in_a_corridor(landscape):
    h, steps = 0.1, 10
    flow = gradient_flow(landscape, [n * h for n in range(steps + 1)])
    torch.testing.assert_close(runge_kutta_4(landscape, h, steps), flow, rtol=1e-10, atol=1e-10)


@each_corridor
def test_cg_a_3_in_a_corridor_only_the_batch_consistency_term_remains(landscape):
    theta, h = landscape.theta.detach(), 0.1

    def noise(point):
        return torch.sin(point).square().sum()

    batches = [lambda p: landscape.energy(p) + noise(p), lambda p: landscape.energy(p) - noise(p)]
    terms = epoch_flow(batches, h, theta)
    torch.testing.assert_close(terms.gradient, -gradient(landscape))
    assert terms.gradient_norm.norm() < 1e-12
    # Both batches differ from their mean by the noise, whose squared gradient is sin(2 theta)^2.
    torch.testing.assert_close(terms.batch_consistency, -h / 4 * 2 * torch.sin(4 * theta))


@each_curved
def test_cg_a_3_outside_the_gradient_norm_term_is_half_h_hg(landscape):
    h = 0.1
    terms = epoch_flow([landscape.energy, landscape.energy], h, landscape.theta.detach())
    torch.testing.assert_close(terms.gradient_norm, -h / 2 * hg(landscape))
    assert terms.batch_consistency.norm() == 0


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_cg_appendix_c_quadratics_have_no_corridors_unless_linear(rank):
    source = torch.Generator().manual_seed(rank)
    factor = torch.randn(3, rank, dtype=F64, generator=source)
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=F64)[:rank]
    b = torch.randn(3, dtype=F64, generator=source)
    quadratic = Quadratic((factor * signs) @ factor.T, b=b, start=vector(0.0, 0.0, 0.0))
    # Hg is affine in theta, so it vanishes on an open set only if it does on the corners of a simplex in it.
    corners = [1e-3 * corner for corner in torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()]
    vanishes = all(hg(quadratic, corner).norm() < 1e-14 for corner in corners)
    linear = hessian(quadratic).norm() < 1e-14
    assert vanishes == linear == (rank == 0)


# RSI, EB and the cosine (NWT sections 3 to 6).


def sample(count=50, dimension=20):
    """Weights, references and gradients of a rough loss, [count, dimension] each."""
    source = torch.Generator().manual_seed(0)
    mixture = SinusoidalMixture(dimension, dtype=F64)
    w, reference = torch.randn(2, count, dimension, dtype=F64, generator=source)
    return w, reference, torch.func.vmap(torch.func.grad(mixture.energy))(w)


def test_nwt_eq_4_gives_the_next_distance_of_plain_sgd():
    w, reference, g = sample()
    eta = 0.003
    g_g, g_d, d_d = products(g, w - reference)
    rsi, eb = geometry.rsi(g_d, d_d), geometry.eb(g_g, d_d)
    after = (w - eta * g - reference).square().sum(1).numpy()
    np.testing.assert_allclose(after, (1 - 2 * eta * rsi + eta**2 * eb**2) * d_d, rtol=1e-12)
    np.testing.assert_allclose(after, geometry.next_square_distance(eta, g_d, g_g, d_d), rtol=1e-12)


def test_nwt_eq_5_and_6_the_locally_optimal_rate_leaves_sqrt_1_minus_cosine_squared_of_the_distance():
    w, reference, g = sample()
    g_g, g_d, d_d = products(g, w - reference)
    eta = torch.from_numpy(geometry.lolr(g_d, g_g))[:, None]
    cosine = geometry.cosine(g_d, g_g, d_d)
    after = (w - eta * g - reference).norm(dim=1)
    np.testing.assert_allclose(after.numpy(), np.sqrt(1 - cosine**2) * np.sqrt(d_d), rtol=1e-12)
    for factor in (0.9, 1.1):
        assert ((w - factor * eta * g - reference).norm(dim=1) > after).all()


def test_nwt_eq_7_the_rate_mu_over_l_squared_converges_at_least_as_fast_as_it_says():
    bowl = Quadratic(vector(4.0, 2.0, 1.0).diag(), start=vector(1.0, -2.0, 3.0))
    mu, largest = 1.0, 4.0  # RSI and EB to the minimum lie between the least and the largest eigenvalue
    path = gradient_descent(bowl, mu / largest**2, 60)
    g_g, g_d, d_d = products(torch.func.vmap(torch.func.grad(bowl.energy))(path), path)
    assert geometry.rsi(g_d, d_d).min() >= mu
    assert geometry.eb(g_g, d_d).max() <= largest
    bound = (1 - mu**2 / largest**2) ** np.arange(61) * d_d[0]
    assert (d_d <= bound * (1 + 1e-12)).all()


def test_nwt_section_4_1_the_last_step_of_plain_sgd_points_at_its_end():
    path = gradient_descent(SinusoidalMixture(20, dtype=F64), 1e-3, 10)
    mixture = SinusoidalMixture(20, dtype=F64)
    g_g, g_d, d_d = products(gradient(mixture, path[-2]), path[-2] - path[-1])
    assert float(geometry.cosine(g_d, g_g, d_d)) == pytest.approx(1.0, abs=1e-12)


def test_nwt_section_5_rsi_is_additive_and_eb_subadditive_over_summed_losses():
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 5, dtype=F64, generator=source), torch.randn(8, dtype=F64, generator=source)
    w, reference = torch.randn(2, 5, dtype=F64, generator=source)
    gradients = torch.func.vmap(torch.func.grad(lambda w, x, y: (w @ x - y).tanh() ** 2), (None, 0, 0))(w, x, y)
    whole = torch.func.grad(lambda w: ((x @ w - y).tanh() ** 2).sum())(w)
    d = (w - reference).expand(8, 5)
    g_g, g_d, d_d = products(gradients, d)
    sum_g_g, sum_g_d, _ = products(whole, d[0])
    assert float(geometry.rsi(sum_g_d, d_d[0])) == pytest.approx(geometry.rsi(g_d, d_d).sum(), rel=1e-12)
    assert float(geometry.eb(sum_g_g, d_d[0])) < geometry.eb(g_g, d_d).sum()


def test_nwt_eq_8_holds_within_the_spread_of_100_random_walks():
    steps, dimension, walks = 32, 2048, 100
    source = torch.Generator().manual_seed(0)
    g = torch.randn(walks, steps, dimension, dtype=F64, generator=source)
    g /= g.norm(dim=-1, keepdim=True)
    d = g.flip(1).cumsum(1).flip(1)  # w_t - w_T: all the steps still to come
    g_g, g_d, d_d = products(g, d)
    measured = np.stack([geometry.rsi(g_d, d_d), geometry.eb(g_g, d_d), geometry.cosine(g_d, g_g, d_d)], axis=1)
    left = steps - np.arange(steps)
    predicted = np.stack([1 / left, left**-0.5, geometry.random_walk_cosine(left)])
    low, high = np.min(measured, axis=0), np.max(measured, axis=0)
    assert (low * (1 - 1e-12) <= predicted).all()
    assert (predicted <= high * (1 + 1e-12)).all()
    np.testing.assert_allclose(np.mean(measured, axis=0), predicted, rtol=0.05)
