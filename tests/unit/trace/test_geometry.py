"""The papers' quantities from inner products: closed forms, identities, and NaN where nothing is defined."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from geomprobe.trace import geometry

RELATIVE = 1e-13


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Many gradients, offsets and products Hg, [rows, dimensions], of very different lengths; and rates."""
    generator = np.random.default_rng(0)
    lengths = 10.0 ** generator.uniform(-8, 8, (3, 200, 1))
    g, d, hg = generator.standard_normal((3, 200, 30)) * lengths
    return g, d, hg, 10.0 ** generator.uniform(-4, 1, 200)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, b)


def norm(a: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a, axis=1)


def test_each_quantity_is_its_formula(vectors) -> None:
    g, d, hg, lr = vectors
    gg, gd, dd, hh = dot(g, g), dot(g, d), dot(d, d), dot(hg, hg)
    expected = {
        "grad_norm": (geometry.grad_norm(gg), norm(g)),
        "distance": (geometry.distance(dd), norm(d)),
        "rsi": (geometry.rsi(gd, dd), gd / norm(d) ** 2),
        "eb": (geometry.eb(gg, dd), norm(g) / norm(d)),
        "cosine": (geometry.cosine(gd, gg, dd), gd / (norm(g) * norm(d))),
        "lolr": (geometry.lolr(gd, gg), gd / norm(g) ** 2),
        "clr": (geometry.clr(lr, gg), lr / norm(g) ** 2),
        "corridor_residual": (geometry.corridor_residual(hh, gg), norm(hg) / norm(g)),
        "relative_residual": (geometry.relative_residual(lr, hh, gg), lr * norm(hg) / norm(g)),
        "flow_drift": (geometry.flow_drift(lr, hh), lr**2 * norm(hg) / 2),
    }
    for name, (found, wanted) in expected.items():
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=RELATIVE, err_msg=name)


def test_cosine_is_rsi_over_eb_and_lolr_is_rsi_over_eb_squared(vectors) -> None:
    g, d, _, _ = vectors
    gg, gd, dd = dot(g, g), dot(g, d), dot(d, d)
    rsi, eb = geometry.rsi(gd, dd), geometry.eb(gg, dd)
    np.testing.assert_allclose(geometry.cosine(gd, gg, dd), rsi / eb, rtol=RELATIVE)
    np.testing.assert_allclose(geometry.lolr(gd, gg), rsi / eb**2, rtol=RELATIVE)
    assert (np.abs(geometry.cosine(gd, gg, dd)) <= 1).all()


def test_a_gradient_along_the_offset_has_cosine_1_and_the_rate_that_lands_on_the_reference() -> None:
    d = np.random.default_rng(1).standard_normal((50, 7))
    g = 4.0 * d
    gg, gd, dd = dot(g, g), dot(g, d), dot(d, d)
    np.testing.assert_allclose(geometry.cosine(gd, gg, dd), 1, rtol=RELATIVE)
    np.testing.assert_allclose(geometry.cosine(-gd, gg, dd), -1, rtol=RELATIVE)
    np.testing.assert_allclose(geometry.lolr(gd, gg), 0.25, rtol=RELATIVE)
    assert (np.abs(geometry.next_square_distance(geometry.lolr(gd, gg), gd, gg, dd)) < 1e-14 * dd).all()


def test_equation_4_gives_the_next_distance_of_plain_sgd(vectors) -> None:
    g, d, _, lr = vectors
    gg, gd, dd = dot(g, g), dot(g, d), dot(d, d)
    moved = d - lr[:, None] * g
    found = geometry.next_square_distance(lr, gd, gg, dd)
    scale = dd + lr**2 * gg  # of the terms that may cancel
    assert (np.abs(found - dot(moved, moved)) <= 1e-14 * scale).all()
    rsi, eb = geometry.rsi(gd, dd), geometry.eb(gg, dd)
    assert (np.abs(found - (1 - 2 * lr * rsi + lr**2 * eb**2) * dd) <= 1e-14 * scale).all()


def test_equation_6_no_rate_comes_closer_than_the_locally_optimal_one(vectors) -> None:
    g, d, _, _ = vectors
    gg, gd, dd = dot(g, g), dot(g, d), dot(d, d)
    best = geometry.next_square_distance(geometry.lolr(gd, gg), gd, gg, dd)
    np.testing.assert_allclose(best, (1 - geometry.cosine(gd, gg, dd) ** 2) * dd, rtol=1e-11)
    for factor in (0.0, 0.9, 1.1, 2.0):
        assert (geometry.next_square_distance(factor * geometry.lolr(gd, gg), gd, gg, dd) >= best).all()


