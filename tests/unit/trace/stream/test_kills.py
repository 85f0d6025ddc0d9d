"""Whatever kills a writer, at any moment: what it had committed reads back, and nothing else does."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.part_cases import assert_right, write_part
from support.shims import kill_shim

from geomprobe.errors import RunError
from geomprobe.trace.reader import open_trace
from geomprobe.trace.stream.reader import PartNotBegun, read_part

ROOT = Path(__file__).parents[4]
TRIALS = 25  # of each sort, for each kind of part
ROWS = 600
KINDS = ("geomprobe-trace", "geomprobe-record")
TIMEOUT_S = 20


class Writers:
    """The process of ``killed_writer.py``, which forks a writer a request."""

    def __init__(self, preload=None):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        if preload:
            env["LD_PRELOAD"] = str(preload)
        command = [sys.executable, str(ROOT / "tests/support/killed_writer.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def start(self, path, kind, rows, kill_at=0, torn=0):
        self.process.stdin.write(f"{path} {kind} {rows} {kill_at} {torn}\n")
        self.process.stdin.flush()
        return self.line()[1]

    def line(self):
        word, *number = self.process.stdout.readline().split()
        return word, int(number[0]) if number else 0

    def rest(self):
        """The last of each kind of answer, up to the writer's end."""
        said = {"rows": 0, "calls": 0}
        while (answer := self.line())[0] != "end":
            said[answer[0]] = answer[1]
        return said

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def writers():
    with contextlib.closing(Writers()) as started:
        yield started


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory):
    shim = kill_shim(tmp_path_factory.mktemp("shim"))
    with contextlib.closing(Writers(preload=shim)) as started:
        yield started


def rows_after(path, said):
    """Rows that read back; -1 where the writer was killed before it began, or had not even made the file."""
    if not path.exists():
        assert said["rows"] == 0
        return -1
    try:
        part = read_part(path, timeout_s=TIMEOUT_S)
    except PartNotBegun:
        assert said["rows"] == 0
        return -1
    assert_right(part)
    assert part.rows >= said["rows"]
    return part.rows


def read_all(killed):
    paths, said = zip(*killed, strict=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rows_after, paths, said))


@pytest.mark.parametrize("kind", KINDS)
def test_every_committed_row_survives_a_kill_at_a_random_time(writers, tmp_path, kind):
    killed = []
    for trial in range(TRIALS):
        path = tmp_path / f"{trial}.h5"
        process = writers.start(path, kind, 10**9)
        time.sleep(random.Random(trial).uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        killed.append((path, writers.rest()))
    assert max(read_all(killed)) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_every_committed_row_survives_a_kill_at_any_write_call(shimmed, tmp_path, kind):
    shimmed.start(tmp_path / "whole.h5", kind, ROWS)
    calls = shimmed.rest()["calls"]
    assert calls > 2 * TRIALS
    killed = []
    for trial in range(TRIALS):
        # From the first calls, which create the file, to the last one, which marks the last rows.
        kill_at = 1 + trial * (calls - 1) // (TRIALS - 1)
        path = tmp_path / f"{trial}.h5"
        shimmed.start(path, kind, ROWS, kill_at)
        said = shimmed.rest()
        assert said["calls"] == 0
        killed.append((path, said))
    read = read_all(killed)
    assert read[0] == -1
    assert 0 < max(read) < ROWS


def torn(shimmed, folder, trials):
    """Parts whose writer was killed half way through a write, as a power cut may leave them."""
    shimmed.start(folder / "whole.h5", KINDS[0], ROWS)
    calls = shimmed.rest()["calls"]
    for trial in range(trials):
        path = folder / f"{trial}.h5"
        shimmed.start(path, KINDS[0], ROWS, kill_at=(1 + 2 * trial) * calls // (2 * trials), torn=1)
        yield path, shimmed.rest()["rows"]


def assert_torn_parts_are_right_or_refused(parts):
    refused = 0
    for path, committed in parts:
        try:
            part = read_part(path, timeout_s=2)
        except RunError:
            refused += 1  # a torn index; HDF5 would wait for its writer for ever
            continue
        assert_right(part)
        assert part.rows >= committed
    return refused


def test_no_wrong_row_and_no_hang_comes_of_half_a_write(shimmed, tmp_path):
    assert assert_torn_parts_are_right_or_refused(torn(shimmed, tmp_path, 6)) < 6


@pytest.mark.slow
def test_no_wrong_row_and_no_hang_comes_of_half_a_write_at_any_place(shimmed, tmp_path):
    assert assert_torn_parts_are_right_or_refused(torn(shimmed, tmp_path, 2 * TRIALS)) < 2 * TRIALS


def test_a_sealing_that_is_killed_leaves_the_old_file_or_the_new_one_whole(shimmed, tmp_path):
    out = tmp_path / "trace.h5"
    write_part(tmp_path / "part.h5", stop=100)
    shimmed.start(tmp_path, "seal", 0)
    calls = shimmed.rest()["calls"]
    assert calls > 10
    old = out.read_bytes()
    (tmp_path / "part.h5").unlink()
    write_part(tmp_path / "part.h5", stop=200)
    for trial in range(8):
        shimmed.start(tmp_path, "seal", 0, kill_at=1 + trial * (calls - 1) // 7)
        assert shimmed.rest()["calls"] == 0
        assert out.read_bytes() == old
    shimmed.start(tmp_path, "seal", 0)
    shimmed.rest()
    assert open_trace(out).num_steps == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.h5", "trace.h5"]
