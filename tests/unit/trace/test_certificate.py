"""A certificate is read as it was written, and holds only for a whole replay that equals its recording."""

import dataclasses

import pytest
from support.part_cases import write_part

from geomprobe.errors import RunError
from geomprobe.trace.certificate import Certificate, FirstDifference
from geomprobe.trace.reader import open_trace
from geomprobe.trace.seal import seal_trace

WHOLE = Certificate(60, 60, 60, True, ("rng", "weights"), steps_attempted=62)
FIRST = FirstDifference(30, "rng", "step/torch", rank=1)


@pytest.mark.parametrize("certificate", [WHOLE, dataclasses.replace(WHOLE, first_difference=FIRST), Certificate()])
def test_a_certificate_is_read_as_it_was_written(tmp_path, certificate):
    part = write_part(tmp_path / "part.h5")
    facts = {"status": "diverged", "num_parameters": 1, "manifest": {}, "certificate": certificate.as_json()}
    seal_trace([part], tmp_path / "trace.h5", **facts)
    entries = open_trace(tmp_path).certificate
    assert entries == certificate.as_json()
    assert Certificate.of(entries) == certificate


def test_a_file_without_one_has_no_entries_and_they_prove_nothing(tmp_path):
    part = write_part(tmp_path / "part.h5")
    seal_trace([part], tmp_path / "trace.h5", status="incomplete", num_parameters=1, manifest={})
    assert open_trace(tmp_path).certificate == {}
    assert Certificate.of({}).why_not(rows=0) != ""


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"steps_equal": -1}, "certificate.steps_equal is damaged: it is -1"),
        ({"steps_equal": True}, "steps_equal is damaged"),
        ({"components": "rng"}, "components is damaged"),
        ({"first_difference": {"step": 1}}, "names no place"),
        ({"first_difference": {"step": 1, "component": "rng", "tensor": "x", "more": 1}}, "names no place"),
    ],
)
def test_entries_that_no_replay_writes_are_refused(entries, words):
    with pytest.raises(RunError, match=words):
        Certificate.of(entries)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"steps_equal": 59}, "59 of 60 steps equal, 60 rows"),
        ({"steps_compared": 59}, "60 of 60 steps equal, 60 rows"),
        ({"steps_recorded": 61}, "60 of 61 steps equal, 60 rows"),
        ({"final_weights_equal": False}, "w_T is not bitwise equal"),
        ({"first_difference": FIRST}, "first difference: step 30, rng, step/torch"),
    ],
)
def test_it_says_why_it_does_not_hold(change, why):
    assert dataclasses.replace(WHOLE, **change).why_not(rows=60) == why
