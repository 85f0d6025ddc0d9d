"""The figure shows the right numbers under the right labels, and says what is not certified."""

import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from support.sealed_runs import certificate, train, write_run, write_trace

from geomprobe.errors import GeomprobeError, RunError, UsageError
from geomprobe.report.plot import figure, save
from geomprobe.trace.reader import open_trace

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture
def trace(tmp_path, history):
    return open_trace(write_run(tmp_path / "a", history))


def title(drawing):
    return drawing.get_suptitle()


def test_the_default_is_rsi_eb_and_cosine_with_units(trace):
    drawing = figure([trace])
    assert [panel.get_ylabel() for panel in drawing.axes] == ["RSI (1/lr)", "EB (1/lr)", "cosine γ"]
    assert drawing.axes[-1].get_xlabel() == "epoch"
    assert title(drawing) == "a"


def test_the_line_is_the_epoch_mean_and_the_band_spans_minimum_to_maximum(trace):
    panel = figure([trace], ["cosine"]).axes[0]
    epochs = trace["cosine"].reshape(3, 20)
    np.testing.assert_allclose(panel.lines[0].get_ydata(), epochs.mean(1))
    band = panel.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == epochs.max()
    assert band[:, 1].min() == epochs.min()


def test_the_null_model_is_dashed_gray_and_can_be_left_out(trace):
    left = 60 - np.arange(60)
    panel = figure([trace], ["cosine"]).axes[0]
    walk = next(line for line in panel.lines if line.get_linestyle() == "--" and len(line.get_xdata()))
    np.testing.assert_allclose(walk.get_ydata(), (left**-0.5).reshape(3, 20).mean(1))
    assert walk.get_color() == "0.45"
    without = figure([trace], ["cosine"], with_null_model=False).axes[0]
    assert not [line for line in without.lines if line.get_linestyle() == "--"]


def test_runs_of_different_rates_have_null_models_in_their_own_colors(tmp_path, trace):
    other = open_trace(write_run(tmp_path / "b", train(steps=60, lr=0.02)))
    panel = figure([trace, other], ["eb"]).axes[0]
    solid = [line.get_color() for line in panel.lines if line.get_linestyle() == "-"]
    dashed = [line.get_color() for line in panel.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert solid == dashed
    assert len(set(solid)) == 2


def test_the_last_epoch_can_be_left_out(trace):
    assert figure([trace], ["rsi"], skip_last_epoch=True).axes[0].lines[0].get_xdata().tolist() == [0, 1]


def test_positive_columns_are_logarithmic_and_those_of_either_sign_symmetrically_so(tmp_path):
    trace = open_trace(write_run(tmp_path / "a", train(steps=200)))
    scales = [panel.get_yscale() for panel in figure([trace]).axes]
    assert trace["rsi"].min() < 0 < trace["eb"].min()
    assert scales == ["symlog", "log", "linear"]


def test_an_uncertified_run_says_so_in_red(tmp_path, history):
    said = certificate(60, equal=20, weights_equal=False)
    run = write_run(tmp_path / "b", history, status="uncertified", cert=said, same=np.arange(60) < 20)
    drawing = figure([open_trace(run)])
    assert title(drawing) == "b: UNCERTIFIED"
    assert drawing._suptitle.get_color() == "#B00020"


def test_among_several_runs_each_doubtful_one_is_named(tmp_path, history, trace):
    run = write_run(tmp_path / "b", history, status="incomplete", rows=45)
    assert title(figure([trace, open_trace(run)])) == "2 runs\nb: INCOMPLETE"


def test_the_legend_names_each_run_once_and_lies_below_the_panels(tmp_path, history, trace):
    other = open_trace(write_run(tmp_path / "b", history))
    drawing = figure([trace, other])
    drawing.draw_without_rendering()
    legend = drawing.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "random walk (NWT eq. 8)"]
    top = legend.get_window_extent().y1
    assert all(panel.get_window_extent().y0 > top for panel in drawing.axes)


def test_columns_of_references_and_inner_products_are_drawn_by_their_paths(tmp_path, history):
    path = write_trace(tmp_path / "t.h5", history, references={"best": history.weights[30]})
    drawing = figure([open_trace(path)], ["references/best/cosine", "inner_products/w.g", "groups/0/lr"])
    labels = [panel.get_ylabel() for panel in drawing.axes]
    assert labels == ["cosine γ\nreferences/best", "w.g (loss)\ninner_products", "lr\ngroups/0"]


def test_a_column_that_nobody_measured_is_refused_by_name(trace):
    with pytest.raises(RunError, match="hg_norm holds no numbers in a"):
        figure([trace], ["hg_norm"])


def test_a_column_that_does_not_exist_is_refused_with_near_matches(trace):
    with pytest.raises(GeomprobeError, match="cosine"):
        figure([trace], ["cosin"])


def test_runs_with_and_without_epochs_do_not_share_an_axis(tmp_path, history, trace):
    other = open_trace(write_trace(tmp_path / "plain.h5", history, epoch_length=0))
    with pytest.raises(UsageError, match="plot them apart"):
        figure([trace, other])


def test_without_matplotlib_the_extra_is_named(trace, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'geomprobe\[plot\]'"):
        figure([trace])


def test_values_that_are_not_finite_do_not_stop_the_drawing(tmp_path, history):
    path = write_trace(tmp_path / "t.h5", history)
    with h5py.File(path, "r+") as file:
        file["steps/loss"][5:9] = np.inf
    panel = figure([open_trace(path)], ["loss"]).axes[0]
    assert np.isfinite(panel.lines[0].get_ydata()).all()


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_suffix_picks_the_format(tmp_path, trace, suffix, head):
    path = tmp_path / f"figure.{suffix}"
    save(figure([trace], ["cosine"]), path)
    assert path.read_bytes().startswith(head)


def test_an_unknown_format_and_a_missing_folder_are_refused(tmp_path, trace):
    drawing = figure([trace], ["cosine"])
    with pytest.raises(UsageError, match="xyz"):
        save(drawing, tmp_path / "figure.xyz")
    with pytest.raises(RunError, match="No such file"):
        save(drawing, tmp_path / "nowhere" / "figure.png")


@pytest.mark.parametrize("words", [40, 130])
def test_a_legend_of_long_names_has_one_column_and_fits_the_figure(tmp_path, history, words):
    runs = []
    for size in (64, 16, 32, 8):
        argv = ["--batch-size", str(size), "--note", f"{'long ' * (words // 5)}{size}"]
        manifest = {**history.manifest, "script": {**history.manifest["script"], "argv": argv}}
        runs.append(write_run(tmp_path / f"run-{size}", replace(history, manifest=manifest)))
    traces = [open_trace(run) for run in runs]
    drawing, alone = figure(traces, ["cosine"]), figure(traces[:1], ["cosine"])
    for each in (drawing, alone):
        each.draw_without_rendering()
    box = drawing.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= drawing.bbox.x1
    assert "batch size 64" in drawing.legends[0].get_texts()[0].get_text()
    assert drawing.axes[0].bbox.height == pytest.approx(alone.axes[0].bbox.height, rel=0.15)
