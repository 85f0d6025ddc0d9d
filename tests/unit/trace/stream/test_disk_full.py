"""A full disk is an error with words, at any byte: no crash, no hang, and what was safe stays safe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.part_cases import assert_right, write_part

from geomprobe.trace.reader import open_trace
from geomprobe.trace.stream.reader import PartNotBegun, read_part

pytest.importorskip("resource")

ROOT = Path(__file__).parents[4]
LIMITS = (0, 100, 5000, 20_000, 77_777, 200_000, 400_001, 1_000_000)


def run(thing, folder, limits=LIMITS):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [
        sys.executable,
        str(ROOT / "tests/support/full_disk.py"),
        thing,
        str(folder),
        *map(str, limits),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")]
    said = [line for line in done.stdout.splitlines() if not line.startswith("status")]
    return statuses, said, done.stderr


def test_appending_fails_with_the_safe_rows_named_and_keeps_failing_alike(tmp_path):
    statuses, said, _ = run("caught", tmp_path)
    assert set(statuses) == {0, 1}  # 1: not even the empty part could be made
    counts = [int(line.split()[0]) for line in said]
    assert max(counts) > 1000
    for line, count in zip(said, counts, strict=True):
        assert line.startswith(f"{count} True cannot write {tmp_path}")
        assert f"{count} rows were committed, are safe" in line
        assert "Free space on that disk" in line


def test_the_rows_that_were_safe_read_back(tmp_path):
    limits = LIMITS[-3:]
    _, said, _ = run("caught", tmp_path, limits)
    for limit, count in zip(limits, (int(line.split()[0]) for line in said), strict=True):
        part = read_part(tmp_path / str(limit) / "part.h5")
        assert_right(part)
        assert part.rows >= count


def test_an_unhandled_failure_exits_with_1_and_its_message(tmp_path):
    statuses, _, errors = run("uncaught", tmp_path, [77_777, 400_001])
    assert statuses == [1, 1]
    assert errors.count("WriteFailed: cannot write") == 2


@pytest.mark.parametrize("thing", ["left_open", "closed_when_full", "exited_when_full"])
def test_no_way_of_ending_on_a_full_disk_crashes(tmp_path, thing):
    statuses, _, errors = run(thing, tmp_path, [400_001, 1_000_000])
    assert statuses == [0, 0]
    assert errors == ""
    assert_right(read_part(tmp_path / "1000000" / "part.h5"))


def test_a_part_that_could_not_even_be_made_is_told_from_a_damaged_one(tmp_path):
    statuses, _, errors = run("uncaught", tmp_path, [5000])
    assert statuses == [1]
    assert "WriteFailed: cannot write" in errors
    with pytest.raises(PartNotBegun):
        read_part(tmp_path / "5000" / "part.h5")


def test_sealing_on_a_full_disk_leaves_the_old_trace_and_no_rubbish(tmp_path):
    write_part(tmp_path / "whole.h5", stop=100)
    assert run("seal", tmp_path, [10**9])[0] == [0]
    before = (tmp_path / "trace.h5").read_bytes()
    (tmp_path / "whole.h5").unlink()
    write_part(tmp_path / "whole.h5", stop=5000)
    limits = LIMITS[::2]
    statuses, said, errors = run("seal", tmp_path, limits)
    assert set(statuses) == {0}
    assert errors == ""
    assert all("File too large" in line for line in said)
    assert len(said) == len(limits)
    assert (tmp_path / "trace.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["trace.h5", "whole.h5"]
    assert open_trace(tmp_path / "trace.h5").num_steps == 100


def test_taking_a_reference_on_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    statuses, said, errors = run("reference", tmp_path)
    assert set(statuses) == {0}
    assert errors == ""
    assert all("File too large" in line for line in said)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
