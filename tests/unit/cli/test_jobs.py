"""replay --jobs: segments end in the serial trace, and one that fails costs the others nothing."""

import os
import signal
import time

import pytest
from support.command_server import start
from support.resumable import Bench, said

from geomprobe.trace.reader import open_trace

LIMIT_S = 240
FAULTY = 53  # in the second of three segments, and in the first of two


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def recorded(bench, tmp_path):
    return bench.recorded(tmp_path / "run")


def jobs(bench, run, *options, count=3, **env):
    """Start ``replay --jobs``, which starts processes of its own."""
    return start("replay", run, "--jobs", count, *options, cwd=bench.folder, env=env)


def begun(err):
    """Of each segment, the step that its process began at."""
    lines = [line.split() for line in err.splitlines() if "begins at step" in line]
    return {line[0]: int(line[-1]) for line in lines}


@pytest.mark.parametrize(
    ("count", "firsts", "faulty", "steps"),
    [
        (2, [0, 60], "1/2", "0 to 59"),
        pytest.param(3, [0, 40, 80], "2/3", "40 to 79", marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_one_segment_is_named_and_the_others_work_is_kept(bench, recorded, count, firsts, faulty, steps):
    failed = jobs(bench, recorded, count=count, AT=str(FAULTY), DO="fault").wait(LIMIT_S)
    err = failed.err
    assert failed.code == 3, err
    assert begun(err) == {f"[{number}/{count}]": first for number, first in enumerate(firsts, 1)}
    assert f"[{faulty}] geomprobe replay: error: " in err, err
    assert f"at step {FAULTY} of 120" in err
    assert f"segment {faulty} (steps {steps}) diverged; see its lines above. What the others measured is kept" in err
    assert f"`geomprobe replay {recorded} --jobs {count} --resume` does only what is left" in err
    assert not (recorded / "trace.h5").exists()
    kept = sorted(path.name for path in (recorded / "stream").glob("trace-*"))
    assert kept == [f"trace-{first:08d}.h5" for first in firsts]
    # What is left is that segment, from the checkpoint before the fault.
    mended = jobs(bench, recorded, "--resume", count=count).wait(LIMIT_S)
    assert mended.code == 0, mended.err
    assert begun(mended.err) == {f"[{faulty}]": 50}
    assert "120 of 120 steps equal, w_T bitwise equal: certified" in mended.out
    bench.assert_whole(recorded, "trace.h5")


@pytest.mark.slow
def test_sigterm_stops_every_segment_and_they_go_on(bench, recorded):
    stopped = jobs(bench, recorded, AT=str(FAULTY), DO="wait")
    while not (bench.folder / "waiting").exists():
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGTERM)
    time.sleep(0.5)  # until it has passed it on
    bench.go_on()
    said(stopped.wait(LIMIT_S), 75, "stopped as asked; --resume goes on from here")
    going_on = jobs(bench, recorded, "--resume").wait(LIMIT_S)
    assert going_on.code == 0, going_on.err
    assert begun(going_on.err)["[2/3]"] == 50
    bench.assert_whole(recorded, "trace.h5")


@pytest.mark.slow
def test_sigterm_before_the_segments_have_begun_is_no_failure(bench, recorded):
    stopped = jobs(bench, recorded)
    while "3 segments, of steps 0 to 39, 40 to 79, 80 to 119" not in stopped.err.read_text():
        time.sleep(0.01)
    time.sleep(0.5)  # they start at once, and import for longer than that
    os.kill(stopped.pid, signal.SIGTERM)
    said(stopped.wait(LIMIT_S), 75, "stopped as asked; --resume goes on from here")


@pytest.mark.slow
def test_a_killed_segment_is_named_and_run_again_alone(bench, recorded):
    failed = jobs(bench, recorded, AT=str(FAULTY), DO="SIGKILL").wait(LIMIT_S)
    said(failed, 1, "segment 2/3 (steps 40 to 79) was killed")
    assert bench.replay(recorded, "--segment", "2/3").code == 0
    bench.assert_whole(recorded, "trace.h5")
    assert open_trace(recorded).status == "complete"


def test_processes_of_a_launch_do_not_start_others(bench, recorded):
    failed = jobs(bench, recorded, WORLD_SIZE="2", RANK="0").wait()
    said(
        failed,
        2,
        "--jobs 3: it would start processes beside those of this launch",
        "replay RUN --segment I/K",
    )
    assert not (recorded / "trace.h5").exists()


def test_an_option_for_several_ranks_is_refused_before_anything_starts(bench, recorded):
    before = sorted(recorded.rglob("*"))
    words = "--jobs 2 splits a run of one process", "--per-rank", "Nothing was replayed"
    said(bench.replay(recorded, "--jobs", "2", "--per-rank"), 2, *words)
    assert sorted(recorded.rglob("*")) == before


def test_an_option_that_the_recording_has_nothing_for_is_refused_once(bench, recorded):
    refused = said(bench.replay(recorded, "--jobs", "2", "--before-clipping"), 2, "the recording saw no call of")
    assert "segments, of steps" not in refused.err
    assert not (recorded / "trace.h5").exists()
