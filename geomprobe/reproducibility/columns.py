"""The columns of a step's row: each is named once, and knows its table, its type, and where its values are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple


class Columns(NamedTuple):
    """Values that a step gives under one name.

    Attributes:
        name: of the values in a row.
        table: that the columns stand in; a table's columns have the order in which they are listed.
        columns: their names in the table.
        dtype: of each.
        on_device: whether a row holds them as a 1-D tensor on the training's device, or as a list of Python's numbers.

    >>> Columns("loss", "steps", ("loss",), "float64", on_device=True).columns
    ('loss',)
    """

    name: str
    table: str
    columns: tuple[str, ...]
    dtype: Literal["float64", "int64"]
    on_device: bool


Row = Mapping[str, Any]  # name of columns -> their values of one step, a tensor or a list


def by_table(columns: Sequence[Columns]) -> dict[str, list[Columns]]:
    """The columns of each table, in order.

    >>> fetched = Columns("fetched", "batch", ("fetched",), "int64", on_device=False)
    >>> list(by_table([fetched, fetched._replace(name="inputs", columns=("inputs",), on_device=True)]))
    ['batch']
    """
    found: dict[str, list[Columns]] = defaultdict(list)
    for each in columns:
        found[each.table].append(each)
    return dict(found)


def column_names(columns: Sequence[Columns]) -> dict[str, tuple[str, ...]]:
    """The names of the columns of each table, in order."""
    return {table: tuple(name for each in group for name in each.columns) for table, group in by_table(columns).items()}