def test_a_quadratic_has_the_residual_of_its_curvature() -> None:
    theta = np.random.default_rng(2).standard_normal((5, 9))
    gg = hh = dot(theta, theta)  # of theta^2 / 2: g = Hg = theta
    np.testing.assert_allclose(geometry.corridor_residual(hh, gg), 1, rtol=RELATIVE)
    np.testing.assert_allclose(geometry.relative_residual(0.1, hh, gg), 0.1, rtol=RELATIVE)
    step, flow = theta - 0.01 * theta, np.exp(-0.01) * theta
    np.testing.assert_allclose(geometry.flow_drift(0.01, hh), norm(step - flow), rtol=1e-2)


def test_a_corridor_has_no_residual_and_no_drift() -> None:
    assert geometry.corridor_residual(0.0, 4.0) == 0
    assert geometry.relative_residual(0.1, 0.0, 4.0) == 0
    assert geometry.flow_drift(0.1, 0.0) == 0


def test_equation_8_describes_a_random_walk_in_many_dimensions() -> None:
    steps, dimensions = 60, 20_000
    moves = np.random.default_rng(3).standard_normal((steps, dimensions))
    points = np.vstack([np.zeros(dimensions), np.cumsum(-moves, axis=0)])  # w' = w - g
    d, g = points[:-1] - points[-1], moves
    found = geometry.cosine(dot(g, d), dot(g, g), dot(d, d))
    null = geometry.random_walk_cosine(steps - np.arange(steps))
    np.testing.assert_allclose(found, null, atol=0.02)
    assert found[-1] == pytest.approx(1)
    assert null[-1] == 1


ZERO_OFFSET = [geometry.rsi(1.0, 0.0), geometry.eb(1.0, 0.0), geometry.cosine(1.0, 1.0, 0.0)]
ZERO_GRADIENT = [
    geometry.cosine(0.0, 0.0, 1.0),
    geometry.lolr(0.0, 0.0),
    geometry.clr(1.0, 0.0),
    geometry.corridor_residual(1.0, 0.0),
    geometry.relative_residual(1.0, 1.0, 0.0),
]


@pytest.mark.parametrize("value", [*ZERO_OFFSET, *ZERO_GRADIENT, geometry.random_walk_cosine(0)])
def test_what_is_undefined_is_nan(value: np.ndarray) -> None:
    assert np.isnan(value)


def test_what_is_defined_at_zero_is_a_number() -> None:
    assert geometry.distance(0.0) == geometry.grad_norm(0.0) == 0
    assert geometry.rsi(0.0, 1.0) == geometry.eb(0.0, 1.0) == 0
    assert geometry.clr(0.0, 1.0) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_was_not_measured_or_not_finite_never_becomes_a_number(bad: float) -> None:
    for value in (
        geometry.distance(bad),
        geometry.rsi(bad, 1.0),
        geometry.eb(bad, 1.0),
        geometry.cosine(bad, bad, 1.0),
        geometry.lolr(bad, bad),
        geometry.clr(bad, 1.0),
        geometry.flow_drift(0.1, bad),
        geometry.next_square_distance(0.1, bad, 1.0, 1.0),
    ):
        assert not np.isfinite(value)


def test_very_large_and_very_small_norms_do_not_leave_the_range() -> None:
    for gg, dd in ((1e-300, 1e-300), (1e300, 1e300), (1e-300, 1e300)):
        gd = 0.5 * np.sqrt(gg) * np.sqrt(dd)
        assert geometry.cosine(gd, gg, dd) == pytest.approx(0.5)
        assert geometry.eb(gg, dd) == pytest.approx(np.sqrt(gg) / np.sqrt(dd))


def test_rows_do_not_touch_each_other_and_scalars_broadcast() -> None:
    found = geometry.rsi([1.0, 1.0, np.nan, 3.0], [1.0, 0.0, 1.0, 2.0])
    np.testing.assert_array_equal(found, [1, np.nan, np.nan, 1.5])
    np.testing.assert_array_equal(geometry.flow_drift([1.0, 2.0], 4.0), [1.0, 4.0])
    np.testing.assert_array_equal(geometry.clr(1, [1, 2]), [1.0, 0.5])


def test_the_arithmetic_needs_neither_torch_nor_hdf5() -> None:
    code = "import sys, geomprobe.trace.geometry; assert not {'torch', 'h5py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
