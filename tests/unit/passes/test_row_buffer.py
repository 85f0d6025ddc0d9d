"""Rows come out in blocks of 64, or a second old, in order, once, and never by half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from geomprobe.passes import row_buffer as rows
from geomprobe.passes.row_buffer import CAPACITY, INTERVAL, Block, RowBuffer
from geomprobe.reproducibility.columns import Columns

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    standing = Clock()
    monkeypatch.setattr(rows, "time", standing)
    return standing


COLUMNS = [
    Columns("values", "floats", ("a", "b"), "float64", on_device=True),
    Columns("digests", "integers", ("c",), "int64", on_device=True),
    Columns("numbers", "host floats", ("d",), "float64", on_device=False),
    Columns("counts", "host integers", ("e", "f"), "int64", on_device=False),
]


def collector(columns: Sequence[Columns] = COLUMNS) -> tuple[RowBuffer, list[Block]]:
    blocks: list[Block] = []
    return RowBuffer(CPU, columns, blocks.append), blocks


def row(step: int) -> dict[str, Any]:
    return {
        "values": torch.tensor([step, -step], dtype=torch.float64),
        "digests": torch.tensor([2**62 + step]),
        "numbers": [step / 2],
        "counts": [2**63 - 1 - step, -(2**63) + step],
    }


def append(collecting: RowBuffer, step: int) -> None:
    collecting.append(row(step))


def steps(block: Block) -> list[int]:
    return [int(values[0]) for values in block["floats"]]


def test_a_block_comes_when_it_is_full(clock: Clock) -> None:
    collecting, blocks = collector()
    for step in range(2 * CAPACITY + 5):
        append(collecting, step)
        assert len(blocks) == (step + 1) // CAPACITY
    assert [len(block["floats"]) for block in blocks] == [CAPACITY] * 2
    collecting.flush()
    assert CAPACITY == 64
    assert [step for block in blocks for step in steps(block)] == list(range(2 * CAPACITY + 5))


def test_every_value_comes_out_as_it_went_in(clock: Clock) -> None:
    collecting, blocks = collector()
    for step in range(3):
        append(collecting, step)
    collecting.flush()
    (block,) = blocks
    np.testing.assert_array_equal(block["floats"], [[0, 0], [1, -1], [2, -2]])
    np.testing.assert_array_equal(block["integers"], [[2**62], [2**62 + 1], [2**62 + 2]])
    np.testing.assert_array_equal(block["host floats"], [[0], [0.5], [1]])
    np.testing.assert_array_equal(block["host integers"], [[2**63 - 1 - s, -(2**63) + s] for s in range(3)])
    assert [array.dtype.name for array in block.values()] == ["float64", "int64", "float64", "int64"]


def test_a_tables_columns_have_the_order_in_which_they_are_named_wherever_they_are(clock: Clock) -> None:
    collecting, blocks = collector([each._replace(table=each.dtype) for each in reversed(COLUMNS)])
    assert [(table.name, table.columns) for table in collecting.tables] == [
        ("int64", ("e", "f", "c")),
        ("float64", ("d", "a", "b")),
    ]
    append(collecting, 3)
    collecting.flush()
    np.testing.assert_array_equal(blocks[0]["float64"], [[1.5, 3, -3]])
    np.testing.assert_array_equal(blocks[0]["int64"], [[2**63 - 4, -(2**63) + 3, 2**62 + 3]])


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two columns of a row have one name"):
        collector([COLUMNS[0], COLUMNS[0]._replace(table="another")])


def test_a_block_comes_with_the_first_row_after_a_second(clock: Clock) -> None:
    collecting, blocks = collector()
    append(collecting, 0)
    clock.now += INTERVAL
    append(collecting, 1)
    assert blocks == []
    clock.now += 0.001
    append(collecting, 2)
    assert [steps(block) for block in blocks] == [[0, 1, 2]]
    append(collecting, 3)  # the second starts anew
    assert len(blocks) == 1
    assert INTERVAL == 1.0


def test_flushing_hands_over_once_and_nothing_where_there_is_nothing(clock: Clock) -> None:
    collecting, blocks = collector()
    collecting.flush()
    assert blocks == []
    append(collecting, 0)
    collecting.flush()
    collecting.flush()
    assert [steps(block) for block in blocks] == [[0]]
    append(collecting, 1)
    collecting.flush()
    assert [steps(block) for block in blocks] == [[0], [1]]


def test_a_delivered_block_is_not_written_over_by_later_rows(clock: Clock) -> None:
    collecting, blocks = collector()
    for step in range(CAPACITY):
        append(collecting, step)
    for step in range(1000, 1000 + CAPACITY):
        append(collecting, step)
    assert steps(blocks[0]) == list(range(CAPACITY))


def test_a_row_is_taken_when_it_is_appended(clock: Clock) -> None:
    collecting, blocks = collector()
    first = row(1)
    collecting.append(first)
    first["values"].zero_()
    first["digests"].zero_()
    collecting.flush()
    assert (blocks[0]["floats"].tolist(), blocks[0]["integers"].tolist()) == ([[1, -1]], [[2**62 + 1]])


def test_tables_without_columns_keep_their_number_of_rows(clock: Clock) -> None:
    collecting, blocks = collector([each._replace(columns=()) for each in COLUMNS])
    for _ in range(3):
        collecting.append({"values": torch.empty(0), "digests": torch.empty(0), "numbers": [], "counts": []})
    collecting.flush()
    assert [array.shape for array in blocks[0].values()] == [(3, 0)] * 4


def test_after_an_append_that_was_cut_off_nothing_more_comes(clock: Clock) -> None:
    collecting, blocks = collector()
    append(collecting, 0)
    with pytest.raises(RuntimeError):
        collecting.append(row(1) | {"values": torch.zeros(3, dtype=torch.float64)})
    collecting.flush()
    assert blocks == []


def test_a_block_that_could_not_be_delivered_is_not_delivered_again(clock: Clock) -> None:
    calls: list[Block] = []

    def refuse(block: Block) -> None:
        calls.append(block)
        raise OSError("no space left")

    collecting = RowBuffer(CPU, COLUMNS, refuse)
    for step in range(CAPACITY - 1):
        append(collecting, step)
    with pytest.raises(OSError, match="no space left"):
        append(collecting, CAPACITY - 1)
    collecting.flush()
    assert len(calls) == 1
