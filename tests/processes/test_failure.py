"""A process that dies or hangs stops all the others of its run within bounded time, and is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.launches import Training, both_passes, start

import geomprobe
from geomprobe import open_trace
from geomprobe.cli import main
from geomprobe.distributed import watchdog
from geomprobe.distributed.progress import Place, ProgressMarker
from geomprobe.distributed.watchdog import SILENCE_S, FailureDetector, Heartbeat
from geomprobe.trace.record import open_record

PATIENCE_S = 6.0
PAUSE_S = 0.4  # so that the first rows are committed before the trouble comes, since what is committed is what stays


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hung() -> None:
    time.sleep(1000)


def gone() -> None:
    os._exit(9)


def broken() -> None:
    raise ValueError("the disk is on fire")


def watched(run: Path, training: Training, doing: str) -> None:
    """One pass of a training, with what it says on standard error kept beside the run."""
    log = os.open(run.parent / f"stderr.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    watchdog.BROKEN_S, watchdog.GRACE_S = 3.0, 2.0
    if doing == "record":
        geomprobe.record(training, run, seed=0, patience=PATIENCE_S).close()
    else:
        geomprobe.replay(training, run, patience=PATIENCE_S)


def troubled(size: int, run: Path, kind: str, place: Any, trouble: Any, doing: str = "record") -> list[Any]:
    """Exit code of each rank, and all that it said."""
    training = Training(kind, place=place, trouble=trouble, pause=PAUSE_S)
    found = []
    for rank, (code, result) in enumerate(start(size, watched, run.parent, run, training, doing)):
        text = (run.parent / f"stderr.{rank}").read_text()
        found.append((code, f"{result} {text}"))
    return found


def assert_readable(run: Path, steps: int) -> None:
    """The rows that were committed are there, of each rank."""
    with open_record(run) as left:
        assert left.status == "incomplete"
        assert 1 <= left.num_steps <= steps


@pytest.mark.parametrize(
    ("kind", "rank", "trouble"),
    [
        ("DDP", 1, killed),
        pytest.param("FSDP2", 1, gone, marks=pytest.mark.slow),
        pytest.param("DDP", 0, killed, marks=pytest.mark.slow),
        pytest.param("DDP", 1, stopped, marks=pytest.mark.slow),
        pytest.param("FSDP2", 0, stopped, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_stops_the_others_and_is_named(tmp_path: Path, kind: str, rank: int, trouble: Any) -> None:
    said = troubled(3, tmp_path / "run", kind, (rank, 5), trouble)
    for other, (code, text) in enumerate(said):
        if other != rank:
            assert code == 1
            assert f"rank {other} stops: rank {rank}" in text
            if rank != 0:
                assert "has given no sign of life for" in text
    assert_readable(tmp_path / "run", 5)


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("DDP", 1),
        pytest.param("DDP", 0, marks=pytest.mark.slow),
        pytest.param("FSDP2", 2, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_stops_all_and_the_error_says_where_it_stands(tmp_path: Path, kind: str, rank: int) -> None:
    began = time.monotonic()
    said = troubled(3, tmp_path / "run", kind, (rank, 5), hung)
    assert time.monotonic() - began < PATIENCE_S + 30
    for other, (code, text) in enumerate(said):
        assert code == 1
        assert f"rank {other} stops: the run has stood still for " in text
        assert f"because of rank {rank}: rank {rank} stands at step 5, with its batch, test_failure.py:" in text
    assert ", in hung\n" in said[rank][1]  # where its main thread stood
    assert_readable(tmp_path / "run", 5)


@pytest.mark.slow
def test_rows_measured_before_a_rank_hung_in_the_replay_stay_readable(tmp_path: Path) -> None:
    run = tmp_path / "run"
    both_passes(2, Training("DDP"), run)
    (run / "trace.h5").unlink()
    said = troubled(2, run, "DDP", (1, 7), hung, "replay")
    assert [code for code, _ in said] == [1, 1]
    left = open_trace(run)
    assert left.status == "incomplete"
    assert 1 <= left.num_steps <= 7


@pytest.mark.slow
def test_a_script_that_fails_on_one_rank_is_named_on_the_others_and_not_their_broken_exchange(
    tmp_path: Path,
) -> None:
    said = troubled(3, tmp_path / "run", "DDP", (2, 5), broken)
    assert [code for code, _ in said] == [1, 1, 1]
    assert "ValueError: the disk is on fire" in said[2][1]
    for rank in (0, 1):
        assert f"rank {rank} stops because rank 2 did: ValueError: the disk is on fire" in said[rank][1]


@pytest.mark.slow
def test_torchrun_names_a_killed_rank_and_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from support.launches import Training\nfrom processes.test_failure import killed\n"
        "Training('DDP', place=(1, 5), trouble=killed, pause=0.4)()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "geomprobe"]
    done = subprocess.run([*torchrun, "record", "-o", "run", "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    cause = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in cause
    assert "exitcode  : -9 " in cause
    assert_readable(tmp_path / "run", 5)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_patience_is_a_number_of_seconds(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        main(["replay", f"--patience={text}", "run"])
    assert f"'{text}' is no number of seconds above 0" in capsys.readouterr().err


# The failure detector, with time that the test makes


def heard(detector: FailureDetector, places: dict[int, Place], seconds: float) -> str | None:
    """What is said after each process has beaten each second."""
    said = None
    for number in range(int(seconds)):
        now = {rank: Heartbeat(number, place._replace(still=number + 1.0)) for rank, place in places.items()}
        detector.add(now, 1.0)
        said = said or detector.verdict()
    return said


WAITING, LATE = Place(7, 4, False, "train.py:9", 0.0), Place(7, 1, False, "data.py:3", 0.0)


def test_a_process_that_moves_holds_no_one_up_however_long_the_others_wait_for_it() -> None:
    detector = FailureDetector(2, patience=10.0)
    for number in range(1000):
        detector.add({0: Heartbeat(number, WAITING._replace(still=float(number))), 1: Heartbeat(number, LATE)}, 1.0)
        assert detector.verdict() is None


def test_where_no_one_is_behind_all_are_told_with_their_lines() -> None:
    said = heard(FailureDetector(2, patience=10.0), {0: WAITING, 1: WAITING._replace(line="train.py:8")}, 11)
    assert said is not None
    assert said.startswith(
        "the run has stood still for 10 s: rank 0 stands at step 7, in the backward pass, train.py:9; rank 1 stands at"
    )


def test_a_run_that_was_suspended_as_a_whole_goes_on() -> None:
    detector = FailureDetector(2, patience=1800.0)
    assert heard(detector, {0: WAITING, 1: LATE}, 3) is None
    detector.add(
        {0: Heartbeat(3, WAITING), 1: Heartbeat(2, LATE._replace(still=3.0))}, 7200.0
    )  # its next beat comes later
    assert detector.verdict() is None


def test_silence_counts_for_less_where_an_exchange_has_broken() -> None:
    for broken_exchange, limit in ((False, SILENCE_S), (True, watchdog.BROKEN_S)):
        detector = FailureDetector(3, patience=1800.0)
        detector.exchange_broken = broken_exchange
        beat = Heartbeat(1, LATE)
        seconds = 0
        while detector.verdict() is None:
            detector.add({0: Heartbeat(seconds, WAITING), 1: Heartbeat(seconds, WAITING), 2: beat}, 1.0)
            seconds += 1
        assert seconds == limit + 1
        assert detector.verdict().startswith(f"rank 2 has given no sign of life for {limit:.0f} s")


def test_a_process_that_never_begins_is_named_when_patience_is_out() -> None:
    detector = FailureDetector(2, patience=20.0)
    for number in range(20):
        assert detector.verdict() is None
        detector.add({0: Heartbeat(number, LATE), 1: None}, 1.0)
    assert detector.verdict().startswith("rank 1 has not begun within 20 s")


def test_a_process_that_has_left_is_named_where_the_others_wait_in_vain() -> None:
    detector = FailureDetector(2, patience=10.0)
    said = heard(detector, {0: WAITING, 1: Place(6, 0, False, "", 0.0, left=True)}, 11)
    assert said is not None
    assert "rank 0 stands at step 7, in the backward pass, train.py:9; rank 1 left before step 6." in said


def test_a_store_that_does_not_answer_is_noticed_though_its_calls_heed_no_time_limit() -> None:
    class Suspended:
        def set(self, key: str, value: str) -> None:
            time.sleep(60)

    found = watchdog.Watchdog(Suspended(), 1, 2, 2.0, ProgressMarker(), lambda: None)
    found.start()
    deadline = time.monotonic() + 60
    while found.failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    found.stop()
    assert found.failure is not None
    assert "that store has not answered for 2 s." in found.failure.text
