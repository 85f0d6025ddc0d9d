"""A certificate is read as it was written, and holds only for a whole replay that equals its recording."""

import dataclasses

import h5py
import pytest

from geomprobe.trace.certificate import Certificate, FirstDifference

WHOLE = Certificate(60, 60, 60, True, ("rng", "weights"), steps_attempted=62)
FIRST = FirstDifference(30, "rng", "step/torch", rank=1)


@pytest.mark.parametrize("certificate", [WHOLE, dataclasses.replace(WHOLE, first_difference=FIRST), Certificate()])
def test_a_certificate_is_read_as_it_was_written(tmp_path, certificate):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        certificate.write(file)
    with h5py.File(tmp_path / "t.h5") as file:
        entries = Certificate.read(file)
    assert entries == certificate.as_json()
    assert Certificate.of(entries) == certificate


def test_a_file_without_one_has_no_entries_and_they_prove_nothing(tmp_path):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        assert Certificate.read(file) == {}
    assert Certificate.of({}).why_not(rows=0) != ""


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
