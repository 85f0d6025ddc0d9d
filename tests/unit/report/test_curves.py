"""What a figure draws: epoch statistics against loops, the null model against a simulated random walk."""

from dataclasses import replace

import numpy as np
import pytest
from support.sealed_runs import certificate, train, write_run, write_trace

from geomprobe.errors import UsageError
from geomprobe.report.curves import WINDOWS, groups, labels, null_model
from geomprobe.trace.reader import open_trace


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture
def trace(tmp_path, history):
    return open_trace(write_trace(tmp_path / "trace.h5", history, epoch_length=20))


def test_a_curve_is_each_epochs_mean_minimum_and_maximum(trace):
    curve = groups(trace).curve(trace["rsi"])
    for epoch in range(3):
        rows = trace["rsi"][20 * epoch : 20 * epoch + 20]
        assert curve.x[epoch] == epoch
        assert curve.mean[epoch] == pytest.approx(sum(rows) / 20)
        assert (curve.low[epoch], curve.high[epoch]) == (min(rows), max(rows))


def test_the_last_epoch_is_left_out_on_request(trace):
    grouped = groups(trace, skip_last_epoch=True)
    assert grouped.x.tolist() == [0, 1]
    assert (grouped.of_row[40:] == -1).all()
    assert len(grouped.curve(trace["cosine"]).mean) == 2


def test_rows_that_were_not_measured_do_not_count(tmp_path, history):
    trace = open_trace(write_trace(tmp_path / "sparse.h5", history, epoch_length=30, every=7))
    curve = groups(trace).curve(trace["eb"])
    assert curve.mean[0] == pytest.approx(np.mean(trace["eb"][0:30:7]))


def test_an_epoch_without_a_measured_row_is_a_gap(tmp_path, history):
    trace = open_trace(write_trace(tmp_path / "sparse.h5", history, epoch_length=5, every=10))
    assert np.isnan(groups(trace).curve(trace["eb"]).mean[1::2]).all()


def test_a_trace_without_epochs_is_cut_into_windows_of_steps(tmp_path):
    trace = open_trace(write_trace(tmp_path / "plain.h5", train(steps=120), epoch_length=0))
    grouped = groups(trace)
    assert (grouped.axis, len(grouped.x)) == ("step", 40)
    assert len(grouped.x) <= WINDOWS
    assert grouped.x[0] == np.mean([0, 1, 2])
    assert grouped.curve(trace["loss"]).mean[0] == pytest.approx(trace["loss"][:3].mean())


def test_leaving_out_the_last_of_no_epochs_is_refused(tmp_path, history):
    trace = open_trace(write_trace(tmp_path / "plain.h5", history, epoch_length=0))
    with pytest.raises(UsageError, match="drop --skip-last-epoch"):
        groups(trace, skip_last_epoch=True)


def test_the_null_model_is_what_a_random_walk_in_high_dimension_measures(trace):
    steps, lr = trace.num_steps, 0.05
    gradients = np.random.default_rng(0).standard_normal((steps, 20_000))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    offset = lr * np.cumsum(gradients[::-1], axis=0)[::-1]  # w_t - w_T
    square = np.sum(offset**2, axis=1)
    along = np.sum(gradients * offset, axis=1)
    walk = {
        "rsi": along / square,
        "eb": 1 / np.sqrt(square),
        "cosine": along / np.sqrt(square),
        "lolr": along,
    }
    for column, expected in walk.items():
        np.testing.assert_allclose(null_model(trace, column), expected, rtol=0.35, err_msg=column)
        assert null_model(trace, column).mean() == pytest.approx(expected.mean(), rel=0.05)


def test_momentum_multiplies_the_null_models_rate(tmp_path):
    trace = open_trace(write_trace(tmp_path / "trace.h5", train(steps=60, lr=0.01, momentum=0.9)))
    assert null_model(trace, "lolr") == pytest.approx(np.full(60, 0.1))


def test_an_optimizer_without_gradient_steps_has_a_null_model_for_the_cosine_alone(tmp_path):
    trace = open_trace(write_trace(tmp_path / "trace.h5", train(steps=60, lr=0.01, optimizer="Adam")))
    assert null_model(trace, "rsi") is None
    assert null_model(trace, "cosine")[-1] == 1.0


def test_columns_that_a_walk_says_nothing_of_have_no_null_model(trace):
    assert null_model(trace, "loss") is None


def test_an_unfinished_trace_has_no_null_model_since_its_length_is_unknown(tmp_path, history):
    trace = open_trace(write_trace(tmp_path / "trace.h5", history, status="incomplete", rows=30))
    assert null_model(trace, "cosine") is None


def test_a_diverged_trace_is_held_against_the_length_that_was_recorded(tmp_path, history):
    said = certificate(60, equal=30, weights_equal=False, first={"step": 30, "component": "rng", "tensor": "torch"})
    trace = open_trace(write_trace(tmp_path / "t.h5", history, status="diverged", rows=30, cert=said))
    assert null_model(trace, "cosine")[-1] == pytest.approx(31**-0.5)


def test_runs_are_named_by_their_folders_and_the_settings_in_which_they_differ(tmp_path, history):
    a = write_run(tmp_path / "lr0.05", history)
    b = write_run(tmp_path / "b", train(steps=60, lr=0.02, seed=3))
    assert labels([open_trace(a)]) == ["lr0.05"]
    assert labels([open_trace(a), open_trace(b)]) == ["lr0.05 (lr 0.05, seed 0)", "b (lr 0.02, seed 3)"]


def test_runs_in_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, history):
    runs = [write_run(tmp_path / place / "run", history) for place in ("x", "y")]
    assert labels([open_trace(run) for run in runs]) == [str(run) for run in runs]


def test_a_trace_file_is_named_by_its_run_and_any_other_file_by_itself(tmp_path, history):
    run = write_run(tmp_path / "a", history)
    other = write_trace(tmp_path / "other.h5", history)
    assert labels([open_trace(run / "trace.h5"), open_trace(other)]) == ["a", "other"]


def test_runs_of_one_script_are_told_apart_by_its_options_too(tmp_path, history):
    runs = []
    for name, argv in {
        "a": ["--batch-size", "64", "--lr=0.05", "--data", "x", "y"],
        "b": ["--batch_size", "16", "--no-augment", "--data", "x", "z", "--decay", "0.00014142135"],
    }.items():
        script = {**history.manifest["script"], "argv": argv}
        runs.append(write_run(tmp_path / name, replace(history, manifest={**history.manifest, "script": script})))
    assert labels([open_trace(run) for run in runs]) == [
        "a (batch size 64, lr 0.05, data x y)",
        "b (batch size 16, data x z, no augment, decay 0.000141421)",
    ]


def test_an_option_that_is_a_setting_too_is_named_once_as_it_took_effect(tmp_path):
    runs = []
    for lr in ("0.05", "0.02"):
        history = train(steps=60, lr=float(lr))
        history.manifest["script"]["argv"] = ["--lr", f"{lr}0"]
        runs.append(write_run(tmp_path / f"run{lr}", history))
    assert labels([open_trace(run) for run in runs]) == ["run0.05 (lr 0.05)", "run0.02 (lr 0.02)"]


def test_options_of_different_scripts_are_not_compared(tmp_path, history):
    runs = []
    for name in ("a", "b"):
        script = {**history.manifest["script"], "path": f"{name}.py", "argv": ["--width", name]}
        runs.append(write_run(tmp_path / name, replace(history, manifest={**history.manifest, "script": script})))
    assert labels([open_trace(run) for run in runs]) == ["a", "b"]
