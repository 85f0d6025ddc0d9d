"""What may happen to a run between a kill and its resumption, or beside it: each is named, and nothing is lost."""

import fcntl
import os
import shutil
import signal

import pytest
from support.resumable import Bench, recording, said

from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.trace.record import open_record

LATE = 67  # in mid-epoch, and past the first block of rows


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def cut_off(bench):
    """A recording that was killed in step `LATE`, with checkpoints up to step 60."""
    path = bench.folder / "killed"
    assert bench.record(path, AT=str(LATE), DO="SIGKILL").code == -signal.SIGKILL
    return path


@pytest.fixture
def killed(cut_off, path):
    """A copy of that one."""
    return shutil.copytree(cut_off, path)


@pytest.fixture
def recorded(bench, path):
    return bench.recorded(path)


def goes_on(bench, path, name, sort="named"):
    """It comes to its end, and to the undisturbed file; gives what it printed."""
    result = bench.record(path, sort=sort) if name == "record.h5" else bench.replay(path, "--resume")
    assert result.code == 0, result
    bench.assert_whole(path, name, sort)
    return result


def flip(file):
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def last_checkpoint(path):
    return checkpoint.folder(path / "checkpoints", checkpoint.saved(path / "checkpoints")[-1])


# Damage


@pytest.mark.parametrize("pattern", ["state.pt", "geomprobe.json"])
def test_a_checkpoint_with_a_flipped_bit_is_named_and_an_earlier_one_taken(bench, killed, pattern):
    last = last_checkpoint(killed)
    (file,) = last.glob(pattern)
    flip(file)
    steps = checkpoint.saved(killed / "checkpoints")
    result = goes_on(bench, killed, "record.h5")
    assert f"checkpoint {last} is damaged: {file.name} is not what was written" in result.err
    assert "an earlier one is taken" in result.err
    assert f"begins at step {steps[-2]}" in result.out


def test_a_segment_whose_checkpoint_has_a_flipped_bit_starts_from_an_earlier_one(bench, recorded):
    (file,) = checkpoint.folder(recorded / "checkpoints", 60).glob("state.pt")
    flip(file)
    result = bench.replay(recorded, "--segment", "2/2")
    assert (result.code, result.out.splitlines()[0]) == (0, "begins at step 50")
    assert f"{file.name} is not what was written: an earlier one is taken" in result.err
    assert bench.replay(recorded, "--segment", "1/2").code == 0
    bench.assert_whole(recorded, "trace.h5")


def test_a_checkpoint_half_written_or_half_removed_is_none(bench, killed):
    last = last_checkpoint(killed)
    (last / "geomprobe.json").unlink()
    last.rename(last.with_name(f"{last.name}.part"))
    goes_on(bench, killed, "record.h5")
    assert not list((killed / "checkpoints").glob("*.part"))


def test_a_recording_without_its_first_part_makes_it_again(bench, killed):
    assert bench.record(killed, AT="93", DO="SIGTERM").code == 75
    first, second = sorted((killed / "stream").glob("record-*.h5"))
    first.unlink()
    result = goes_on(bench, killed, "record.h5")
    assert result.out.splitlines()[0] == "begins at step 0"
    assert second.name == "record-00000060.h5"


def test_segments_without_one_of_their_parts_are_not_sealed_until_it_is_made_again(bench, recorded):
    assert bench.replay(recorded, "--segment", "2/3").code == 0
    assert bench.replay(recorded, "--segment", "1/3").code == 0
    (recorded / "stream" / "trace-00000040.h5").unlink()
    result = bench.replay(recorded, "--segment", "3/3")
    assert "other segments of it are still to come" in result.out
    assert not (recorded / "trace.h5").exists()
    again = bench.replay(recorded, "--segment", "2/3")
    assert (again.code, again.out.splitlines()[0]) == (0, "begins at step 40")
    bench.assert_whole(recorded, "trace.h5")


def test_a_part_with_a_damaged_row_is_cut_before_it(bench, recorded):
    assert bench.replay(recorded, AT="110", DO="SIGINT").code == 130
    (part,) = (recorded / "stream").glob("trace-*.h5")
    flip(part)
    goes_on(bench, recorded, "trace.h5")


# Others at the same run


def test_the_lock_of_a_dead_process_holds_nobody_up(bench, killed):
    lock = killed / "stream" / "lock"
    assert "process" in lock.read_text()
    goes_on(bench, killed, "record.h5")
    assert not lock.exists()


