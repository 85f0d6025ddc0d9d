"""inspect's summary: every state that a run can be in, told rightly."""

import json

import h5py
import numpy as np
import pytest
from support.sealed_runs import certificate, tamper, train, write_record, write_run, write_trace

from geomprobe.errors import RunError
from geomprobe.report.summary.summary import summarize
from geomprobe.report.summary.text import next_command, render
from geomprobe.trace.stream.writer import PartWriter, Table


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


def line(summary, start):
    return next(text.strip() for text in render(summary).splitlines() if text.strip().startswith(start))


def test_a_complete_run_shows_its_certificate_and_leads_to_verify(tmp_path, history):
    summary = summarize(write_run(tmp_path / "a", history))
    assert line(summary, "record") == "record       complete, 60 steps, 3 epochs"
    assert line(summary, "certificate") == "certificate  60 of 60 steps equal, w_T bitwise equal"
    assert line(summary, "optimizer") == "optimizer    SGD lr 0.05"
    assert line(summary, "script") == "script       train.py --lr 0.05"
    assert line(summary, "measured") == "measured     each step"
    assert next_command(summary) == f"geomprobe verify {tmp_path / 'a'}"


def test_a_recording_alone_leads_to_replay(tmp_path, history):
    summary = summarize(write_run(tmp_path / "a", history, trace=False))
    assert "was recorded, but not replayed yet" in line(summary, "trace")
    assert "certificate" not in render(summary)
    assert line(summary, "loss ").split()[-1] == "0"
    assert next_command(summary) == f"geomprobe replay {tmp_path / 'a'}"


def test_a_failed_recording_says_so_and_leads_to_another(tmp_path, history):
    run = write_run(tmp_path / "a", history, trace=False)
    write_record(run / "record.h5", history, status="failed")
    summary = summarize(run)
    assert line(summary, "record") == "record       failed, 60 steps, 3 epochs"
    assert "references" not in render(summary)
    assert next_command(summary).startswith("geomprobe record")


def test_a_diverged_run_names_its_first_difference(tmp_path, history):
    first = {"step": 30, "component": "rng", "tensor": "torch"}
    said = certificate(60, equal=30, weights_equal=False, first=first)
    summary = summarize(write_run(tmp_path / "a", history, status="diverged", rows=30, cert=said))
    assert line(summary, "certificate") == "certificate  DIVERGED"
    assert "30 of 60 steps equal, w_T NOT equal" in render(summary)
    assert "first difference: step 30, rng, torch" in render(summary)
    assert next_command(summary).endswith("--force --uncertified")


def test_an_uncertified_run_says_so_loudly(tmp_path, history):
    said = certificate(60, equal=30, weights_equal=False)
    run = write_run(tmp_path / "a", history, status="uncertified", cert=said, same=np.arange(60) < 30)
    assert line(summarize(run), "certificate").startswith("certificate  UNCERTIFIED")


