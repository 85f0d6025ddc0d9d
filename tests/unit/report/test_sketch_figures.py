"""The figures of sketches show the numbers of the sketches, under the right labels."""

import numpy as np
import pytest
import torch

import geomprobe
from geomprobe.cli import main
from geomprobe.errors import RunError
from geomprobe.report.plot import save
from geomprobe.report.sketch_figures import gamma_figure, horizon_figure
from geomprobe.trace.record import open_record

pytest.importorskip("matplotlib")


def train(epochs=3, steps=8):
    model = torch.nn.Sequential(torch.nn.Linear(10, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(epochs):
        for _ in range(steps):
            x = torch.randn(8, 10)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            probe.backward(loss)
            optimizer.step()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "tiny"
    geomprobe.record(train, folder, seed=0, sketch=64).close()
    return folder


def test_gamma_is_the_mean_of_each_epoch_with_a_band_of_two_errors(run, tmp_path):
    with open_record(run) as record:
        drawing = gamma_figure([record])
        panel = drawing.axes[0]
        mean = record.sketch.mean_cosine(of_row=np.arange(24) // 8, groups=3)
        np.testing.assert_allclose(panel.lines[0].get_ydata(), mean.value)
        np.testing.assert_allclose(mean.value, record.sketch.cosine().value.reshape(3, 8).mean(1))
        band = panel.collections[0].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx((mean.value + 2 * mean.error).max())
        np.testing.assert_allclose(panel.lines[1].get_ydata(), ((24 - np.arange(24)) ** -0.5).reshape(3, 8).mean(1))
        assert panel.get_legend_handles_labels()[1] == ["tiny, K = 64", "random walk (NWT eq. 8)"]
        assert panel.get_xlabel() == "epoch"
        without = gamma_figure([record], skip_last_epoch=True, with_null_model=False).axes[0]
        assert without.lines[0].get_xdata().tolist() == [0, 1]
        assert len(without.lines) == 2  # the other is zero's
    save(drawing, tmp_path / "gamma.png")


def test_a_run_without_epochs_is_drawn_by_windows_of_steps(tmp_path):
    with geomprobe.record(lambda: train(1, 60), tmp_path / "run", seed=0, sketch=64) as record:
        panel = gamma_figure([record]).axes[0]
        assert panel.get_xlabel() == "step"
        np.testing.assert_allclose(panel.lines[0].get_xdata(), 2 * np.arange(30) + 0.5)


def test_the_horizon_map_has_its_means_below(run, tmp_path):
    with open_record(run) as record:
        drawing = horizon_figure(record)
        above, below = drawing.axes[:2]
        found = record.sketch.horizon_map()
        shown = above.collections[0].get_array()
        np.testing.assert_allclose(np.ma.filled(shown, np.nan).reshape(len(found.horizons), 24), found.cosine.value)
        np.testing.assert_allclose(below.lines[0].get_ydata(), found.mean.value)
        walk = next(line for line in below.lines if line.get_linestyle() == "--")
        np.testing.assert_allclose(walk.get_ydata(), found.horizons**-0.5)
        assert (above.get_xlabel(), below.get_xlabel()) == ("step t", "horizon h (steps)")
    save(drawing, tmp_path / "horizon.png")


def test_one_sketched_step_has_no_horizon(tmp_path):
    with (
        geomprobe.record(train, tmp_path / "run", seed=0, sketch=64, sketch_every=13) as record,
        pytest.raises(RunError, match="has sketches of 1 steps: a horizon needs two of them"),
    ):
        horizon_figure(record)


@pytest.mark.parametrize("asked", [["--sketch"], ["--columns", "horizon"]])
def test_the_command_draws_after_one_pass(run, tmp_path, asked, capsys):
    assert main(["plot", str(run), "-o", str(tmp_path / "out.png"), *asked]) == 0
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_the_horizon_is_a_figure_of_its_own(run, tmp_path, capsys):
    assert main(["plot", str(run), "-o", str(tmp_path / "out.png"), "--columns", "rsi,horizon"]) == 2
    assert "is a figure of its own" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_run_without_a_sketch_is_told_so(tmp_path, capsys):
    geomprobe.record(train, tmp_path / "run", seed=0).close()
    assert main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "out.png"), "--sketch"]) == 1
    assert "has no sketch: record it with --sketch 4096" in capsys.readouterr().err
