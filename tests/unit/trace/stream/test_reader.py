import os
import time

import h5py
import numpy as np
import pytest
from support.part_cases import TRACE_TABLES, assert_right, blocks, expected, open_part, write_part

from geomprobe.errors import RunError
from geomprobe.trace.stream import reader as part_module
from geomprobe.trace.stream.reader import PartNotBegun, part_state, read_header, read_part, stream_part

KIND = "geomprobe-record"


def child(monkeypatch, code):
    """Put a child that does `code` in the place of the one that reads."""
    monkeypatch.setattr(part_module, "_CHILD", code)


def test_a_range_of_rows_and_tables_can_be_streamed(tmp_path):
    path = write_part(tmp_path / "p.h5", KIND, start=100, stop=200)
    with stream_part(path, tables=["fingerprints/rng"], start=30, stop=50) as (header, blocks_):
        (block,) = blocks_
    assert (header.first_step, header.rows, header.stop_step) == (100, 100, 200)
    assert sorted(block) == ["fingerprints/rng", "step"]
    steps = np.arange(130, 150)
    np.testing.assert_array_equal(block["step"], steps)
    np.testing.assert_array_equal(
        block["fingerprints/rng"], expected(header.tables["fingerprints/rng"], steps)
    )


def test_long_parts_come_in_blocks_of_bounded_size(tmp_path):
    path = tmp_path / "p.h5"
    with open_part(path, KIND) as writer:
        writer.append(blocks(KIND, 0, 50_000))
    with stream_part(path) as (_, streamed):
        sizes = [sum(array.nbytes for array in block.values()) for block in streamed]
    assert len(sizes) > 1
    assert max(sizes) <= 4 << 20
    assert_right(read_part(path))


def test_a_reader_may_leave_early(tmp_path):
    path = tmp_path / "p.h5"
    with open_part(path, KIND) as writer:
        writer.append(blocks(KIND, 0, 50_000))
    with stream_part(path) as (_, streamed):
        next(streamed)
    assert read_header(path).rows == 50_000


@pytest.mark.parametrize("content", [b"", b"\0" * 4096])
def test_a_file_without_a_superblock_has_not_begun(tmp_path, content):
    path = tmp_path / "p.h5"
    path.write_bytes(content)
    assert part_state(path) == "new"
    with pytest.raises(PartNotBegun, match="holds nothing yet"):
        read_part(path)


def test_a_file_whose_creation_was_cut_off_has_not_begun(tmp_path):
    path = tmp_path / "p.h5"
    with h5py.File(path, "x", libver="latest") as file:
        file["a"] = 1
        file.flush()
        assert part_state(path) == "new"
        with pytest.raises(PartNotBegun):
            read_part(path)


def test_files_that_are_no_parts_are_refused(tmp_path):
    (tmp_path / "text.h5").write_text("a text that is no HDF5 file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = 1
    with pytest.raises(RunError, match="no HDF5 file"):
        read_part(tmp_path / "text.h5")
    with pytest.raises(RunError, match="cannot be read as a part"):
        read_part(tmp_path / "other.h5")
    with pytest.raises(RunError, match="does not exist"):
        read_part(tmp_path / "missing.h5")


def test_a_child_that_hangs_is_ended_within_the_time_limit(tmp_path, monkeypatch):
    path = write_part(tmp_path / "p.h5")
    child(monkeypatch, "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(RunError, match=r"within 0\.3 s: it is damaged"):
        read_part(path, timeout_s=0.3)
    assert time.monotonic() - start < 10


def test_a_child_that_crashes_is_reported_not_followed(tmp_path, monkeypatch):
    path = write_part(tmp_path / "p.h5")
    child(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(RunError, match="SIGSEGV"):
        read_part(path)


def test_the_child_finds_the_package_wherever_the_parent_did(tmp_path, monkeypatch):
    path = write_part(tmp_path / "p.h5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert_right(read_part(path))


def test_a_hole_or_a_changed_bit_ends_the_rows_before_it(tmp_path):
    """What a power cut leaves: the marks are on disk, some of the values are not."""
    path = write_part(tmp_path / "p.h5", stop=1000)
    content = path.read_bytes()
    for row, change in ((600, bytes(8)), (17, None), (0, bytes(8))):
        value = expected(TRACE_TABLES[0], [row])[0, 1].tobytes()
        place = content.index(value)
        damaged = bytearray(content)
        damaged[place : place + 8] = change or bytes([value[0] ^ 1, *value[1:]])
        path.write_bytes(bytes(damaged))
        part = read_part(path)
        assert part.rows == row
        assert_right(part)


def test_a_file_that_lost_its_end_gives_no_wrong_row(tmp_path):
    path = write_part(tmp_path / "p.h5", KIND, stop=2000)
    size = path.stat().st_size
    for keep in (size - 1, size // 2):
        os.truncate(path, keep)
        try:
            part = read_part(path, timeout_s=2)
        except RunError:
            continue
        assert_right(part)


def test_a_living_writer_in_another_process_is_read_without_a_wrong_row(tmp_path):
    path = tmp_path / "p.h5"
    process = os.fork()
    if process == 0:
        with open_part(path, KIND) as writer:
            while True:
                writer.append(blocks(KIND, writer.rows, writer.rows + 7))
    try:
        rows = []
        while not path.exists() or part_state(path) == "new":
            time.sleep(0.01)
        for _ in range(4):
            part = read_part(path)
            assert_right(part)
            rows.append(part.rows)
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
    assert rows == sorted(rows)
    assert rows[-1] > rows[0]
