"""A pass that is killed at any moment leaves only right rows, never hangs a reader, and can be run again."""

import os
import random
import signal
import time

import numpy as np
import pytest
from support.command_server import run, start

from geomprobe.errors import RunError
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record

STEPS = 400  # seven blocks of rows
COMPONENTS = ("rng", "weights", "optimizer")
TRIALS = [2, pytest.param(50, marks=pytest.mark.slow)]
READ_S = 30

SCRIPT = f"""
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.randn(8, 2)
for step in range({STEPS}):
    optimizer.zero_grad()
    model(data + 0.1 * torch.randn(8, 2)).square().mean().backward()
    optimizer.step()
"""


class Whole:
    """A run that nobody disturbed, and how long its passes took."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)
        self.record_s = self._timed("record", "--seed", 0, "-o", "whole", "train.py")
        self.replay_s = self._timed("replay", "whole")
        self.trace = open_trace(folder / "whole")
        with open_record(folder / "whole") as record:
            self.steps = record.steps
            self.prints = {name: record.fingerprints(name, 0, STEPS) for name in COMPONENTS}

    def _timed(self, *argv):
        began = time.monotonic()
        assert run(*argv, cwd=self.folder).code == 0
        return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("kill"))


def kill_at_random(whole, duration_s, luck, *argv, rows):
    """Start a pass and kill it; gives the number of rows that a reader had seen just before."""
    command = start(*argv, cwd=whole.folder)
    time.sleep(luck.uniform(0, 1.1 * duration_s))
    seen = rows() if luck.random() < 0.3 else 0
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait().code in (-signal.SIGKILL, 0)  # it may have been faster
    return seen


def opened(open_run, folder):
    """What ``open_run`` finds, or None and what it says instead."""
    try:
        return open_run(folder), ""
    except RunError as nothing:
        return None, str(nothing)


def rows_of(open_run, folder):
    found, _ = opened(open_run, folder)
    return found.num_steps if found else 0


def assert_inspected(whole, folder, readable):
    """inspect tells what there is, or that there is nothing, in time."""
    result = run("inspect", folder, cwd=whole.folder)
    assert result.code == (0 if readable else 1), result
    assert "Traceback" not in result.err


def assert_record_right(whole, folder, seen):
    """Every row that was committed is one of the undisturbed recording's; gives whether there are any to see."""
    began = time.monotonic()
    record, nothing = opened(open_record, folder)
    if record is None:
        assert seen == 0
        assert any(words in nothing for words in ("no rows yet", "is no run", "does not exist"))
        return False
    with record:
        count = record.num_steps
        assert count >= seen
        assert (record.status, count) == ("complete", STEPS) or record.status == "incomplete"
        steps = record.steps
        prints = {name: record.fingerprints(name, 0, count) for name in COMPONENTS}
    assert time.monotonic() - began < READ_S
    for name, column in whole.steps.items():
        np.testing.assert_array_equal(steps[name], column[:count])
    for name, table in whole.prints.items():
        np.testing.assert_array_equal(prints[name], table[:count])
    return True


def assert_trace_right(whole, folder, seen):
    """Every row that was committed is one of the undisturbed replay's, and the record is as it was."""
    began = time.monotonic()
    with open_record(folder) as record:
        assert (record.status, record.num_steps) == ("complete", STEPS)
    trace, nothing = opened(open_trace, folder)
    if trace is None:
        assert seen == 0
        assert "not replayed yet" in nothing
        return
    assert trace.num_steps >= seen
    assert (trace.status, trace.num_steps) == ("complete", STEPS) or trace.status == "incomplete"
    assert time.monotonic() - began < READ_S
    for name in whole.trace.columns:
        np.testing.assert_array_equal(trace[name], whole.trace[name][: trace.num_steps], err_msg=name)


@pytest.mark.parametrize("trials", TRIALS)
def test_a_recording_killed_at_any_moment_leaves_only_right_rows(whole, tmp_path, trials):
    luck, folder = random.Random(trials), tmp_path / "run"
    command = "record", "--force", "--seed", 0, "-o", folder, "train.py"
    for _ in range(trials):
        seen = kill_at_random(whole, whole.record_s, luck, *command, rows=lambda: rows_of(open_record, folder))
        readable = assert_record_right(whole, folder, seen)
        assert_inspected(whole, folder, readable)
    assert run(*command, cwd=whole.folder).code == 0
    assert_record_right(whole, folder, STEPS)
    assert run("replay", folder, cwd=whole.folder).code == 0
    assert_trace_right(whole, folder, STEPS)


@pytest.mark.parametrize("trials", TRIALS)
def test_a_replay_killed_at_any_moment_leaves_only_right_rows(whole, tmp_path, trials):
    luck, folder = random.Random(trials), tmp_path / "run"
    assert run("record", "--seed", 0, "-o", folder, "train.py", cwd=whole.folder).code == 0
    command = "replay", "--force", folder
    for _ in range(trials):
        seen = kill_at_random(whole, whole.replay_s, luck, *command, rows=lambda: rows_of(open_trace, folder))
        assert_trace_right(whole, folder, seen)
        assert_inspected(whole, folder, True)
    assert run(*command, cwd=whole.folder).code == 0
    assert_trace_right(whole, folder, STEPS)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "record.h5", "trace.h5"]
