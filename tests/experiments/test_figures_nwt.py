"""NWT's figures show epoch means and ranges, without the epochs that the paper leaves out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.command_server import python
from support.paths import EXPERIMENTS
from support.sealed_runs import train, write_run

import geomprobe

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory, history):
    return write_run(tmp_path_factory.mktemp("nwt") / "a", history)


def band_of(panel, which=0):
    """The y values of the band's lower and upper edge."""
    vertices = panel.collections[which].get_paths()[0].vertices
    xs = np.unique(vertices[:, 0])
    return (np.array([pick(vertices[vertices[:, 0] == x, 1]) for x in xs]) for pick in (np.min, np.max))


def line_of(panel, label):
    return next(line for line in panel.lines if line.get_label() == label)


def test_the_line_is_the_epochs_mean_and_the_band_its_range_without_the_final_epoch(run):
    from figures.nwt import overlay

    panels = overlay("rsi", "eb", "cosine")({"a": [run]}).axes
    for panel, column in zip(panels, ("rsi", "eb", "cosine"), strict=True):
        epochs = geomprobe.open_trace(run)[column].reshape(3, 20)[:2]
        line = line_of(panel, "a")
        assert line.get_xdata().tolist() == [0, 1]
        np.testing.assert_allclose(line.get_ydata(), epochs.mean(1))
        low, high = band_of(panel)
        np.testing.assert_allclose(low, epochs.min(1))
        np.testing.assert_allclose(high, epochs.max(1))


def test_cosines_come_with_the_null_model_of_each_run(run):
    from figures.nwt import overlay

    panel = overlay("cosine")({"a": [run]}).axes[0]
    (walk,) = [line for line in panel.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    expected = ((60 - np.arange(60)) ** -0.5).reshape(3, 20).mean(1)
    np.testing.assert_allclose(walk.get_ydata(), expected[:2])


def test_where_the_rate_decays_to_nothing_25_epochs_of_180_are_left_out(tmp_path, history):
    from figures.nwt import left_out

    decaying = replace(history, lr=np.linspace(1, 0.001, 60))
    assert left_out(write_run(tmp_path / "constant", history, epoch_length=2)) == 1
    assert left_out(write_run(tmp_path / "decaying", decaying, epoch_length=2)) == 5  # of 30: 4.2, rounded up


def test_a_scenario_has_a_column_and_a_quantity_a_row(run):
    from figures.nwt import scenarios

    figure = scenarios({"one": [run], "two": [run]})
    assert [panel.get_title() for panel in figure.axes[:2]] == ["one", "two"]
    labels = [panel.get_ylabel() for panel in figure.axes]
    assert labels == ["RSI (1/rate)", "", "EB (1/rate)", "", "cosine γ", ""]
    epochs = geomprobe.open_trace(run)["eb"].reshape(3, 20)
    np.testing.assert_allclose(figure.axes[3].lines[0].get_ydata(), epochs.mean(1)[:2])


def test_distances_are_drawn_to_the_end(run):
    from figures.nwt import distances, distances_by_scenario

    expected = geomprobe.open_trace(run)["distance"].reshape(3, 20).mean(1)
    for draw in (distances, distances_by_scenario):
        np.testing.assert_allclose(draw({"a": [run]}).axes[0].lines[0].get_ydata(), expected)


def test_budgets_are_cosines_against_references_up_to_each_without_its_last_epoch(tmp_path, monkeypatch, history):
    from support.sealed_runs import write_trace

    run = write_run(tmp_path / "a", history, trace=False)
    write_trace(run / "trace.h5", history, epoch_length=10, references={"step-40": history.weights[40]})
    from figures.nwt import epoch_budgets

    panel = epoch_budgets({"budgets": [run]}).axes[0]
    trace = geomprobe.open_trace(run)
    short, whole = line_of(panel, "4 epochs"), line_of(panel, "6 epochs")
    towards_40 = trace["references/step-40/cosine"].reshape(6, 10).mean(1)
    np.testing.assert_allclose(short.get_ydata(), towards_40[:3])
    np.testing.assert_allclose(whole.get_ydata(), trace["cosine"].reshape(6, 10).mean(1)[:5])


def test_lolr_and_the_schedule_are_each_over_their_greatest(tmp_path, history):
    from figures.nwt import rate_and_schedule

    run = write_run(tmp_path / "a", replace(history, lr=np.linspace(2, 1, 60)))
    panel = rate_and_schedule({"a": [run]}).axes[0]
    trace = geomprobe.open_trace(run)
    lolr = trace["lolr"].reshape(3, 20).mean(1)[:2]
    np.testing.assert_allclose(panel.lines[0].get_ydata(), lolr / lolr.max())
    np.testing.assert_allclose(panel.lines[1].get_ydata()[0], 1)


def test_quantities_of_both_signs_are_symmetrically_logarithmic(tmp_path):
    from figures.nwt import overlay

    run = write_run(tmp_path / "a", train(steps=200))
    assert geomprobe.open_trace(run)["rsi"][:180].min() < 0
    panels = overlay("rsi", "eb", "cosine")({"a": [run]}).axes
    assert [panel.get_yscale() for panel in panels] == ["symlog", "log", "linear"]


def test_the_command_draws_runs_named_by_what_differs(tmp_path, run):
    other = write_run(tmp_path / "b", train(steps=60, lr=0.02))
    words = ["figure", "nwt", "fig1", run, other, "-o", tmp_path / "out.png"]
    done = python(EXPERIMENTS, *words)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"Wrote {tmp_path / 'out.png'}\n"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_of_a_command_is_a_line(tmp_path, run):
    from figures.drawing import lines_of_runs

    other = write_run(tmp_path / "b", train(steps=60, lr=0.02))
    assert lines_of_runs([run, other], seeds_together=False) == {"a (lr 0.05)": [run], "b (lr 0.02)": [other]}
