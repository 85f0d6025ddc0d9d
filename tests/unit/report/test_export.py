"""Exports, read back with the tools that they are for."""

import csv
import json
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from support.live_writer import append, open_part
from support.sealed_runs import train, write_run

from geomprobe.errors import RunError, UsageError
from geomprobe.report import export as export_module
from geomprobe.report.export import FORMATS, export
from geomprobe.trace.reader import open_trace

REFERENCE = ("distance", "grad_dot_offset", "rsi", "eb", "cosine", "lolr")


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture
def trace(tmp_path, history):
    """Measured at each third step, with a second reference, and numbers that are awkward to write."""
    references = {"step-20": history.weights[20], 'odd, "name"': history.weights[5]}
    run = write_run(tmp_path / "a", history, every=3, references=references)
    with h5py.File(run / "trace.h5", "r+") as file:
        file["steps/loss"][:6] = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, np.inf, -np.inf]
    return open_trace(run)


def expected(trace):
    names = [name for name in trace.columns if name != "step"]
    names += [f"references/{name}/{column}" for name in trace.references[1:] for column in REFERENCE]
    return {name: trace[name] for name in names}


def same_bits(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.int64), wanted[~nan].view(np.int64))


def test_csv_reads_back_bit_for_bit_in_pandas(tmp_path, trace):
    pandas = pytest.importorskip("pandas")
    names = export(trace, "csv", tmp_path / "trace.csv")
    exact = {"float_precision": "round_trip"} if int(pandas.__version__.split(".")[0]) < 3 else {}
    frame = pandas.read_csv(tmp_path / "trace.csv", index_col="step", **exact)
    assert frame.index.tolist() == list(range(60))
    wanted = expected(trace)
    assert frame.columns.tolist() == list(wanted) == names[1:]
    assert len(wanted) == 16 + 12
    for name, values in wanted.items():
        same_bits(frame[name], values)


def test_csv_leaves_empty_what_was_not_measured(tmp_path, trace):
    export(trace, "csv", tmp_path / "trace.csv")
    text = (tmp_path / "trace.csv").read_text()
    assert "nan" not in text.lower()
    assert "\r" not in text
    with open(tmp_path / "trace.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["cosine"] == "" for row in rows] == [i % 3 != 0 for i in range(60)]
    same_bits([float(row["loss"]) for row in rows], trace["loss"])
    assert rows[0]["loss"] == "0.30000000000000004"
    assert rows[1]["step"] == "1"


@pytest.mark.parametrize("block", [1, 7, 60])
def test_csv_does_not_depend_on_its_blocks(tmp_path, trace, block, monkeypatch):
    export(trace, "csv", tmp_path / "whole.csv")
    monkeypatch.setattr(export_module, "_BLOCK_ROWS", block)
    export(trace, "csv", tmp_path / "blocks.csv")
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "blocks.csv").read_bytes()


def test_parquet_reads_back_bit_for_bit_with_step_as_the_index(tmp_path, trace):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    names = export(trace, "parquet", tmp_path / "trace.parquet")
    frame = pandas.read_parquet(tmp_path / "trace.parquet")
    assert (frame.index.name, frame.index.dtype, frame.index.tolist()) == ("step", np.int64, list(range(60)))
    wanted = expected(trace)
    assert frame.columns.tolist() == list(wanted) == names[1:]
    for name, values in wanted.items():
        same_bits(frame[name], values)


def test_parquet_says_what_its_columns_mean_and_what_the_trace_is(tmp_path, trace):
    parquet = pytest.importorskip("pyarrow.parquet")
    export(trace, "parquet", tmp_path / "trace.parquet")
    found = parquet.read_schema(tmp_path / "trace.parquet")
    for name in ("rsi", "references/step-20/rsi"):
        assert found.field(name).metadata == {
            b"long_name": b"restricted secant inequality",
            b"units": b"1/lr",
            b"formula": b"G.d / ||G||^2".replace(b"G||", b"d||"),
            b"source": b"NWT section 3",
        }
    facts = json.loads(found.metadata[b"geomprobe"])
    assert (facts["status"], facts["num_parameters"]) == ("complete", trace.num_parameters)
    assert facts["manifest"] == trace.manifest
    assert facts["certificate"]["steps_equal"] == 60


