"""Snapshots of passes that are being written, killed, begun anew, gone on with and sealed in other processes."""

import os

import numpy as np
import pytest
from support.live_writer import (
    EPOCH,
    FIRST_DIFFERENT,
    RATE,
    LiveWriter,
    append,
    cosine,
    loss,
    open_part,
    residual,
)

from geomprobe.errors import RunError
from geomprobe.report.watch import snapshot as watch_module
from geomprobe.report.watch.snapshot import DownsampledCurve, Last, Watch
from geomprobe.trace.seal import seal_record, seal_trace

TOTAL = 400


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def part(run, kind, first, count):
    path = run / "stream" / f"{kind}-{first:08d}.h5"
    with open_part(path, kind, first) as writer:
        append(writer, kind, first, count)
    return path


def seal(run, kind, status="complete"):
    parts = sorted((run / "stream").glob(f"{kind}-*"))
    facts = {"status": status, "num_parameters": 7, "manifest": {}}
    if kind == "record":
        seal_record(parts, run / "record.h5", references={}, **facts)
    else:
        seal_trace(parts, run / "trace.h5", **facts)
    for path in parts:
        path.unlink()


@pytest.fixture
def run(tmp_path):
    """Begun, with nothing in it."""
    (tmp_path / "a" / "stream").mkdir(parents=True)
    return tmp_path / "a"


@pytest.fixture
def recorded(run):
    part(run, "record", 0, TOTAL)
    seal(run, "record")
    return run


def test_a_replay_is_seen_as_it_grows_dies_and_is_begun_anew(recorded):
    clock = Clock()
    with LiveWriter(recorded) as live:
        watch = Watch(recorded, clock=clock)
        first = watch.look()
        assert (first.kind, first.state, first.steps, first.total) == ("trace", "starting", 0, TOTAL)
        assert (first.rate, first.left_s, first.age_s) == (None, None, None)
        clock.now += 60  # it takes its time to start
        live.append(20)
        assert watch.look().rate is None
        live.append(80)
        clock.now += 4
        second = watch.look()
        assert (second.state, second.steps, second.covered) == ("running", 100, ((0, 100),))
        assert (second.rate, second.left_s) == (20.0, 15.0)
        assert second.age_s < 10
        assert [writer.process for writer in second.writers] == [live.pid]
        live.kill()
        dead = watch.look()
        assert (dead.state, dead.steps, [writer.alive for writer in dead.writers]) == (
            "stopped",
            100,
            [False],
        )
    for path in (recorded / "stream").glob("trace-*"):
        path.unlink()
    with LiveWriter(recorded) as live:
        live.append(30)
        again = watch.look()
        assert (again.state, again.steps) == ("running", 30)
        assert again.last["loss"] == Last(29, loss(29))
        live.append(70)
        clock.now += 5
        assert watch.look().rate == 14.0  # of this writer alone


