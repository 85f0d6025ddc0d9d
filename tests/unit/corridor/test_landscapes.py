import math

import pytest
import torch

from geomprobe.corridor import (
    AsymmetricLinear,
    ConcaveCone,
    ConvexCone,
    GluedCorridors,
    LinearPiece,
    Quadratic,
    RuledSurface,
    SinusoidalMixture,
)

F64 = torch.float64
LANDSCAPES = {
    "convex cone": ConvexCone(2.0, center=[0.5, -1.0]),
    "concave cone": ConcaveCone(2.0, beta=3.0),
    "linear piece": LinearPiece([1.0, -2.0], offset=0.5),
    "ruled surface": RuledSurface(1.5, axes=[2.0, 0.5]),
    "glued corridors": GluedCorridors.figure_1b(),
    "quadratic": Quadratic([[2.0, 1.0], [0.0, 3.0]], b=[1.0, 0.0], c=0.5),
    "asymmetric linear": AsymmetricLinear(2, samples=50, batch_size=50),
    "sinusoidal mixture": SinusoidalMixture(2),
}


@pytest.mark.parametrize("kind", LANDSCAPES)
def test_energy_broadcasts_over_a_grid(kind):
    landscape = LANDSCAPES[kind]
    grid = torch.randn(3, 4, 2)
    on_grid = landscape.energy(grid)
    assert on_grid.shape == (3, 4)
    one_by_one = torch.stack([landscape.energy(theta) for theta in grid.view(-1, 2)]).view(3, 4)
    torch.testing.assert_close(on_grid, one_by_one)


@pytest.mark.parametrize("kind", LANDSCAPES)
def test_a_landscape_trains_as_any_module_does(kind):
    landscape = LANDSCAPES[kind].double()
    assert [name for name, _ in landscape.named_parameters()] == ["theta"]
    before = landscape.theta.detach().clone()
    loss = landscape()
    assert (loss.shape, loss.dtype) == ((), F64)
    loss.backward()
    torch.optim.SGD(landscape.parameters(), lr=1e-3).step()
    torch.testing.assert_close(landscape.theta.detach(), before - 1e-3 * landscape.theta.grad)


@pytest.mark.parametrize("kind", sorted(set(LANDSCAPES) - {"asymmetric linear"}))
def test_forward_is_the_energy_at_theta(kind):
    landscape = LANDSCAPES[kind]
    assert landscape() == landscape.energy(landscape.theta)


def test_a_start_tensor_gives_the_dtype_and_is_not_shared():
    start = torch.tensor([1.0, 2.0], dtype=F64)
    cone = ConvexCone(start=start)
    start.zero_()
    assert cone().item() == math.hypot(1.0, 2.0)


@pytest.mark.parametrize(("axes", "reach"), [([2.0, 1.0], 3.0), ([9.0, 0.2], 10.0)])
def test_a_ruled_surface_is_the_distance_to_the_ellipse(axes, reach):
    angle = torch.linspace(0, 2 * math.pi, 100_001, dtype=F64)
    ellipse = torch.stack([axes[0] * angle.cos(), axes[1] * angle.sin()], 1)
    surface = RuledSurface(1.0, axes=axes, start=torch.ones(2, dtype=F64))
    points = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(1)) * reach
    nearest = torch.stack([(ellipse - point).norm(dim=1).min() for point in points])
    outside = (points / torch.tensor(axes)).square().sum(1) > 1
    assert outside.sum() > 10
    torch.testing.assert_close(surface.energy(points), torch.where(outside, nearest, 0.0), rtol=1e-8, atol=1e-8)


def test_a_ruled_surface_over_a_ball_is_a_cone_cut_off():
    surface = RuledSurface(2.0, axes=1.5, start=[3.0, 4.0, 12.0])
    assert surface().item() == pytest.approx(2.0 * (13.0 - 1.5), rel=1e-6)


@pytest.mark.parametrize("point", [[0.0, 0.0], [0.5, 0.2], [2.0, 0.0]])
def test_a_ruled_surface_is_flat_with_a_finite_gradient_within_the_ellipse_and_on_it(point):
    surface = RuledSurface(axes=[2.0, 1.0], start=point)
    loss = surface()
    loss.backward()
    assert (loss.item(), surface.theta.grad.tolist()) == (0.0, [0.0, 0.0])


def test_glued_corridors_are_continuous_and_show_all_of_their_pieces():
    glued = GluedCorridors.figure_1b(torch.zeros(2, dtype=F64))
    line = torch.linspace(-4, 4, 81, dtype=F64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    height = glued.energy(grid)
    steepest = math.hypot(0.5, 2.0)  # the ramp's slope
    for axis in (0, 1):
        assert height.diff(dim=axis).abs().max() <= steepest * 0.1 * (1 + 1e-9)
    pieces = torch.stack([p.energy(grid) for p in [*glued.valleys, *glued.hills]])
    shown = [(piece == height).double().mean().item() for piece in pieces]
    assert min(shown) > 0.05, shown


def test_gluing_leaves_the_pieces_as_they_were():
    cone = ConvexCone(start=[3.0, 4.0])
    glued = GluedCorridors([cone], start=torch.tensor([6.0, 8.0], dtype=F64))
    assert (glued().dtype, glued().item()) == (F64, 10.0)
    assert (cone().dtype, cone().item()) == (torch.float32, 5.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvexCone(0.0), "alpha must be positive, but it is 0.0"),
        (lambda: RuledSurface(axes=[1.0, -2.0]), "the smallest of axes must be positive, but it is -2.0"),
        (lambda: LinearPiece([1.0, 2.0, 3.0]), r"slope has shape \(3,\), but for theta of 2 elements"),
        (lambda: Quadratic([[1.0, 2.0, 3.0]]), r"a has shape \(1, 3\), .* it must be \(2, 2\)"),
        (lambda: GluedCorridors([]), "at least one valley"),
    ],
)
def test_bad_constants_are_refused_with_their_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