def scalars(folder):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = module.EventAccumulator(str(folder), size_guidance={module.SCALARS: 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}, accumulator


def test_tensorboard_reads_each_measured_number_at_its_step(tmp_path, trace):
    pytest.importorskip("tensorboard")
    export(trace, "tensorboard", tmp_path / "logs" / "a")
    found, accumulator = scalars(tmp_path / "logs" / "a")
    with np.errstate(over="ignore"):
        wanted = {
            name: [(i, np.float32(value)) for i, value in enumerate(values) if not np.isnan(value)]
            for name, values in expected(trace).items()
        }
    assert found == {name: values for name, values in wanted.items() if values}
    assert len(found["cosine"]) == 20
    assert "hg_norm" not in found  # it was never measured
    description = accumulator.SummaryMetadata("rsi").summary_description
    assert description == "restricted secant inequality, in 1/lr: `G.d / ||d||^2` (NWT section 3)"


def test_tensorboards_present_reader_takes_it_too(tmp_path, trace):
    module = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    export(trace, "tensorboard", tmp_path / "logs")
    accumulator = module.EventAccumulator(str(tmp_path / "logs"))
    accumulator.Reload()
    assert "cosine" in accumulator.PluginTagToContent("scalars")
    assert len(accumulator.Tensors("cosine")) == 20


def make(form, folder):
    path = folder / f"out.{form}"
    for package in {"parquet": ["pyarrow"], "tensorboard": ["tensorboard"]}.get(form, []):
        pytest.importorskip(package)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_overwritten_without_force(tmp_path, trace, form):
    path = make(form, tmp_path)
    export(trace, form, path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match="--force"):
        export(trace, form, path)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    export(trace, form, path, force=True)


def test_force_replaces_an_earlier_export_and_leaves_others_events_alone(tmp_path, trace):
    path = make("tensorboard", tmp_path)
    path.mkdir()
    (path / "events.out.tfevents.1.desk.1.0").write_bytes(b"")
    with pytest.raises(UsageError, match="holds something already"):
        export(trace, "tensorboard", path)
    for _ in range(2):
        export(trace, "tensorboard", path, force=True)
    assert len(list(path.iterdir())) == 2
    assert len(scalars(path)[0]["cosine"]) == 20


@pytest.mark.parametrize("form", FORMATS)
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, trace, form, monkeypatch):
    path = make(form, tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_cells", full)
    monkeypatch.setattr(export_module, "_events", full)
    if form == "parquet":
        monkeypatch.setattr("pyarrow.parquet.write_table", full)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=rf"cannot write {path}: No space left on device"):
        export(trace, form, path)
    assert {file for file in set(tmp_path.rglob("*")) - before if file != path} == set()
    assert not path.is_file()


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_folder_in_the_way_and_a_missing_folder_are_told(tmp_path, trace, form):
    make(form, tmp_path)
    with pytest.raises(UsageError, match="is a folder; name a file"):
        export(trace, form, tmp_path, force=True)
    with pytest.raises(RunError, match="cannot write"):
        export(trace, form, tmp_path / "nowhere" / "x")


def test_a_file_is_no_log_folder(tmp_path, trace):
    path = make("tensorboard", tmp_path)
    path.touch()
    with pytest.raises(UsageError, match="is a file; name a log folder"):
        export(trace, "tensorboard", path, force=True)


@pytest.mark.parametrize(("form", "package"), [("parquet", "pyarrow"), ("tensorboard", "tensorboard")])
def test_a_missing_package_names_what_to_install(tmp_path, trace, form, package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs {package}: pip install 'geomprobe\[export\]'"):
        export(trace, form, tmp_path / "x")


@pytest.mark.parametrize("form", FORMATS)
def test_a_trace_that_is_still_written_and_one_without_rows_are_exported(tmp_path, form):
    path = make(form, tmp_path)
    with open_part(tmp_path / "part.h5", "trace", 40) as writer:
        assert export(open_trace(tmp_path / "part.h5"), form, path)[0] == "step"
        append(writer, "trace", 40, 3)
        export(open_trace(tmp_path / "part.h5"), form, path, force=True)
    if form == "csv":
        assert [line.partition(",")[0] for line in path.read_text().splitlines()] == [
            "step",
            "40",
            "41",
            "42",
        ]
    if form == "tensorboard":
        assert [step for step, _ in scalars(path)[0]["same"]] == [40, 41, 42]


@pytest.mark.parametrize("form", FORMATS)
def test_long_traces_take_seconds(tmp_path, form):
    """5,000 steps in well under a twentieth of the time that 100,000 may take."""
    path = make(form, tmp_path)
    with open_part(tmp_path / "part.h5", "trace", 0) as writer:
        append(writer, "trace", 0, 5000)
    trace = open_trace(tmp_path / "part.h5")
    start = time.perf_counter()
    export(trace, form, path)
    assert time.perf_counter() - start < 3


def test_an_export_needs_no_torch_and_loads_only_what_its_format_needs(tmp_path, trace):
    code = (
        "import sys\nfrom geomprobe.report.export import export\nfrom geomprobe.trace.reader import open_trace\n"
        f"export(open_trace({str(trace.path)!r}), sys.argv[1], sys.argv[2])\n"
        "print(*({'torch', 'pandas', 'pyarrow', 'tensorboard', 'tensorflow'} & set(sys.modules)))"
    )
    # pyarrow loads pandas by itself where it is installed.
    for form, needed in (
        ("csv", set()),
        ("parquet", {"pyarrow", "pandas"}),
        ("tensorboard", {"tensorboard"}),
    ):
        command = [sys.executable, "-c", code, form, make(form, tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        assert set(done.stdout.split()) <= needed
