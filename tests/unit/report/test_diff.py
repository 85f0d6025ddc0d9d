"""diff finds the first difference there is, and nothing in equal runs."""

import copy
import json

import h5py
import numpy as np
import pytest
from support.sealed_runs import tamper, train, write_record, write_run, write_trace

from geomprobe.errors import RunError
from geomprobe.report import diff as module
from geomprobe.report.diff import diff, render


@pytest.fixture(scope="module")
def history():
    return train(steps=60)


@pytest.fixture
def runs(tmp_path, history):
    return write_run(tmp_path / "a", history), write_run(tmp_path / "b", history)


def first(result):
    """Step, component and tensor of the first difference."""
    step, found = result.first
    return step, found.component, found.tensor


def change_print(run, component, step, column=0):
    with h5py.File(run / "record.h5", "r+") as file:
        file[f"fingerprints/{component}"][step, column] ^= 1


def test_a_run_is_equal_to_its_copy(runs):
    result = diff(*runs)
    assert result.equal
    text = render(result)
    assert "fingerprints: 60 of 60 steps equal\nw_T: bitwise equal" in text
    assert text.endswith("the runs are equal")


@pytest.mark.parametrize("block", [4096, 7])
def test_the_first_difference_is_found_in_blocks_of_any_size(runs, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    change_print(runs[1], "weights", 40, column=2)
    change_print(runs[1], "loss", 41)
    result = diff(*runs)
    assert first(result) == (40, "weights", "2.weight")
    assert (result.steps_equal, result.equal) == (40, False)


def test_within_a_step_the_component_that_explains_the_others_is_named(runs):
    change_print(runs[1], "loss", 13)
    change_print(runs[1], "weights", 13)
    change_print(runs[1], "rng", 13)
    assert first(diff(*runs)) == (13, "rng", "torch")


def test_only_one_block_of_fingerprints_is_read_at_a_time_and_none_behind_the_difference(runs, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 10)
    asked = []
    real = module.Record.fingerprints
    monkeypatch.setattr(
        module.Record, "fingerprints", lambda self, *rows: (asked.append(rows[1:]), real(self, *rows))[1]
    )
    change_print(runs[1], "weights", 25)
    diff(*runs)
    assert set(asked) == {(0, 10), (10, 20), (20, 30)}


def test_a_run_that_is_longer_differs_in_length(tmp_path, history, runs):
    longer = write_run(tmp_path / "c", train(steps=61))
    result = diff(runs[0], longer)
    assert first(result) == (60, "length", "60 against 61 steps")
    assert "the traces have 60 and 61 rows" in render(result)


def test_components_that_cover_other_tensors_differ_from_the_first_step(runs):
    with h5py.File(runs[1] / "record.h5", "r+") as file:
        file["fingerprints/rng_names"][1] = "cuda:0"
    result = diff(*runs)
    assert first(result) == (0, "rng", "covers other tensors: cuda:0")
    assert "at step 0: rng, covers other tensors: cuda:0 and 1 more (" in render(result)
    assert "Likely" not in render(result)


def test_the_likely_reason_is_said_as_in_a_replay(runs):
    change_print(runs[1], "gradient", 13)
    result = diff(*runs)
    assert first(result) == (13, "gradient", "0.weight")
    assert "steps equal before it)\n  Likely, all that the gradient is made of was equal, so" in render(result)


def test_the_state_of_an_optimizer_is_compared_where_both_records_have_it(runs):
    for run, rule in zip(runs, ({"first": 4, "every": 6}, {"first": 2, "every": 4}), strict=True):
        with h5py.File(run / "record.h5", "r+") as file:
            file.attrs["manifest"] = json.dumps(json.loads(file.attrs["manifest"]) | {"optimizer_state_steps": rule})
            for name in ("optimizer", "optimizer_names"):
                del file[f"fingerprints/{name}"]
            taken = [step < rule["first"] or step % rule["every"] == 0 for step in range(60)]
            file["fingerprints/optimizer"] = np.where(taken, 5, 0)[:, None].astype(np.int64)
            file.create_dataset("fingerprints/optimizer_names", data=np.array([b"0.weight"], "S8"))
    assert diff(*runs).first is None
    change_print(runs[1], "optimizer", 20)
    assert diff(*runs).first is None
    change_print(runs[1], "optimizer", 24)
    assert first(diff(*runs)) == (24, "optimizer", "0.weight")
    assert "after step 12, when it was last compared" in diff(*runs).likely


def test_manifest_entries_are_shown_with_both_values(tmp_path, history, runs):
    manifest = copy.deepcopy(history.manifest)
    manifest["optimizer"]["groups"][0]["lr"] = 0.1
    manifest["flags"]["extra"] = [1, 2]
    write_record(runs[1] / "record.h5", history, manifest=manifest)
    result = diff(*runs)
    assert result.manifest == [("optimizer.groups.0.lr", 0.05, 0.1), ("flags.extra", None, [1, 2])]
    assert not result.equal
    assert "manifest: 2 entries differ" in render(result)


def test_another_host_is_shown_but_makes_no_two_runs_different(history, runs):
    write_record(runs[1] / "record.h5", history, manifest={**history.manifest, "host": {"name": "laptop"}})
    result = diff(*runs)
    assert result.manifest == [("host.name", "desk", "laptop")]
    assert result.equal
    assert "makes no two runs different" in render(result)


def test_final_weights_that_differ_are_named_though_every_fingerprint_agrees(runs):
    with h5py.File(runs[1] / "record.h5", "r+") as file:
        file["references/final/2.bias"][0] = np.nextafter(file["references/final/2.bias"][0], np.float32(9))
    result = diff(*runs)
    assert (result.first, result.references) == (None, {"final": ["2.bias"]})
    assert "w_T: differs in 1 tensors, first 2.bias" in render(result)
    assert not result.equal


def test_trace_columns_are_compared_by_their_largest_differences(runs):
    tamper(runs[1] / "trace.h5", "steps/loss", lambda x: x + 0.25, row=slice(10, 12))
    tamper(runs[1] / "trace.h5", "steps/clr", lambda x: np.nan, row=5)
    columns = {column.name: column for column in diff(*runs).columns}
    assert columns.keys() == {"loss", "clr"}
    assert (columns["loss"].rows, columns["clr"].rows, columns["clr"].row) == (2, 1, 5)
    assert columns["loss"].largest == pytest.approx(0.25)
    assert columns["loss"].row in (10, 11)
    assert 0 < columns["loss"].largest_relative < 1


def test_a_run_without_a_trace_is_compared_by_its_record_and_that_is_noted(tmp_path, history, runs):
    bare = write_run(tmp_path / "c", history, trace=False)
    result = diff(runs[0], bare)
    assert result.equal
    assert result.columns_compared is None
    assert "not replayed yet" in render(result)


def test_two_trace_files_are_compared_without_records(tmp_path, history):
    paths = [write_trace(tmp_path / f"{name}.h5", history) for name in "ab"]
    result = diff(*paths)
    assert result.equal
    assert result.steps is None


def test_two_runs_with_nothing_in_common_are_refused(tmp_path, history):
    run = write_run(tmp_path / "a", history)
    with pytest.raises(RunError, match="nowhere does not exist"):
        diff(run, tmp_path / "nowhere")
