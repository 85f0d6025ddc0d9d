"""Parts that grow, vanish and are replaced are followed: each row comes once, and only new ones are read."""

import contextlib

import numpy as np
import pytest
from support.live_writer import COLUMNS, LiveWriter, append, open_part, rows

from geomprobe.trace.stream import tail as follow
from geomprobe.trace.stream.tail import Following


class Rows:
    """Keeps what comes, by step."""

    def __init__(self):
        self.forgotten = -1
        self.forget()

    def forget(self):
        self.forgotten += 1
        self.found = {}
        self.times = 0

    def take(self, header, block):
        assert header.tables["values"].columns == COLUMNS["trace"]
        for step, row in zip(block["step"], block["values"], strict=True):
            self.times += 1
            self.found[int(step)] = row

    def check(self, *ranges):
        steps = [step for first, stop in ranges for step in range(first, stop)]
        assert sorted(self.found) == steps
        assert self.times == len(steps)
        for first, stop in ranges:
            found = np.array([self.found[step] for step in range(first, stop)])
            np.testing.assert_array_equal(found, rows("trace", first, stop))


@pytest.fixture
def stream(tmp_path):
    (tmp_path / "stream").mkdir()
    return tmp_path / "stream"


@pytest.fixture
def asked(monkeypatch):
    """The parts that are read, and from which row."""
    calls, real = [], follow.stream_part

    def counted(path, *, tables, start):
        calls.append((path.name, start))
        return real(path, tables=tables, start=start)

    monkeypatch.setattr(follow, "stream_part", counted)
    return calls


def part(stream, first, count, name=None):
    with open_part(stream / (name or f"trace-{first:08d}.h5"), "trace", first) as writer:
        append(writer, "trace", first, count)


def extents(headers):
    return sorted((header.first_step, header.rows) for header in headers)


def test_several_parts_of_a_living_writer_are_followed_and_each_row_comes_once(tmp_path, stream):
    found, following = Rows(), Following(stream, "trace")
    assert following.look(found) == []
    with LiveWriter(tmp_path) as live:
        live.append(5)
        assert extents(following.look(found)) == [(0, 5)]
        live.append(70)
        live.append(1, first=1000)
        live.append(8, first=500)
        assert extents(following.look(found)) == [(0, 75), (500, 8), (1000, 1)]
        live.append(2, first=1000)
        assert extents(following.look(found)) == [(0, 75), (500, 8), (1000, 3)]
        assert extents(following.look(found)) == [(0, 75), (500, 8), (1000, 3)]
        live.kill()
        following.look(found)
    found.check((0, 75), (500, 508), (1000, 1003))
    assert found.forgotten == 0


def test_a_look_reads_nothing_but_what_is_new(stream, asked, monkeypatch):
    monkeypatch.setattr(follow, "_SETTLED_S", 0.0)
    found, following = Rows(), Following(stream, "trace")
    part(stream, 0, 40)
    part(stream, 100, 30)
    following.look(found)
    del asked[:]
    following.look(found)
    assert asked == []
    with open_part(stream / "trace-00000200.h5", "trace", 200) as writer:
        for _ in range(3):
            append(writer, "trace", 200, 10)
            following.look(found)
    assert asked == [("trace-00000200.h5", 0), ("trace-00000200.h5", 9), ("trace-00000200.h5", 19)]
    found.check((0, 40), (100, 130), (200, 230))


def test_a_file_that_was_written_just_now_is_looked_at_once_more(stream, asked):
    """Two writes within the clock's resolution leave one time."""
    part(stream, 0, 40)
    following = Following(stream, "trace")
    following.look(Rows())
    following.look(Rows())
    assert asked == [("trace-00000000.h5", 0), ("trace-00000000.h5", 39)]


@pytest.mark.parametrize("count", [3, 40, 90])
def test_a_part_that_was_begun_anew_is_read_anew(stream, count):
    found, following = Rows(), Following(stream, "trace")
    with open_part(stream / "trace-00000000.h5", "trace", 0) as writer:
        writer.append({"values": rows("trace", 5000, 5040)})  # of another run
        following.look(found)
        (stream / "trace-00000000.h5").unlink()
    part(stream, 0, count)
    assert extents(following.look(found)) == [(0, count)]
    found.check((0, count))
    assert found.forgotten == 1


def test_parts_that_vanish_take_their_rows_with_them(stream):
    found, following = Rows(), Following(stream, "trace")
    part(stream, 0, 10)
    part(stream, 50, 10)
    following.look(found)
    (stream / "trace-00000000.h5").unlink()
    following.look(found)
    found.check((50, 60))
    (stream / "trace-00000050.h5").unlink()
    stream.rmdir()
    assert following.look(found) == []
    found.check()


def test_a_part_that_vanishes_while_it_is_read_is_no_problem(stream, monkeypatch):
    found, following = Rows(), Following(stream, "trace")
    part(stream, 0, 10)
    part(stream, 50, 10)
    real = follow.stream_part

    @contextlib.contextmanager
    def vanishing(path, **options):
        path.unlink(missing_ok=True)
        with real(path, **options) as opened:
            yield opened

    monkeypatch.setattr(follow, "stream_part", vanishing)
    assert following.look(found) == []
    assert following.problems == {}
    found.check()


def test_what_is_not_of_this_pass_is_left_alone(stream):
    found, following = Rows(), Following(stream, "trace")
    part(stream, 0, 10)
    for name in ("record-00000000.h5", ".trace-00000000.h5.new", "trace-00000000.json", "lock"):
        (stream / name).write_text("something")
    (stream / "trace-00000010.h5").touch()  # its writer has just begun
    assert extents(following.look(found)) == [(0, 10)]
    assert following.problems == {}


def test_a_part_that_cannot_be_read_is_told_and_not_tried_again_until_it_changes(stream, asked):
    found, following = Rows(), Following(stream, "trace")
    broken = stream / "trace-00000100.h5"
    broken.write_text("this is no HDF5 file at all")
    part(stream, 0, 10)
    for _ in range(3):
        assert extents(following.look(found)) == [(0, 10)]
        assert "is no HDF5 file" in following.problems[broken]
    assert asked.count((broken.name, 0)) == 1
    broken.unlink()
    part(stream, 100, 10)
    following.look(found)
    assert following.problems == {}
    found.check((0, 10), (100, 110))


def test_a_recording_is_followed_by_its_table_of_floats(tmp_path, stream):
    class Steps:
        def take(self, header, block):
            assert set(block) == {"step", "steps"}
            self.rows = block["steps"]

    found = Steps()
    with LiveWriter(tmp_path, "record") as live:
        live.append(6)
        assert extents(Following(stream, "record").look(found)) == [(0, 6)]
    np.testing.assert_array_equal(found.rows, rows("record", 0, 6))
