"""Whatever ends a pass, at whatever moment, it goes on to the very file of one that nobody disturbed."""

import contextlib
import shutil
import signal
import time

import pytest
from support.command_server import ROOT, Command, Server, python
from support.resumable import STEPS, Bench, recording, said
from support.shims import kill_shim

from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record

MIDDLE = 67  # in mid-epoch, and past the first block of rows
SEGMENTS = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def path(bench, tmp_path):
    return tmp_path / "run"


# Killed


@pytest.mark.slow
def test_passes_killed_at_random_moments_end_in_the_files_of_undisturbed_ones():
    trials = 100
    options = "--trials", trials, "--seed", trials
    done = python(ROOT / "tests/stress/kill_and_resume.py", *options, timeout_s=300 + 60 * trials)
    assert done.out.endswith(f"\n{trials} of {trials} equal\n"), done
    assert done.code == 0


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory):
    shim = kill_shim(tmp_path_factory.mktemp("shim"))
    with contextlib.closing(Server(preload=shim)) as server:
        yield server


def killed_at(server, bench, argv, write):
    """A command that is killed at its n-th write; gives how many it made where it was not."""
    result = Command(server, ["-m", "geomprobe", *argv], bench.folder, kill_at=write).wait()
    assert result.code in (0, -signal.SIGKILL), result
    return int(result.err.split()[-2]) if result.code == 0 else None


def through(server, bench, argv, first, step):
    """Kill a command at its ``first`` write, then what goes on at its (first + step)-th, and so on to the end."""
    kills = 0
    while killed_at(server, bench, argv, first + kills * step) is None:
        kills += 1
    return kills


FEW_AND_MANY = [2, pytest.param(40, marks=pytest.mark.slow)]


@pytest.mark.parametrize("trials", FEW_AND_MANY)
def test_a_recording_killed_at_any_write_goes_on_to_the_same_file(shimmed, bench, path, trials):
    argv = recording(path, "named", "--resume")
    writes = killed_at(shimmed, bench, argv, 10**9)
    for trial in range(trials):
        shutil.rmtree(path)
        at = 1 + trial * (writes * 9 // 10) // (trials - 1)  # from the first to the last but a few: their number varies
        assert through(shimmed, bench, argv, at, writes // 2) > 0 or at > writes // 2  # slow passes write more often
        bench.assert_whole(path, "record.h5")


@pytest.mark.parametrize("trials", FEW_AND_MANY)
def test_a_replay_killed_at_any_write_goes_on_to_the_same_file(shimmed, bench, path, trials):
    bench.recorded(path)
    argv = ["replay", "--resume", path]
    writes = killed_at(shimmed, bench, argv, 10**9)
    for trial in range(trials):
        (path / "trace.h5").unlink()
        at = 1 + trial * (writes * 9 // 10) // (trials - 1)
        assert through(shimmed, bench, argv, at, writes // 2) > 0 or at > writes // 2  # slow passes write more often
        bench.assert_whole(path, "trace.h5")


@pytest.mark.parametrize("trials", FEW_AND_MANY)
def test_a_last_segment_killed_at_any_write_goes_on_to_the_same_file(shimmed, bench, path, trials):
    bench.recorded(path)
    for number in (1, 3):
        assert bench.replay(path, "--segment", f"{number}/{SEGMENTS}").code == 0
    last, others = ["replay", "--segment", f"2/{SEGMENTS}", path], path.with_name("others")
    shutil.copytree(path, others)
    writes = killed_at(shimmed, bench, last, 10**9)
    for trial in range(trials):
        shutil.rmtree(path)
        shutil.copytree(others, path)
        at = 1 + trial * (writes * 9 // 10) // (trials - 1)
        assert through(shimmed, bench, last, at, writes // 2) > 0 or at > writes // 2
        bench.assert_whole(path, "trace.h5")


def test_a_run_whose_process_was_killed_is_free_at_once_though_the_loaders_workers_live_on(bench, path):
    sort = "persistent"
    assert bench.record(path, sort=sort, AT=str(MIDDLE), DO="SIGKILL").code == -signal.SIGKILL
    assert bench.record(path, sort=sort).code == 0
    bench.assert_whole(path, "record.h5", sort)


# Asked to stop

PASSES = ("record.h5", "trace.h5")


@pytest.fixture(params=PASSES)
def cut(request, bench, path):
    """A pass, by the file that it makes, and a function that runs it."""
    if request.param == "record.h5":
        return request.param, lambda **env: bench.record(path, **env)
    bench.recorded(path)
    return request.param, lambda **env: bench.replay(path, "--resume", **env)


def rows(path, name):
    if name == "trace.h5":
        return open_trace(path).num_steps
    with open_record(path) as record:
        return record.num_steps


def test_sigterm_ends_the_step_keeps_everything_and_exits_with_75(bench, path, cut):
    name, go = cut
    said(go(AT=str(MIDDLE), DO="SIGTERM"), 75, "stopped as asked", "--resume goes on from here")
    assert rows(path, name) == MIDDLE + 1
    resumed = go()
    assert resumed.code == 0
    if name == "record.h5":  # from a checkpoint of its own, not from the last epoch's
        assert f"begins at step {MIDDLE + 1}" in resumed.out
    bench.assert_whole(path, name)


def test_sigterm_from_two_at_once_is_one(bench, path, cut):
    _, go = cut
    said(go(AT=str(MIDDLE), DO="SIGTERM SIGTERM"), 75, "stopped as asked")


def test_a_second_sigterm_kills(bench, path, cut):
    name, go = cut
    assert go(AT=str(MIDDLE), DO="SIGTERM 1.1 SIGTERM").code == -signal.SIGTERM
    assert go().code == 0
    bench.assert_whole(path, name)


def test_ctrl_c_keeps_the_steps_that_are_done(bench, path, cut):
    name, go = cut
    said(go(AT=str(MIDDLE), DO="SIGINT"), 130, "interrupted")
    assert rows(path, name) == MIDDLE
    assert go().code == 0
    bench.assert_whole(path, name)


# No room


def test_a_disk_that_fills_up_ends_the_pass_with_words_and_it_goes_on_once_there_is_space(bench, path, cut):
    name, go = cut
    said(go(AT=str(MIDDLE), DO="full disk"), 1, "cannot write", "File too large", "Free space on that disk")
    assert 0 < rows(path, name) <= STEPS
    assert go().code == 0
    bench.assert_whole(path, name)


def test_a_checkpoint_that_cannot_be_written_is_named_and_those_before_it_count(bench, path):
    going = bench.waiting(recording(path, "named", "--resume"), MIDDLE)
    while checkpoint.saved(path / "checkpoints")[-1] < 60:
        time.sleep(0.01)
    (path / "checkpoints").rename(path / "kept")
    (path / "checkpoints").touch()
    bench.go_on()
    said(going.wait(), 1, f"cannot write {path / 'checkpoints'}", "Not a directory", "--resume")
    (path / "checkpoints").unlink()
    (path / "kept").rename(path / "checkpoints")
    resumed = bench.record(path)
    assert (resumed.code, resumed.out.splitlines()[0]) == (0, "begins at step 60")
    bench.assert_whole(path, "record.h5")
