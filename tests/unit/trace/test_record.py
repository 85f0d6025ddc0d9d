import tracemalloc

import numpy as np
import pytest
from support.part_cases import RECORD_TABLES, expected, flip_bit, open_part, write_part

from geomprobe.errors import RunError
from geomprobe.trace import record as records
from geomprobe.trace.record import open_record
from geomprobe.trace.seal import seal_record, write_reference

KIND = "geomprobe-record"
RNG, WEIGHTS = RECORD_TABLES[1], RECORD_TABLES[2]


def seal(folder, references=(), status="complete"):
    seal_record(
        sorted(path for path in (folder / "stream").glob("*.h5") if not path.name.startswith("reference-")),
        folder / "record.h5",
        status=status,
        num_parameters=7,
        manifest={"seed": 3},
        references={name: folder / "stream" / f"reference-{name}.h5" for name in references},
    )


@pytest.fixture(scope="module", params=["sealed", "streaming"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    stream = folder / "stream"
    stream.mkdir()
    write_part(stream / "a.h5", KIND, stop=3000)
    write_part(stream / "b.h5", KIND, 3000, 3010)
    for name in ("step-2", "final"):
        write_reference(stream / f"reference-{name}.h5", {"w": (np.ones(3, np.float32), "float32")})
    if request.param == "sealed":
        seal(folder, ["final", "step-2"])
    return folder


def test_a_record_gives_its_facts(run):
    with open_record(run) as record:
        done = (run / "record.h5").exists()
        assert record.status == ("complete" if done else "incomplete")
        assert (record.path, record.num_steps, record.num_parameters) == (run, 3010, 7)
        assert record.manifest == ({"seed": 3} if done else {})
        assert record.references == ["final", "step-2"]
        assert record.names("weights") == list(WEIGHTS.columns)
        assert record.names("buffers") == record.names("batch") == []


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (2990, 3005), (3005, 9999), (7, 7), (0, 3010)])
def test_fingerprints_come_by_steps(run, start, stop):
    with open_record(run) as record:
        steps = np.arange(start, min(stop, 3010))
        for table in (RNG, WEIGHTS):
            found = record.fingerprints(table.name.partition("/")[2], start, stop)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, expected(table, steps))
        for absent in ("buffers", "batch"):
            assert record.fingerprints(absent, start, stop).shape == (len(steps), 0)


def test_rows_of_a_part_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    (tmp_path / "stream").mkdir()
    write_part(tmp_path / "stream" / "p.h5", KIND)
    with open_record(tmp_path) as record:
        half = record.num_steps // 2  # as from a part whose later blocks fail their checks
        monkeypatch.setattr(records, "read_rows", lambda spans, table, start, stop: ([], np.zeros((half, 2), np.int64)))
        with pytest.raises(RunError, match=f"damaged: of steps 0 to {2 * half - 1} only {half} can be read"):
            record.fingerprints("weights", 0, 2 * half)


def test_steps_come_as_columns(run):
    with open_record(run) as record:
        steps = record.steps
    assert sorted(steps) == ["epoch", "loss", "lr", "step"]
    np.testing.assert_array_equal(steps["step"], np.arange(3010))
    np.testing.assert_array_equal(steps["lr"], expected(RECORD_TABLES[0], np.arange(3010))[:, 2])


def test_references_come_by_name_and_others_are_refused_with_what_there_is(run):
    with open_record(run) as record:
        array, dtype = record.reference("step-2")["w"]
        assert (array.tolist(), dtype) == ([1, 1, 1], "float32")
        with pytest.raises(RunError, match="no reference 'best'; it has: final, step-2"):
            record.reference("best")


def test_a_failed_record_has_no_reference_and_says_so(tmp_path):
    (tmp_path / "stream").mkdir()
    write_part(tmp_path / "stream" / "p.h5", KIND)
    seal(tmp_path, status="failed")
    with open_record(tmp_path) as record:
        assert (record.status, record.references) == ("failed", [])
        with pytest.raises(RunError, match=r"\(failed\) has no reference 'final'; it has: none"):
            record.reference("final")


def test_closing_twice_is_harmless(run):
    record = open_record(run)
    record.close()
    record.close()


def test_only_the_rows_that_are_asked_for_are_read(tmp_path):
    (tmp_path / "stream").mkdir()
    with open_part(tmp_path / "stream" / "p.h5", KIND) as writer:
        for start in range(0, 100_000, 10_000):
            writer.append({table.name: expected(table, np.arange(start, start + 10_000)) for table in RECORD_TABLES})
    seal(tmp_path)
    with open_record(tmp_path) as record:
        tracemalloc.start()
        for start in range(0, 100_000, 1000):
            record.fingerprints("weights", start, start + 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_recording_behind_a_gap_is_not_replayable_and_not_shown(tmp_path):
    (tmp_path / "stream").mkdir()
    write_part(tmp_path / "stream" / "a.h5", KIND, 0, 10)
    write_part(tmp_path / "stream" / "b.h5", KIND, 20, 30)
    with open_record(tmp_path) as record:
        assert record.num_steps == 10


def test_damaged_fingerprints_are_named(tmp_path):
    (tmp_path / "stream").mkdir()
    write_part(tmp_path / "stream" / "p.h5", KIND, stop=50)
    seal(tmp_path)
    flip_bit(tmp_path / "record.h5", "fingerprints/rng")
    with open_record(tmp_path) as record, pytest.raises(RunError, match=r"fingerprints/rng in .* is damaged"):
        record.fingerprints("rng", 0, 50)
