import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.part_cases import TRACE_TABLES, assert_right, blocks, expected, open_part, write_part

from geomprobe.errors import RunError
from geomprobe.trace.stream import reader as part_module
from geomprobe.trace.stream.reader import PartNotBegun, checked, part_state, read_header, read_part, stream_part

KIND = "geomprobe-record"


def child(monkeypatch, code):
    """Put a child that does `code` in the place of the next one that is started."""
    part_module.end_readers()
    monkeypatch.setattr(part_module, "_CHILD", code)


@pytest.fixture(autouse=True)
def ended():
    """No child of one test serves another."""
    yield
    part_module.end_readers()


@pytest.fixture
def started(monkeypatch):
    """The child processes that are started, in turn."""
    processes, real = [], subprocess.Popen

    def counted(*arguments, **options):
        processes.append(real(*arguments, **options))
        return processes[-1]

    part_module.end_readers()
    monkeypatch.setattr(subprocess, "Popen", counted)
    return processes


def test_a_range_of_rows_and_tables_can_be_streamed(tmp_path):
    path = write_part(tmp_path / "p.h5", KIND, start=100, stop=200)
    with stream_part(path, tables=["fingerprints/rng"], start=30, stop=50) as (header, blocks_):
        (block,) = blocks_
    assert (header.first_step, header.rows, header.stop_step) == (100, 100, 200)
    assert sorted(block) == ["fingerprints/rng", "step"]
    steps = np.arange(130, 150)
    np.testing.assert_array_equal(block["step"], steps)
    np.testing.assert_array_equal(block["fingerprints/rng"], expected(header.tables["fingerprints/rng"], steps))


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


def test_one_child_serves_every_read(tmp_path, started):
    paths = [write_part(tmp_path / f"{kind}.h5", kind) for kind in ("geomprobe-record", "geomprobe-trace")]
    for path in 2 * paths:
        assert read_header(path).rows == 10
        assert_right(read_part(path))
    assert len(started) == 1
    part_module.end_readers()
    assert started[0].returncode == -signal.SIGKILL


def test_reads_within_one_another_and_in_threads_do_not_mix(tmp_path):
    path = tmp_path / "p.h5"
    with open_part(path, KIND) as writer:
        writer.append(blocks(KIND, 0, 50_000))
    with stream_part(path) as (_, streamed):
        next(streamed)
        assert_right(read_part(path))
        assert next(streamed)["step"][0] > 0
    with ThreadPoolExecutor(3) as pool:
        for part in pool.map(read_part, [path] * 6):
            assert_right(part)


def test_a_file_that_hangs_costs_its_time_limit_and_the_next_read_works(tmp_path, started):
    path = write_part(tmp_path / "p.h5")
    assert_right(read_part(path))
    os.kill(started[0].pid, signal.SIGSTOP)  # as a torn file makes it stand still
    began = time.monotonic()
    with pytest.raises(RunError, match=r"within 0\.3 s: it is damaged"):
        read_part(path, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < 10
    assert_right(read_part(path))
    assert len(started) == 2


def test_a_child_that_is_killed_between_reads_is_started_again(tmp_path, started):
    path = write_part(tmp_path / "p.h5")
    for _ in range(3):
        assert_right(read_part(path))
        os.kill(started[-1].pid, signal.SIGKILL)
    assert_right(read_part(path))
    assert len(started) == 4


def test_the_read_after_a_file_that_is_no_part_works(tmp_path, started):
    path = write_part(tmp_path / "p.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = 1
    for _ in range(2):
        with pytest.raises(RunError, match=r"cannot be read as a part of a run \(schema is damaged"):
            read_part(tmp_path / "other.h5")
        assert_right(read_part(path))


def test_a_forked_process_does_not_keep_the_child_alive_and_reads_with_one_of_its_own(tmp_path, started):
    path = write_part(tmp_path / "p.h5")
    assert_right(read_part(path))
    holder = os.fork()
    if holder == 0:
        try:
            assert_right(read_part(path))
            part_module.end_readers()
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        part_module._idle.pop().close()  # as it is when this process is gone
        assert started[0].wait(10) == 0
        assert os.waitpid(holder, os.WNOHANG) == (0, 0)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def test_no_child_outlives_the_process_that_started_it(tmp_path):
    path = write_part(tmp_path / "p.h5")
    code = f"""
from pathlib import Path
from geomprobe.trace.stream import reader
reader.read_part(Path({str(path)!r}))
print(reader._living[0]._process.pid)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_table_without_columns_keeps_its_dtype(tmp_path):
    path = write_part(tmp_path / "p.h5", KIND)
    assert read_part(path).tables["fingerprints/buffers"][1].dtype == np.int64


def test_a_relative_path_is_that_of_the_folder_of_today(tmp_path, monkeypatch):
    """The process that reads was started in another folder than the one that the script has gone to since."""
    for name, stop in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        write_part(tmp_path / name / "p.h5", stop=stop)
        monkeypatch.chdir(tmp_path / name)
        assert read_header(Path("p.h5")).rows == stop
    (tmp_path / "b" / "p.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    with pytest.raises(RunError, match=r"^p\.h5 cannot be read as a sealed pass"):
        checked(Path("p.h5"), "sealed")