def parts(run, history, rows, kind):
    """What a kill leaves: a streaming part, never sealed."""
    (run / "stream").mkdir(parents=True)
    said = {"manifest": json.dumps(history.manifest), "num_parameters": history.weights.shape[1]}
    tables = {
        "record": [
            Table("steps", ("epoch", "loss", "lr"), "float64"),
            Table("fingerprints/loss", ("loss",), "int64"),
        ],
        "trace": [Table("values", ("steps/epoch", "steps/loss", "groups/0/lr"), "float64")],
    }[kind]
    steps = np.stack([np.arange(rows) // 20, history.loss[:rows], history.lr[:rows]], 1).astype(float)
    prints = history.loss[:rows, None].view(np.int64)
    block = {"record": {"steps": steps, "fingerprints/loss": prints}, "trace": {"values": steps}}[kind]
    path = run / "stream" / f"{kind}-00000000.h5"
    with PartWriter(path, schema=f"geomprobe-{kind}", tables=tables, attributes=said) as part:
        part.append(block)
    return path


def test_a_recording_that_was_cut_off_shows_the_rows_it_committed(tmp_path, history):
    parts(tmp_path / "a", history, 25, "record")
    summary = summarize(tmp_path / "a")
    assert line(summary, "record") == "record       incomplete, 25 steps, 2 epochs"
    assert summary["files"].keys() == {"stream/record-00000000.h5"}
    assert next_command(summary).startswith("geomprobe record")


def test_a_replay_that_was_cut_off_has_no_certificate(tmp_path, history):
    run = write_run(tmp_path / "a", history, trace=False)
    parts(run, history, 25, "trace")
    summary = summarize(run)
    assert line(summary, "trace") == "trace        incomplete, 25 steps, 2 epochs"
    assert line(summary, "certificate") == "certificate  none: the replay has not finished"
    assert next_command(summary) == f"geomprobe replay {run} --resume"


@pytest.mark.parametrize("kind", ["record", "trace"])
def test_a_single_file_sealed_or_streaming_is_shown_as_what_it_is(tmp_path, history, kind):
    run = write_run(tmp_path / "a", history)
    other = {"record": "trace", "trace": "record"}[kind]
    streaming = parts(tmp_path / "b", history, 25, kind)
    for path in (run / f"{kind}.h5", streaming):
        summary = summarize(path)
        assert summary[other] is None
        assert summary[kind]["num_steps"] in (25, 60)
        assert summary["files"].keys() == {path.name}
    assert next_command(summarize(run / f"{kind}.h5")).endswith(f" {run}")


def test_columns_are_summed_up_with_their_units_and_gaps(tmp_path, history):
    path = write_trace(tmp_path / "trace.h5", history, every=4)
    summary = summarize(path)
    rsi = next(column for column in summary["trace"]["columns"] if column["name"] == "rsi")
    with h5py.File(path) as file:
        values = file["steps/rsi"][...]
    assert rsi["units"] == "1/lr"
    assert rsi["missing"] == 45
    assert rsi["measured"] == 15
    assert rsi["first"] == values[0]
    assert rsi["last"] is None
    assert (rsi["minimum"], rsi["maximum"]) == (np.nanmin(values), np.nanmax(values))
    assert rsi["mean"] == pytest.approx(np.nanmean(values))
    assert line(summary, "measured") == "measured     each 4th step"
    assert line(summary, "not measured:").endswith("relative_residual, flow_drift")


def test_the_json_has_no_nan_even_where_the_run_was_not_finite(tmp_path, history):
    path = write_trace(tmp_path / "trace.h5", history)
    tamper(path, "steps/loss", lambda x: np.inf, row=-1)
    summary = json.loads(json.dumps(summarize(path), allow_nan=False))
    loss = next(column for column in summary["trace"]["columns"] if column["name"] == "loss")
    assert loss["last"] is None
    assert loss["maximum"] == history.loss[:-1].max()


def test_a_manifest_that_says_little_is_no_obstacle(tmp_path, history):
    path = write_trace(tmp_path / "trace.h5", history)
    with h5py.File(path, "r+") as file:
        file.attrs["manifest"] = "{}"
    assert "script" not in render(summarize(path))


def test_a_damaged_trace_does_not_hide_the_recording(tmp_path, history):
    run = write_run(tmp_path / "a", history)
    (run / "trace.h5").write_bytes(b"not HDF5 at all")
    summary = summarize(run)
    assert summary["record"]["status"] == "complete"
    assert "is no HDF5 file" in line(summary, "trace")


@pytest.mark.parametrize("make", ["nothing", "folder", "text"])
def test_what_is_no_run_is_refused(tmp_path, make):
    path = tmp_path / "x"
    if make == "folder":
        path.mkdir()
    if make == "text":
        path.write_text("hello")
    with pytest.raises(RunError, match="x"):
        summarize(path)


def test_checkpoints_count_as_one_entry(tmp_path, history):
    run = write_run(tmp_path / "a", history)
    for step in (0, 10):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:08d}" / "state").write_bytes(b"x" * 50)
    assert summarize(run)["files"]["checkpoints/"] == 100
