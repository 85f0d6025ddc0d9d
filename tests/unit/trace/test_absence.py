"""Each reason has a number of its own, and says what it hides."""

from __future__ import annotations

import numpy as np

from geomprobe.trace.absence import ABSENCES, EPOCH, RATE, WRITTEN, steps_of


def test_numbers_are_distinct_powers_of_two() -> None:
    assert [absence.number for absence in ABSENCES] == [2**i for i in range(len(ABSENCES))]


def test_steps_of_each_reason() -> None:
    column = np.array([0.0, np.nan, float(WRITTEN.number + RATE.number), float(RATE.number)])
    assert {absence: rows.tolist() for absence, rows in steps_of(column).items()} == {WRITTEN: [2], RATE: [2, 3]}


def test_columns_that_are_made_of_what_is_hidden_are_hidden() -> None:
    assert WRITTEN.hides_column("steps/hg_norm")
    assert WRITTEN.hides_column("parameters/0.weight/g.Hg")
    assert RATE.hides_column("relative_residual")
    assert not EPOCH.hides_column("loss")
    assert str(EPOCH).startswith("no epoch: ")