def test_the_lock_of_a_living_process_is_respected_and_its_holder_named(bench, killed):
    before = sorted(file.name for file in killed.rglob("*"))
    with open(killed / "stream" / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"process {os.getpid()} on here\n")
        lock.flush()
        words = f"{killed} is being written by another process (process {os.getpid()} on here)"
        said(bench.record(killed), 1, words, "Wait for it to end")
        assert sorted(file.name for file in killed.rglob("*")) == before
    goes_on(bench, killed, "record.h5")


def test_of_two_recordings_that_go_on_at_once_the_second_is_refused(bench, killed):
    first = bench.waiting(recording(killed, "named", "--resume"), 80)
    said(bench.record(killed), 1, "is being written by another process")
    bench.go_on()
    assert first.wait().code == 0
    bench.assert_whole(killed, "record.h5")


def test_of_two_replays_at_once_the_second_is_refused(bench, recorded):
    first = bench.waiting(["replay", recorded], LATE)
    for options in (["--resume"], ["--segment", "2/3"]):
        said(bench.replay(recorded, *options), 1, "is being written by another process")
    # Its rows are seen as a trace that is there; either way nothing of it is touched.
    assert bench.replay(recorded).code in (1, 2)
    assert bench.replay(recorded, "--force").code == 1
    bench.go_on()
    assert first.wait().code == 0
    bench.assert_whole(recorded, "trace.h5")


def test_of_two_processes_at_one_segment_the_second_is_refused_and_others_are_not(bench, recorded):
    first = bench.waiting(["replay", "--segment", "2/3", recorded], LATE)
    for options in (["--segment", "2/3"], ["--resume"], ["--force"]):
        said(bench.replay(recorded, *options), 1, "is being written by another process")
    assert bench.replay(recorded, "--segment", "3/3").code == 0
    assert bench.replay(recorded, "--segment", "1/3").code == 0
    assert not (recorded / "trace.h5").exists()
    bench.go_on()
    assert first.wait().code == 0
    bench.assert_whole(recorded, "trace.h5")


# Another run than it was


def test_a_script_that_has_changed_is_refused_until_it_is_what_it_was(bench, killed):
    text = bench.script.read_text()
    try:
        bench.script.write_text(f"{text}\n# another version")
        words = f"train.py changed since {killed} was recorded", "nothing was done", "Restore the recorded"
        said(bench.record(killed), 1, *words)
    finally:
        bench.script.write_text(text)
    goes_on(bench, killed, "record.h5")


def test_another_seed_is_refused(bench, killed):
    said(bench.record(killed, "--seed", "5"), 2, "seed 5", "was begun with seed 0", "Leave the seed out")
    goes_on(bench, killed, "record.h5")


def test_another_number_of_threads_is_refused(bench, killed):
    words = "flags.num_threads = 1, but here it is 2", "nothing was done", "Restore flags.num_threads to 1"
    said(bench.record(killed, THREADS="2"), 1, *words)
    goes_on(bench, killed, "record.h5")


def test_other_arguments_of_the_script_are_refused(bench, killed):
    result = bench.record(killed, sort="unnamed")
    said(result, 1, "script.argv[1] = 'named', but here it is 'unnamed'", "nothing was done")
    goes_on(bench, killed, "record.h5")


def test_a_loop_of_fewer_epochs_than_the_checkpoint_is_refused(bench, killed):
    said(bench.record(killed, EPOCHS="3"), 1, "the checkpoint is of epoch", "loop has 3 epochs")
    goes_on(bench, killed, "record.h5")


def test_a_script_that_keeps_state_from_attach_is_found_not_to_be_the_same_run(bench, path):
    assert bench.record(path, sort="secretive", AT=str(LATE), DO="SIGINT").code == 130
    result = bench.record(path, sort="secretive")
    said(result, 1, "holds step 60 already", "loss", "not given to attach", "--force starts over")
    assert open_record(path).num_steps == LATE


# Scripts that cannot go on in the middle


@pytest.mark.parametrize(
    ("sort", "reason"),
    [
        ("persistent", "its loader keeps its workers, and their random streams, from epoch to epoch"),
        ("unnamed", "its loop over epochs is not `for epoch in probe.epochs(n)`"),
    ],
)
def test_a_script_without_checkpoints_starts_over_and_cannot_be_split(bench, path, sort, reason):
    result = bench.record(path, sort=sort, AT=str(LATE), DO="SIGTERM")
    assert result.code == 75
    if sort == "persistent":
        assert f"no checkpoints are kept, because {reason}" in result.err
    result = goes_on(bench, path, "record.h5", sort)
    assert result.out.splitlines()[0] == "begins at step 0"
    said(bench.replay(path, "--jobs", "2"), 2, "has no checkpoints to split it at", reason, "without --jobs")
    assert bench.replay(path, AT=str(LATE), DO="SIGKILL").code == -signal.SIGKILL
    goes_on(bench, path, "trace.h5", sort)
