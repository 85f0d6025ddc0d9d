"""Estimates from sketches: right on average, within their stated errors, on real gradients and on made-up ones."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.sealed_runs import train

from geomprobe.errors import UsageError
from geomprobe.trace import projection
from geomprobe.trace.sketch import Sketch, joined, projected

STEPS = 40


@pytest.fixture(scope="module")
def history():
    """A real run of 129 parameters."""
    return train(steps=STEPS, momentum=0.5)


def sketch_of(history, size, seed=0, every=1, final=True):
    weights, gradients = history.weights, history.gradients
    described = {"size": size, "every": every, "seed": seed, "shapes": [list(weights.shape[1:])]}
    rows = np.zeros((len(gradients), -(-2 * size // every) * every))
    for row, w, g in zip(rows, weights, gradients, strict=False):
        projection.add(w, 0, row[:size], seed)
        projection.add(g, 0, row[size : 2 * size], seed)
    rows = rows[::every].reshape(-1, rows.shape[1] // every)[: len(gradients)]
    points = {"final": projected(described, [(weights[-1], "float64")])} if final else {}
    return Sketch(rows, described, points, len(gradients) if final else None)


def exact_of(history, target=None):
    """RSI, EB, gamma, loLR and the distance of each step, by float64 sums."""
    g = history.gradients
    d = history.weights[:-1] - (history.weights[-1] if target is None else history.weights[target])
    g_d, g_g, d_d = (g * d).sum(1), (g * g).sum(1), (d * d).sum(1)
    with np.errstate(all="ignore"):
        found = {
            "rsi": g_d / d_d,
            "eb": np.sqrt(g_g / d_d),
            "cosine": g_d / np.sqrt(g_g * d_d),
            "lolr": g_d / g_g,
            "distance": np.sqrt(d_d),
        }
    return {name: values if target is None else values[:target] for name, values in found.items()}


QUANTITIES = ["rsi", "eb", "cosine", "lolr", "distance"]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_as_many_numbers_as_parameters_give_the_exact_values(history, quantity):
    sketch = sketch_of(history, 200)
    assert sketch.exact
    found = getattr(sketch, quantity)()
    np.testing.assert_allclose(found.value, exact_of(history)[quantity], rtol=1e-9)
    assert not found.error.any()
    at_20 = getattr(sketch, quantity)(20)
    np.testing.assert_allclose(at_20.value[:20], exact_of(history, 20)[quantity], rtol=1e-9)
    assert np.isnan(at_20.value[20:]).all()
    assert np.isnan(at_20.error[20:]).all()


@pytest.fixture(scope="module")
def scattered():
    """Vectors of 6,000 elements along a random walk with a drift, and their sketches by 80 seeds."""
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((6, 6000)) + 0.3
    weights = np.concatenate([np.zeros((1, 6000)), -np.cumsum(gradients, 0)])
    made = SimpleNamespace(weights=weights, gradients=gradients)
    return made, [sketch_of(made, 256, seed) for seed in range(80)]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_stated_errors_are_those_that_many_seeds_have(scattered, quantity):
    made, sketches = scattered
    found = [getattr(sketch, quantity)() for sketch in sketches]
    values, exact = np.array([each.value for each in found]), exact_of(made)[quantity]
    stated = np.array([each.error for each in found]).mean(0)
    known = stated > 1e-3 * abs(exact)  # at the last step G and d are one direction: nothing is left of the error
    np.testing.assert_allclose((values.std(0) / stated)[known], 1, atol=0.35)
    assert known.sum() >= 5
    assert (abs(values.mean(0) - exact)[known] < (4.5 / np.sqrt(80) + 1 / 16) * stated[known]).all()


def test_inner_products_have_the_stated_error_and_no_bias(scattered):
    made, sketches = scattered
    a, b = made.gradients[0], made.weights[3] - made.weights[5]
    found = [each.inner(each.gradients(0), each.weights(3) - each.weights(5)) for each in sketches]
    values, stated = np.array([each.value for each in found]), np.mean([each.error for each in found])
    assert values.std() / stated == pytest.approx(1, abs=0.35)
    assert abs(values.mean() - a @ b) < 4.5 * stated / np.sqrt(len(found))


def test_four_times_the_numbers_halve_the_error_of_a_cosine(scattered):
    made, _ = scattered
    exact = exact_of(made)["cosine"][:5]
    errors = []
    for size in (64, 256, 1024):
        found = [sketch_of(made, size, seed).cosine().value[:5] - exact for seed in range(40)]
        errors.append(np.sqrt(np.mean(np.square(found)) / np.mean((1 - exact**2) ** 2)))
    np.testing.assert_allclose(np.array(errors) * np.sqrt([64, 256, 1024]), 1, atol=0.2)


def test_the_error_of_a_mean_counts_in_that_the_steps_share_their_buckets(scattered):
    made, sketches = scattered
    exact = exact_of(made)["cosine"]
    of_row = np.array([0, 0, 1, 1, 1, -1])
    found = [each.mean_cosine(of_row=of_row, groups=2) for each in sketches]
    values, stated = np.array([each.value for each in found]), np.mean([each.error for each in found], 0)
    np.testing.assert_allclose(values.std(0) / stated, 1, atol=0.35)
    wanted = np.array([exact[:2].mean(), exact[2:5].mean()])
    assert (abs(values.mean(0) - wanted) < (4.5 / np.sqrt(80) + 1 / 16) * stated).all()


def test_distances_and_angles_of_all_pairs(history):
    sketch = sketch_of(history, 200)
    w, g = history.weights[:-1], history.gradients
    distances = np.linalg.norm(w[:, None] - w, axis=2)
    np.testing.assert_allclose(sketch.distances().value, distances, rtol=1e-6, atol=1e-12)
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(sketch.gradient_cosines().value, unit @ unit.T, atol=1e-12)
    small = sketch_of(history, 64)
    assert small.distances().error[0, 5] == pytest.approx(small.distances().value[0, 5] / np.sqrt(128))
    assert small.gradient_cosines().error[3, 3] == 0


@pytest.mark.parametrize("every", [1, 4])
def test_the_horizon_map_is_that_of_exact_inner_products(history, every):
    sketch = sketch_of(history, 200, every=every)
    found = sketch.horizon_map([4, 8, 36])
    assert found.steps.tolist() == list(range(0, STEPS, every))
    w, g = history.weights, history.gradients
    for i, h in enumerate(found.horizons):
        known = [t for t in found.steps if t + h <= STEPS]
        ways = np.array([w[t] - w[t + h] for t in known])
        exact = (g[known] * ways).sum(1) / np.linalg.norm(g[known], axis=1) / np.linalg.norm(ways, axis=1)
        np.testing.assert_allclose(found.cosine.value[i, : len(known)], exact, rtol=1e-9)
        assert np.isnan(found.cosine.value[i, len(known) :]).all()
        assert found.mean.value[i] == pytest.approx(exact.mean())
    np.testing.assert_allclose(found.random_walk(), np.array([4, 8, 36]) ** -0.5)


def test_horizons_are_chosen_on_a_logarithmic_grid_of_steps_that_have_sketches(history):
    chosen = sketch_of(history, 200, every=2).horizon_map().horizons
    assert (np.diff(chosen) > 0).all()
    assert (chosen % 2 == 0).all()
    assert (chosen[0], chosen[-1]) == (2, 34)


def test_a_run_without_its_final_iterate_has_horizons_between_its_steps_only(history):
    sketch = sketch_of(history, 200, final=False)
    assert np.isfinite(sketch.horizon(4).value).sum() == STEPS - 4
    with pytest.raises(UsageError, match="no reference 'final' to compare the sketches with; there is: none"):
        sketch.cosine()


def test_a_step_without_a_sketch_is_named(history):
    with pytest.raises(UsageError, match=r"step 5 has no sketch: there is one of every 4\. step up to 36"):
        sketch_of(history, 64, every=4).weights([4, 5])


def test_weights_that_are_given_are_a_target_too(history):
    sketch = sketch_of(history, 200)
    described = {"size": 200, "seed": 0, "shapes": [[129]]}
    point = projected(described, [(history.weights[20], "float64")])
    np.testing.assert_allclose(sketch.cosine(point).value[:20], sketch.cosine(20).value[:20])


def test_weights_of_bfloat16_are_read_from_their_bits():
    described = {"size": 8, "seed": 0, "shapes": [[3]]}
    bits = np.array([0x3F80, 0xC000, 0x3F00], np.uint16)  # 1, -2, 0.5
    wanted = projected(described, [(np.array([1.0, -2.0, 0.5]), "float64")])
    assert np.array_equal(projected(described, [(bits, "bfloat16")]), wanted)
    with pytest.raises(UsageError, match="dtype float8_e5m2 cannot be read"):
        projected(described, [(np.zeros(3, np.uint8), "float8_e5m2")])
    with pytest.raises(UsageError, match="are needed"):
        projected(described, [(np.zeros(4), "float64")])


def test_shards_are_joined_in_the_dimension_in_which_they_were_cut():
    whole = np.arange(24.0).reshape(4, 6)
    assert np.array_equal(joined([whole[:, :4], whole[:, 4:]], (4, 6)), whole)
    assert np.array_equal(joined([whole[:2], whole[2:], whole[:2], whole[2:]], (4, 6)), whole)
    assert np.array_equal(joined([whole, whole], (4, 6)), whole)
    assert np.array_equal(joined([whole[:3], whole[3:], whole[:0]], (4, 6)), whole)