def test_the_last_values_and_the_curves_are_those_that_were_written(recorded):
    with LiveWriter(recorded) as live:
        live.append(205)
        snapshot = Watch(recorded).look()
    last = snapshot.last
    assert last["loss"] == Last(204, loss(204))
    assert last["epoch"] == Last(204, 204 // EPOCH)
    assert last["lr"] == Last(204, RATE)
    assert (last["grad_norm"].value, last["distance"].value) == (3, 2)
    assert last["cosine"].value == pytest.approx(cosine(204), rel=1e-12)
    assert last["relative_residual"].step == 200
    assert last["relative_residual"].value == pytest.approx(residual(200), rel=1e-12)
    assert "clr" in last
    x, y = snapshot.curves["cosine"]
    np.testing.assert_array_equal(x, np.arange(205))
    np.testing.assert_allclose(y, cosine(np.arange(205)), rtol=1e-12)
    x, y = snapshot.curves["relative_residual"]
    np.testing.assert_array_equal(x, np.arange(0, 205, 10))
    np.testing.assert_allclose(y, residual(x), rtol=1e-12)


def test_segments_that_grow_at_once_are_one_replay_with_gaps(recorded):
    clock = Clock()
    with LiveWriter(recorded) as one, LiveWriter(recorded.parent / "other") as two:
        watch = Watch(recorded, clock=clock)
        one.append(10)
        one.append(20, first=200)
        (recorded.parent / "other" / "stream" / "lock").replace(recorded / "stream" / "lock-200")
        assert watch.look().covered == ((0, 10), (200, 220))
        one.append(10)
        one.append(40, first=200)
        one.append(5, first=60)
        clock.now += 1
        snapshot = watch.look()
        assert snapshot.covered == ((0, 20), (60, 65), (200, 260))
        assert (snapshot.steps, snapshot.rate) == (85, 55.0)
        assert {writer.process for writer in snapshot.writers} == {one.pid, two.pid}
        one.append(40)
        assert watch.look().covered == ((0, 65), (200, 260))  # the first segment has reached the second
        assert watch.look().problems == ()


def test_a_replay_that_goes_on_over_steps_it_has_counts_each_once(recorded):
    part(recorded, "trace", 0, 100)
    watch = Watch(recorded)
    assert watch.look().state == "stopped"
    with LiveWriter(recorded) as live:
        live.append(50, first=80)
        snapshot = watch.look()
    assert (snapshot.state, snapshot.steps, snapshot.covered) == ("running", 130, ((0, 130),))


def test_a_pass_is_seen_being_sealed_and_then_ends(recorded):
    part(recorded, "trace", 0, TOTAL)
    plan = recorded / "stream" / "sealing-trace.json"
    plan.write_text("{}")
    watch = Watch(recorded)
    assert watch.look().state == "sealing"
    seal(recorded, "trace")
    assert watch.look().state == "sealed"  # whatever is left to tidy
    plan.unlink()
    over = watch.look()
    assert (over.state, over.status, over.steps, over.total) == ("sealed", "complete", TOTAL, TOTAL)
    assert (over.rate, over.left_s, over.age_s) == (None, None, None)
    assert over.last["loss"] == Last(TOTAL - 1, loss(TOTAL - 1))
    np.testing.assert_allclose(over.curves["cosine"][1], cosine(np.arange(TOTAL)), rtol=1e-12)


def test_a_pass_that_is_sealed_while_it_is_looked_at_is_sealed(recorded, monkeypatch):
    part(recorded, "trace", 0, TOTAL)
    watch = Watch(recorded)
    real = watch_module.Following.look

    def late(following, reader):
        seal(recorded, "trace")
        return real(following, reader)

    monkeypatch.setattr(watch_module.Following, "look", late)
    assert watch.look().state == "sealed"


def test_a_recording_shows_its_loss_and_epoch_and_ends_when_it_is_sealed(run):
    with LiveWriter(run, "record") as live:
        live.append(120)
        watch = Watch(run)
        snapshot = watch.look()
        assert (snapshot.kind, snapshot.state, snapshot.steps, snapshot.total) == (
            "record",
            "running",
            120,
            None,
        )
        assert set(snapshot.last) == {"epoch", "loss", "lr"}
        assert snapshot.last["epoch"] == Last(119, 119 // EPOCH)
        np.testing.assert_allclose(snapshot.curves["loss"][1], loss(np.arange(120)), rtol=1e-12)
        live.close()
    seal(run, "record")
    part(run, "trace", 0, 10)  # its replay has begun already
    over = watch.look()
    assert (over.kind, over.state, over.status, over.steps) == ("record", "sealed", "complete", 120)
    assert Watch(run).look().kind == "trace"


@pytest.mark.parametrize(("kind", "status"), [("record", "failed"), ("trace", "diverged")])
def test_a_pass_that_failed_is_over_until_somebody_takes_it_up_again(recorded, kind, status):
    if kind == "record":
        (recorded / "record.h5").unlink()
    part(recorded, kind, 0, 50)
    seal(recorded, kind, status)
    over = Watch(recorded).look()
    assert (over.kind, over.state, over.status) == (kind, "sealed", status)
    part(recorded, kind, 0, 50)  # such parts stay
    with LiveWriter(recorded, kind) as live:
        live.append(5, first=50)
        watch = Watch(recorded)
        snapshot = watch.look()
        assert (snapshot.state, snapshot.status, snapshot.steps) == ("running", "", 55)
        live.close()
    assert watch.look().state == "sealed"


def test_a_run_that_is_recorded_anew_under_a_watch_is_watched_anew(recorded):
    part(recorded, "trace", 0, 20)
    watch = Watch(recorded)
    assert watch.look().kind == "trace"
    for path in (recorded / "record.h5", recorded / "stream" / "trace-00000000.h5"):
        path.unlink()
    with LiveWriter(recorded, "record") as live:
        live.append(3)
        snapshot = watch.look()
    assert (snapshot.kind, snapshot.steps, snapshot.total) == ("record", 3, None)


def test_a_replay_that_ends_before_its_first_row_leaves_a_recorded_run(recorded):
    with LiveWriter(recorded) as live:
        watch = Watch(recorded)
        assert (watch.look().kind, watch.look().state) == ("trace", "starting")
        live.close()
    over = watch.look()
    assert (over.kind, over.state, over.status) == ("record", "sealed", "complete")


def test_it_may_wait_for_the_replay_of_a_recording(recorded):
    over = Watch(recorded).look()
    assert (over.kind, over.state, over.steps) == ("record", "sealed", TOTAL)
    watch = Watch(recorded, waits=True)
    waiting = watch.look()
    assert (waiting.kind, waiting.state, waiting.steps, waiting.total) == ("trace", "waiting", 0, TOTAL)
    with LiveWriter(recorded) as live:
        assert watch.look().state == "starting"
        live.append(4)
        assert watch.look().state == "running"
        live.kill()
    assert watch.look().state == "stopped"


def test_a_recording_that_is_seen_through_to_its_end_is_over_though_a_replay_might_follow(run):
    with LiveWriter(run, "record") as live:
        live.append(4)
        watch = Watch(run, waits=True)
        assert watch.look().state == "running"
        live.close()
    seal(run, "record")
    assert (watch.look().kind, watch.look().state) == ("record", "sealed")


def test_a_writer_elsewhere_is_unknown_until_its_rows_come(recorded):
    lock = recorded / "stream" / "lock"
    lock.write_text("process 1 on elsewhere.example\n")
    with open_part(recorded / "stream" / "trace-00000000.h5", "trace", 0) as writer:
        append(writer, "trace", 0, 5)
        watch = Watch(recorded)
        assert watch.look().state == "unknown"
        append(writer, "trace", 0, 5)
        assert watch.look().state == "running"
        assert watch.look().state == "unknown"


def test_the_column_that_says_uncertified_is_kept(run, monkeypatch):
    part(run, "trace", FIRST_DIFFERENT - 2, 1)
    assert Watch(run).look().last["same"].value == 1
    part(run, "trace", FIRST_DIFFERENT, 1)
    assert Watch(run).look().last["same"].value == 0


def test_nothing_is_written_by_looking(recorded):
    with LiveWriter(recorded) as live:
        live.append(10)

        def state():
            return {
                path: (path.stat().st_mtime_ns, path.read_bytes()) for path in recorded.rglob("*") if path.is_file()
            }

        before = state()
        watch = Watch(recorded)
        for _ in range(2):
            watch.look()
        assert state() == before


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, message in (("file", "is a file"), ("folder", "is no run"), ("nowhere", "does not exist")):
        with pytest.raises(RunError, match=f"{name} {message}"):
            Watch(tmp_path / name)


def test_a_damaged_part_is_told_and_the_others_are_shown(recorded):
    part(recorded, "trace", 0, 10)
    (recorded / "stream" / "trace-00000100.h5").write_text("not HDF5, and not short")
    snapshot = Watch(recorded).look()
    assert snapshot.steps == 10
    assert "trace-00000100.h5 is no HDF5 file" in snapshot.problems[0]


@pytest.mark.parametrize("blocks", [[1000], [1] * 50 + [950], [7] * 142 + [6]])
def test_a_curve_is_the_mean_over_stretches_however_it_comes(blocks):
    generator = np.random.default_rng(0)
    values = generator.normal(size=1000)
    values[::3] = np.nan
    values[1] = np.inf
    curve, start = DownsampledCurve(buckets=64), 0
    for size in blocks:
        curve.add(np.arange(start, start + size), values[start : start + size])
        start += size
    x, y = curve.points()
    stretches = [values[i : i + 16] for i in range(0, 1000, 16)]
    np.testing.assert_array_equal(x, np.arange(0, 1000, 16) + 7.5)
    np.testing.assert_allclose(y, [piece[np.isfinite(piece)].mean() for piece in stretches], rtol=1e-12)


def test_a_long_part_takes_bounded_memory_and_one_reading(run, monkeypatch):
    part(run, "trace", 0, 30_000)
    os.utime(run / "stream" / "trace-00000000.h5", (0, 0))
    watch = Watch(run)
    assert watch.look().steps == 30_000
    monkeypatch.setattr("geomprobe.trace.stream.tail.stream_part", None)
    snapshot = watch.look()
    assert snapshot.steps == 30_000
    assert len(snapshot.curves["cosine"][0]) <= 1024
