"""A sketch that fits its trace passes, and one that is biased, scaled or of other vectors fails."""

import h5py
import numpy as np
import pytest
import torch

import geomprobe
from geomprobe.report.verify.check import FAIL, PASS, SKIPPED, precision
from geomprobe.report.verify.sketch import check_sketch
from geomprobe.report.verify.verify import verify
from geomprobe.trace.reader import open_trace

EACH, MEAN = "sketch against the columns, each step", "sketch against the columns, mean"


def train():
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(60):
        x = torch.randn(8, 20)
        loss = (model(x) - x.sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("verify") / "run"
    geomprobe.record(train, run, seed=0, sketch=256).close()
    geomprobe.replay(train, run, curvature_every=0)
    return run


@pytest.fixture
def rows(folder):
    """The stored rows, to be changed; as they were afterwards."""
    with h5py.File(folder / "record.h5") as file:
        before = file["sketch/rows"][:]
    changed = before.copy()
    yield changed
    write(folder, before)


def write(folder, rows):
    with h5py.File(folder / "record.h5", "r+") as file:
        file["sketch/rows"][:] = rows


def outcomes(folder):
    trace = open_trace(folder)
    return {check.name: check for check in check_sketch(trace, precision(trace.manifest, trace.num_parameters))}


def test_a_sketch_that_fits_passes(folder):
    found = outcomes(folder)
    assert {name: check.outcome for name, check in found.items()} == {EACH: PASS, MEAN: PASS}
    assert found[EACH].rows == 6 * 60
    assert 2 < found[EACH].worst < found[EACH].tolerance < 10
    assert not verify(open_trace(folder)).broken


def test_a_gradient_of_another_step_fails_at_its_step(folder, rows):
    rows[30, 256:] = rows[5, 256:] * 3
    write(folder, rows)
    found = outcomes(folder)
    assert found[EACH].outcome == FAIL
    assert found[EACH].row == 30
    assert found[EACH].note.startswith("g.")
    assert [check.name for check in verify(open_trace(folder)).broken] == [EACH]


def test_a_small_bias_of_all_steps_fails_in_the_mean_alone(folder, rows):
    rows[:, 256:] *= 1.15
    write(folder, rows)
    found = outcomes(folder)
    assert {name: check.outcome for name, check in found.items()} == {EACH: PASS, MEAN: FAIL}
    assert found[MEAN].note == "g.g"


def test_a_number_that_is_not_finite_fails(folder, rows):
    rows[12, 3] = np.nan
    write(folder, rows)
    assert outcomes(folder)[EACH].outcome == FAIL


def test_a_sketch_that_is_exact_is_held_to_rounding(tmp_path):
    run = tmp_path / "run"
    geomprobe.record(train, run, seed=0, sketch=2000).close()
    geomprobe.replay(train, run, curvature_every=0, every=7)
    found = outcomes(run)
    assert list(found) == [EACH]
    assert found[EACH].outcome == PASS
    assert found[EACH].rows == 6 * 9
    assert found[EACH].tolerance < 1e-12
    with h5py.File(run / "record.h5", "r+") as file:
        rows = file["sketch/rows"][:]
        rows[14, 1] += 1e-9
        file["sketch/rows"][:] = rows
    assert outcomes(run)[EACH].outcome == FAIL
    assert outcomes(run)[EACH].row == 14


def test_of_some_steps_only_those_are_compared(tmp_path):
    run = tmp_path / "run"
    geomprobe.record(train, run, seed=0, sketch=256, sketch_every=7).close()
    geomprobe.replay(train, run, curvature_every=0)
    found = outcomes(run)
    assert (found[EACH].outcome, found[EACH].rows) == (PASS, 6 * 8)


def test_there_is_nothing_to_check_without_a_sketch_or_a_recording(folder, tmp_path):
    alone = tmp_path / "trace.h5"
    alone.write_bytes((folder / "trace.h5").read_bytes())
    assert outcomes(alone) == {}
    run = tmp_path / "run"
    geomprobe.two_pass(train, run, seed=0, curvature_every=0)
    assert outcomes(run) == {}


def test_a_recording_that_cannot_be_read_is_no_reason_to_fail_the_trace(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "trace.h5").write_bytes((folder / "trace.h5").read_bytes())
    (run / "record.h5").write_bytes((folder / "record.h5").read_bytes())
    with h5py.File(run / "record.h5", "r+") as file:
        del file["references/final/0.bias"]
    assert {check.note for check in outcomes(run).values()} == {"the recording cannot be read"}
    (run / "record.h5").write_bytes(b"nothing")
    assert {check.outcome for check in outcomes(run).values()} == {SKIPPED}


def test_a_trace_that_is_not_certified_is_not_compared(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("record.h5", "trace.h5"):
        (run / name).write_bytes((folder / name).read_bytes())
    with h5py.File(run / "trace.h5", "r+") as file:
        file.attrs["status"] = "uncertified"
    assert {check.outcome for check in outcomes(run).values()} == {SKIPPED}
