"""Derived columns against vectors: every quantity is computed a second time from w, w*, G and H themselves."""

import numpy as np
import pytest

from geomprobe.trace.derive import Derived, sealed_columns

ROWS, SIZE = 12, 30


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(0)
    w, g, hg = (rng.normal(size=(ROWS, SIZE)) for _ in range(3))
    stars = {"final": rng.normal(size=SIZE), "best": rng.normal(size=SIZE)}
    raw = {
        "steps/epoch": np.arange(ROWS) // 4.0,
        "steps/loss": rng.random(ROWS),
        "groups/0/lr": rng.random(ROWS),
        "groups/1/lr": rng.random(ROWS),
    }
    pairs = {"g.g": (g, g), "w.g": (w, g), "w.w": (w, w), "g.Hg": (g, hg), "Hg.Hg": (hg, hg)}
    raw |= {f"inner_products/{name}": (a * b).sum(1) for name, (a, b) in pairs.items()}
    for name, star in stars.items():
        place = "inner_products" if name == "final" else f"references/{name}/inner_products"
        d = w - star
        raw |= {
            f"{place}/g.d": (g * d).sum(1),
            f"{place}/w.d": (w * d).sum(1),
            f"{place}/d.d": (d * d).sum(1),
        }
    return w, g, hg, stars, raw


@pytest.mark.parametrize(
    ("reference", "group"), [("final", "steps"), ("final", "references/final"), ("best", "references/best")]
)
def test_columns_of_a_reference_are_those_of_the_vectors(run, reference, group):
    w, g, _, stars, raw = run
    columns = Derived(np.arange(ROWS), raw)
    d = w - stars[reference]
    distance, norm = np.linalg.norm(d, axis=1), np.linalg.norm(g, axis=1)
    along = np.einsum("ti,ti->t", g, d)
    oracle = {
        "distance": distance,
        "grad_dot_offset": along,
        "rsi": along / distance**2,
        "eb": norm / distance,
        "cosine": along / distance / norm,
        "lolr": along / norm**2,
    }
    for name, values in oracle.items():
        np.testing.assert_allclose(columns[f"{group}/{name}"], values, rtol=1e-12)


def test_columns_of_the_step_are_those_of_the_vectors(run):
    _, g, hg, _, raw = run
    columns = Derived(np.arange(100, 100 + ROWS), raw)
    norm, turn, lr = np.linalg.norm(g, axis=1), np.linalg.norm(hg, axis=1), raw["groups/0/lr"]
    oracle = {
        "step": np.arange(100.0, 100 + ROWS),
        "epoch": raw["steps/epoch"],
        "loss": raw["steps/loss"],
        "lr": lr,
        "grad_norm": norm,
        "clr": raw["steps/loss"] / norm**2,
        "hg_norm": turn,
        "g_hg": np.einsum("ti,ti->t", g, hg),
        "corridor_residual": turn / norm,
        "relative_residual": lr * turn / norm,
        "flow_drift": lr**2 * turn / 2,
    }
    for name, values in oracle.items():
        assert columns[f"steps/{name}"].dtype == np.float64
        np.testing.assert_allclose(columns[f"steps/{name}"], values, rtol=1e-12)


def test_what_was_not_measured_is_nan_and_the_rest_is_not(run):
    raw = {name: values for name, values in run[-1].items() if "Hg" not in name}
    raw["inner_products/g.g"] = np.where(np.arange(ROWS) % 3, np.nan, raw["inner_products/g.g"])
    columns = Derived(np.arange(ROWS), raw)
    for name in (
        "steps/hg_norm",
        "steps/g_hg",
        "steps/corridor_residual",
        "steps/flow_drift",
        "inner_products/Hg.Hg",
    ):
        assert np.isnan(columns[name]).all()
    np.testing.assert_array_equal(np.isnan(columns["steps/cosine"]), np.arange(ROWS) % 3 != 0)
    assert not np.isnan(columns["steps/distance"]).any()


def test_values_that_are_not_finite_go_through_without_a_warning(run):
    bad = np.array([np.nan, np.inf, -np.inf, 0.0, 1e308])
    raw = dict.fromkeys(run[-1], bad)
    columns = Derived(np.arange(5), raw)
    for path in columns:
        assert columns[path].shape == (5,)


def test_the_paths_are_the_contracts_and_other_names_are_refused(run):
    columns = Derived(np.arange(ROWS), run[-1] | {"parameters/fc.weight/g.g": np.zeros(ROWS)})
    assert set(columns) == set(sealed_columns([*run[-1], "parameters/fc.weight/g.g"]))
    assert {"steps/cosine", "references/best/cosine", "groups/1/lr", "parameters/fc.weight/g.g"} <= set(columns)
    assert not any(path.startswith("references/final") for path in columns)
    assert "steps/same" not in columns
    for unknown in ("cosine", "steps/same", "references/worst/rsi"):
        with pytest.raises(KeyError):
            columns[unknown]
