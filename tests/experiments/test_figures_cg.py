"""CG's figures show the mean and the range of seeds, and held-out errors as the script printed them."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
from support.sealed_runs import train, write_run

import geomprobe

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three seeds of one training, with logs and Hg."""
    folder = tmp_path_factory.mktemp("cg")
    runs = [write_run(folder / f"seed-{seed}", train(steps=60, seed=seed)) for seed in range(3)]
    for number, run in enumerate(runs):
        said = [f"epoch {1 + epoch:3d}  loss 0.1  held-out accuracy 0.{7 + epoch}{number}" for epoch in range(3)]
        run.with_name(f"{run.name}.log").write_text("\n".join(["Wrote it.", *said]) + "\n")
        with h5py.File(run / "trace.h5", "r+") as file:
            for name in ("hg_norm", "corridor_residual", "relative_residual"):
                file[f"steps/{name}"][:] = 10.0 ** -(number + 1) * np.linspace(2, 1, 60)
    return runs


def means(run, column):
    return geomprobe.open_trace(run)[column].reshape(3, 20).mean(1)


def edges(panel):
    vertices = panel.collections[0].get_paths()[0].vertices
    each = [vertices[vertices[:, 0] == x, 1] for x in np.unique(vertices[:, 0])]
    return [values.min() for values in each], [values.max() for values in each]


def test_the_line_is_the_seeds_mean_and_the_band_their_range(seeds):
    from figures.cg import loss_and_error

    panel = loss_and_error({"CLR": seeds}).axes[0]
    expected = np.stack([means(run, "loss") for run in seeds])
    np.testing.assert_allclose(panel.lines[0].get_ydata(), expected.mean(0))
    low, high = edges(panel)
    np.testing.assert_allclose(low, expected.min(0))
    np.testing.assert_allclose(high, expected.max(0))
    assert panel.get_yscale() == "linear"  # it spans no decade


def test_held_out_errors_are_those_that_were_printed(seeds):
    from figures.cg import loss_and_error

    panel = loss_and_error({"CLR": seeds}).axes[1]
    np.testing.assert_allclose(panel.lines[0].get_ydata(), [29, 19, 9])
    assert panel.get_ylabel() == "held-out error (%)"


def test_an_epoch_printed_twice_by_a_resumed_run_counts_once_and_one_not_printed_is_missing(tmp_path):
    from figures.cg import held_out_error

    run = write_run(tmp_path / "a", train(steps=60))
    lines = ["epoch   1  loss 1.0  held-out accuracy 0.5000", "epoch   3  loss 0.1  held-out accuracy 0.7500"]
    (tmp_path / "a.log").write_text("\n".join([*lines, lines[1]]))
    np.testing.assert_allclose(held_out_error(run), [50, np.nan, 25])


def test_a_run_without_a_log_has_no_errors(tmp_path):
    from figures.cg import held_out_error

    assert np.isnan(held_out_error(write_run(tmp_path / "a", train(steps=60)))).all()


def test_rates_are_the_seeds_mean_and_the_range_of_all_steps(tmp_path):
    from figures.cg import rates

    histories = [train(steps=60, seed=seed) for seed in range(2)]
    given = [np.linspace(1, 2, 60), np.linspace(3, 1, 60)]
    runs = [
        write_run(tmp_path / str(seed), replace(history, lr=lr))
        for seed, (history, lr) in enumerate(zip(histories, given, strict=True))
    ]
    panel = rates({"CLR": runs}).axes[0]
    by_epoch = np.stack([lr.reshape(3, 20) for lr in given])
    np.testing.assert_allclose(panel.lines[0].get_ydata(), by_epoch.mean((0, 2)))
    low, high = edges(panel)
    np.testing.assert_allclose(low, by_epoch.min((0, 2)))
    np.testing.assert_allclose(high, by_epoch.max((0, 2)))


def test_loss_and_hg_are_the_seeds_means(seeds):
    from figures.cg import loss_and_hg

    panels = loss_and_hg({"CLR": seeds}).axes
    for panel, column in zip(panels, ("loss", "hg_norm"), strict=True):
        expected = np.mean([means(run, column) for run in seeds], 0)
        np.testing.assert_allclose(panel.lines[0].get_ydata(), expected)


def test_the_share_of_corridors_is_that_of_steps_below_the_threshold(seeds):
    from figures.cg import share_of_corridors

    curves, shares, turns = share_of_corridors({"a": seeds[:1], "b": seeds[1:2]}).axes
    residual = 0.1 * np.linspace(2, 1, 60)
    x, y = curves.lines[0].get_data()
    assert y.tolist() == [100 * (residual < level).mean() for level in x]
    for number, run in enumerate(seeds[:2]):
        inside = geomprobe.open_trace(run)["relative_residual"].reshape(3, 20) < 0.1
        np.testing.assert_allclose(shares.lines[number].get_ydata(), 100 * inside.mean(1))
        np.testing.assert_allclose(turns.lines[number].get_ydata(), means(run, "corridor_residual"))


def test_runs_that_differ_by_their_seed_alone_are_one_line(tmp_path, seeds):
    from figures.drawing import lines_of_runs

    other = train(steps=60, lr=0.02)
    other.manifest["script"]["argv"] = ["--lr", "0.02"]
    fast = write_run(tmp_path / "fast", other)
    found = lines_of_runs([*seeds, fast], seeds_together=True)
    assert found == {"seed-0 (lr 0.05)": seeds, "fast (lr 0.02)": [fast]}
