"""What is no trace is refused by what it is: each case has its own words and names what to do."""

import h5py
import pytest
from support.part_cases import write_part

from geomprobe.errors import RunError
from geomprobe.trace.reader import open_trace
from geomprobe.trace.record import open_record
from geomprobe.trace.schema import VERSIONS
from geomprobe.trace.seal import seal_record, seal_trace

TRACE, RECORD = "geomprobe-trace", "geomprobe-record"


def recorded(folder):
    part = write_part(folder / "r.part", RECORD)
    seal_record([part], folder / "record.h5", status="complete", num_parameters=1, manifest={}, references={})


def replayed(folder):
    part = write_part(folder / "t.part", TRACE)
    seal_trace([part], folder / "trace.h5", status="complete", num_parameters=1, manifest={})


def streaming(folder, kind):
    (folder / "stream").mkdir()
    write_part(folder / "stream" / "p.h5", kind)


def foreign(folder):
    with h5py.File(folder / "trace.h5", "w") as file:
        file["x"] = 1


def begun(folder):
    (folder / "stream").mkdir()
    (folder / "stream" / "p.h5").touch()


def other_version(folder, name="trace.h5"):
    (replayed if name == "trace.h5" else recorded)(folder)
    with h5py.File(folder / name, "r+") as file:
        file.attrs["schema_version"] = 99


def cut_off(folder):
    replayed(folder)
    content = (folder / "trace.h5").read_bytes()
    (folder / "trace.h5").write_bytes(content[: len(content) // 2])


CASES = {
    "a run that was recorded only": (recorded, "was recorded, but not replayed yet. Run: geomprobe replay"),
    "a run that is being recorded": (lambda folder: streaming(folder, RECORD), "still being recorded"),
    "a run that has just begun": (begun, "holds no rows yet"),
    "a folder that is no run": (lambda folder: None, "is no run of geomprobe. Make one: geomprobe record -o"),
    "an HDF5 file of others": (foreign, "geomprobe did not make it"),
    "another schema version": (other_version, "is of schema version 99, and this geomprobe reads version 1"),
    "a file that is no HDF5": (
        lambda folder: (folder / "trace.h5").write_text("text, only"),
        "is no HDF5 file",
    ),
    "a file that lost its end": (cut_off, "cannot be read as a sealed pass .*truncated"),
}


@pytest.mark.parametrize("case", CASES)
def test_opening_a_trace_says_what_there_is_instead(tmp_path, case):
    make, words = CASES[case]
    make(tmp_path)
    with pytest.raises(RunError, match=words) as caught:
        open_trace(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_path_that_does_not_exist_is_not_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        open_trace(tmp_path / "runs" / "a")


def test_a_file_of_the_other_kind_is_told_from_a_foreign_one(tmp_path):
    recorded(tmp_path)
    replayed(tmp_path)
    streaming(tmp_path, RECORD)
    for path in ("record.h5", "stream/p.h5", "r.part"):
        with pytest.raises(RunError, match="holds geomprobe-record, not geomprobe-trace"):
            open_trace(tmp_path / path)
    with pytest.raises(RunError, match="holds geomprobe-trace, not geomprobe-record"):
        open_record(tmp_path / "trace.h5")


def test_a_record_of_another_version_or_none_is_refused(tmp_path):
    with pytest.raises(RunError, match="is no run of geomprobe"):
        open_record(tmp_path)
    other_version(tmp_path, "record.h5")
    with pytest.raises(RunError, match=r"schema version 99, and this geomprobe reads version 2\. Open it with"):
        open_record(tmp_path)


@pytest.mark.parametrize("name", ["record.h5", "stream/p.h5"])
def test_a_record_of_the_version_before_is_refused_with_what_to_do(tmp_path, monkeypatch, name):
    if name == "record.h5":
        recorded(tmp_path)
        with h5py.File(tmp_path / name, "r+") as file:
            file.attrs["schema_version"] = 1
    else:
        with monkeypatch.context() as earlier:
            earlier.setitem(VERSIONS, RECORD, 1)
            streaming(tmp_path, RECORD)
    with pytest.raises(RunError) as caught:
        open_record(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / name} is a record of schema version 1, which has no digests of gradients, and this geomprobe "
        "reads version 2. Record the run again: geomprobe record --force"
    )


def test_the_sealed_file_wins_over_parts_that_were_left_behind(tmp_path):
    replayed(tmp_path)
    streaming(tmp_path, TRACE)
    assert open_trace(tmp_path).status == "complete"
