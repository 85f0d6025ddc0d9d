"""How two runs differ: manifests, fingerprints step by step, references' weights, and trace columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, Reference, open_record
from geomprobe.trace.schema import COMPONENTS

T = TypeVar("T")

BLOCK = 4096
"""Steps whose fingerprints are in memory at a time."""

INFORMATIVE = "host"
"""The part of the manifest that says where a run was made, not how: it makes no two runs different."""


@dataclass(frozen=True)
class ColumnDifference:
    """How far two traces are apart in one column, over the rows that both have.

    ``rows`` counts those that differ (NaN against NaN does not); the largest differences are over rows where
    both hold numbers; ``row`` is that of the largest absolute one, or the first that differs.
    """

    name: str
    rows: int
    largest: float
    largest_relative: float
    row: int


@dataclass
class RunDifference:
    """What two runs differ in.

    Attributes:
        paths: the two runs.
        manifest: entry, and its value in either run (None where it has none).
        first: the first step whose fingerprints differ, the component and the tensor; None where all are equal.
        steps: steps recorded by either run; None where the records were not compared.
        steps_equal: steps before the first difference.
        references: of each reference in both, the tensors that differ.
        columns: the trace columns that differ.
        columns_compared: how many columns the two traces share; None where there are no two traces.
        notes: what could not be compared, and why.
    """

    paths: tuple[str, str]
    manifest: list[tuple[str, Any, Any]] = field(default_factory=list)
    first: tuple[int, str, str] | None = None
    steps: tuple[int, int] | None = None
    steps_equal: int = 0
    references: dict[str, list[str]] = field(default_factory=dict)
    columns: list[ColumnDifference] = field(default_factory=list)
    columns_compared: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs, the host apart."""
        counted = [name for name, _, _ in self.manifest if name.partition(".")[0] != INFORMATIVE]
        return not (counted or self.first or any(self.references.values()) or self.columns)


def diff(a: Path, b: Path) -> RunDifference:
    """Compare two runs: their records where both have one, and their traces.

    Raises:
        RunError: the two have neither both a record nor both a trace that can be read.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter, Table
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> table = Table("values", ("steps/loss",), "float64")
    >>> with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as part:
    ...     part.append({"values": np.array([[0.5], [0.25]])})
    >>> diff(path, path).equal
    True
    """
    result = RunDifference((str(a), str(b)))
    with ExitStack() as stack:
        records = _open_both(open_record, (a, b), result.notes)
        traces = _open_both(open_trace, (a, b), result.notes)
        for record in records or ():
            stack.enter_context(record)
        if not records and not traces:
            raise RunError("; ".join(result.notes))
        manifests = [each.manifest for each in records or traces or ()]
        result.manifest = list(_manifest_differences(*manifests))
        if records:
            _compare_records(*records, result)
        if traces:
            _compare_traces(*traces, result)
    return result


def _open_both(
    open_one: Callable[[Path], T], paths: tuple[Path, Path], notes: list[str]
) -> tuple[T, T] | None:
    try:
        return open_one(paths[0]), open_one(paths[1])
    except RunError as error:
        notes.append(str(error))
        return None


def _manifest_differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    flat_a, flat_b = dict(_flat(a, "")), dict(_flat(b, ""))
    for name in dict.fromkeys([*flat_a, *flat_b]):
        if flat_a.get(name) != flat_b.get(name):
            yield name, flat_a.get(name), flat_b.get(name)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Entries by dotted name; a list of plain values is one entry."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        yield name, value
        return
    for key, item in items:
        yield from _flat(item, f"{name}.{key}" if name else key)


def _compare_records(a: Record, b: Record, result: RunDifference) -> None:
    result.steps = a.num_steps, b.num_steps
    result.first = first_difference(a, b)
    result.steps_equal = min(result.steps) if result.first is None else result.first[0]
    for name in a.references:
        if name in b.references:
            result.references[name] = _unlike(a.reference(name), b.reference(name))


def first_difference(a: Record, b: Record) -> tuple[int, str, str] | None:
    """The first step whose fingerprints differ, the component to blame and its tensor; None where none does.

    Within a step, the components come in the order in which one explains the next. Reads `BLOCK` steps of
    both at a time, and nothing behind the first difference.
    """
    shared = min(a.num_steps, b.num_steps)
    for start in range(0, shared, BLOCK):
        stop = min(start + BLOCK, shared)
        found = [_first_in_block(a, b, component, start, stop) for component in COMPONENTS]
        differences = [each for each in found if each is not None]
        if differences:
            return min(differences, key=lambda each: each[0])
    return (
        None
        if a.num_steps == b.num_steps
        else (shared, "length", f"{a.num_steps} against {b.num_steps} steps")
    )


def _first_in_block(
    a: Record, b: Record, component: str, start: int, stop: int
) -> tuple[int, str, str] | None:
    names = a.names(component)
    if names != b.names(component):
        only = set(names) ^ set(b.names(component))
        return start, component, f"covers other tensors: {_few(sorted(only) or names)}"
    unlike = a.fingerprints(component, start, stop) != b.fingerprints(component, start, stop)
    rows = np.flatnonzero(unlike.any(axis=1))
    if not len(rows):
        return None
    return start + int(rows[0]), component, _few([names[i] for i in np.flatnonzero(unlike[rows[0]])])


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _unlike(a: Reference, b: Reference) -> list[str]:
    """Tensors of a reference that are not bitwise the same, or that only one run has."""
    return [
        name
        for name in dict.fromkeys([*a, *b])
        if name not in a
        or name not in b
        or a[name][1] != b[name][1]
        or not _same_bits(a[name][0], b[name][0])
    ]


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _compare_traces(a: Trace, b: Trace, result: RunDifference) -> None:
    shared = [name for name in a.columns if name in b.columns]
    result.columns_compared = len(shared)
    rows = min(a.num_steps, b.num_steps)
    if a.num_steps != b.num_steps:
        result.notes.append(
            f"the traces have {a.num_steps} and {b.num_steps} rows; the first {rows} were compared"
        )
    found = [_compare_column(name, a[name][:rows], b[name][:rows]) for name in shared]
    result.columns = [each for each in found if each is not None]


def _compare_column(name: str, a: NDArray[np.float64], b: NDArray[np.float64]) -> ColumnDifference | None:
    unlike = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not unlike.any():
        return None
    with np.errstate(all="ignore"):
        gap = np.abs(a - b)
        relative = gap / np.maximum(np.abs(a), np.abs(b))
    gap, relative = (np.where(unlike & np.isfinite(each), each, 0.0) for each in (gap, relative))
    row = int(np.argmax(gap)) if gap.any() else int(np.argmax(unlike))
    return ColumnDifference(name, int(unlike.sum()), float(gap.max()), float(relative.max()), row)
