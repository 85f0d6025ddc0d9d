"""Columns are grouped by their table, in the order in which they are named."""

from __future__ import annotations

from geomprobe.reproducibility.columns import Columns, by_table, column_names

FETCHED = Columns("fetched", "batch", ("fetched",), "int64", on_device=False)
LOSS = Columns("loss digest", "loss", ("loss",), "int64", on_device=True)
INPUTS = Columns("inputs", "batch", ("inputs", "more"), "int64", on_device=True)


def test_tables_and_columns_keep_the_order_in_which_they_are_named():
    assert by_table([FETCHED, LOSS, INPUTS]) == {"batch": [FETCHED, INPUTS], "loss": [LOSS]}
    assert column_names([INPUTS, LOSS, FETCHED]) == {
        "batch": ("inputs", "more", "fetched"),
        "loss": ("loss",),
    }
