"""How two runs differ: manifests, fingerprints step by step, references' weights, and trace columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.report.table import number, table
from geomprobe.trace.blame import Difference, likely
from geomprobe.trace.blame import first_difference as blame
from geomprobe.trace.locate import NothingThere
from geomprobe.trace.printable import printable
from geomprobe.trace.reader import Trace, open_trace
from geomprobe.trace.record import Record, Reference, open_record
from geomprobe.trace.schema import COMPONENTS

T = TypeVar("T")

BLOCK = 4096
"""Steps whose fingerprints are in memory at a time."""

INFORMATIVE = "host"
"""The part of the manifest that says where a run was made, not how: it makes no two runs different."""

_OTHERS = "covers other tensors"

_WIDTH = 40
"""Characters of a manifest's value that are shown."""


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
        first: the first step whose fingerprints differ, and what is to blame there; None where all are equal.
        likely: why, as far as what was equal before it can tell.
        steps: steps recorded by either run; None where the records were not compared.
        steps_equal: steps before the first difference.
        references: of each reference in both, the tensors that differ.
        columns: the trace columns that differ.
        columns_compared: how many columns the two traces share; None where there are no two traces.
        notes: what could not be compared, and why.
    """

    paths: tuple[str, str]
    manifest: list[tuple[str, Any, Any]] = field(default_factory=list)
    first: tuple[int, Difference] | None = None
    likely: str = ""
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


def _open_both(open_one: Callable[[Path], T], paths: tuple[Path, Path], notes: list[str]) -> tuple[T, T] | None:
    try:
        return open_one(paths[0]), open_one(paths[1])
    except NothingThere as nothing:
        notes.append(str(nothing))
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
    if result.first is not None and not result.first[1].tensor.startswith(_OTHERS):
        result.likely = likely(*result.first, a.state_steps.shared(b.state_steps))
    for name in a.references:
        if name in b.references:
            result.references[name] = _unlike(a.reference(name), b.reference(name))


def first_difference(a: Record, b: Record) -> tuple[int, Difference] | None:
    """The first step whose fingerprints differ, and what is to blame there; None where none does.

    Reads `BLOCK` steps of both at a time, and nothing behind the first difference.
    """
    names = {component: a.names(component) for component in COMPONENTS}
    for component in COMPONENTS:
        if names[component] != b.names(component):
            only = sorted({*names[component]} ^ {*b.names(component)}) or names[component]
            return 0, Difference(component, f"{_OTHERS}: {only[0]}", more=len(only) - 1)
    shared, state = min(a.num_steps, b.num_steps), a.state_steps.shared(b.state_steps)
    for start in range(0, shared, BLOCK):
        rows = start, min(start + BLOCK, shared)
        blocks = [{name: run.fingerprints(name, *rows) for name in COMPONENTS} for run in (a, b)]
        if a.state_steps != b.state_steps:
            for block in blocks:
                block["optimizer"][[not state.taken(step) for step in range(*rows)]] = 0
        unlike = [(blocks[0][name] != blocks[1][name]).any(axis=1) for name in COMPONENTS]
        different = np.flatnonzero(np.logical_or.reduce(unlike))
        if len(different):
            row = int(different[0])
            found = blame(names, *({name: block[name][row] for name in COMPONENTS} for block in blocks))
            assert found is not None
            return start + row, found
    if a.num_steps == b.num_steps:
        return None
    return shared, Difference("length", f"{a.num_steps} against {b.num_steps} steps")


def _unlike(a: Reference, b: Reference) -> list[str]:
    """Tensors of a reference that are not bitwise the same, or that only one run has."""
    return [
        name
        for name in dict.fromkeys([*a, *b])
        if name not in a or name not in b or a[name][1] != b[name][1] or not _same_bits(a[name][0], b[name][0])
    ]


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _compare_traces(a: Trace, b: Trace, result: RunDifference) -> None:
    shared = [name for name in a.columns if name in b.columns]
    result.columns_compared = len(shared)
    rows = min(a.num_steps, b.num_steps)
    if a.num_steps != b.num_steps:
        result.notes.append(f"the traces have {a.num_steps} and {b.num_steps} rows; the first {rows} were compared")
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


def render(result: RunDifference) -> str:
    """The differences by kind, and the verdict in the last line."""
    blocks = [
        f"{result.paths[0]} against {result.paths[1]}",
        _manifest_text(result),
        _record_text(result),
        _columns_text(result),
        "\n".join(f"note: {note}" for note in result.notes),
        f"the runs {'are equal' if result.equal else 'differ'}",
    ]
    return "\n\n".join(block for block in blocks if block)


def _manifest_text(result: RunDifference) -> str:
    if not result.manifest:
        return "manifest: equal"
    rows = [[name, _value_text(a), _value_text(b)] for name, a, b in result.manifest]
    informative = any(name.partition(".")[0] == INFORMATIVE for name, _, _ in result.manifest)
    note = f"\n  ({INFORMATIVE} says where a run was made, and makes no two runs different)" if informative else ""
    head = f"manifest: {len(rows)} {'entry differs' if len(rows) == 1 else 'entries differ'}"
    return f"{head}\n{table(['  entry', *result.paths], [[f'  {r[0]}', *r[1:]] for r in rows])}{note}"


def _value_text(value: Any) -> str:
    text = "-" if value is None else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _record_text(result: RunDifference) -> str:
    if result.steps is None:
        return ""
    if result.first is None:
        lines = [f"fingerprints: {result.steps_equal} of {result.steps_equal} steps equal"]
    else:
        step, found = result.first
        more = f" and {found.more} more" if found.more else ""
        lines = [
            f"fingerprints: first difference at step {step}: {found.component}, {printable(found.tensor)}{more} "
            f"({result.steps_equal} of {max(result.steps)} steps equal before it)",
            *([f"  Likely, {printable(result.likely)}."] if result.likely else []),
        ]
    for name, unlike in result.references.items():
        weights = "w_T" if name == "final" else f"reference {printable(name)}"
        state = f"differs in {len(unlike)} tensors, first {printable(unlike[0])}" if unlike else "bitwise equal"
        lines.append(f"{weights}: {state}")
    return "\n".join(lines)


def _columns_text(result: RunDifference) -> str:
    if result.columns_compared is None:
        return ""
    if not result.columns:
        return f"trace: {result.columns_compared} columns equal"
    header = ["  column", "rows", "max difference", "relative", "at row"]
    rows = [
        [f"  {c.name}", str(c.rows), number(c.largest, 3), number(c.largest_relative, 3), str(c.row)]
        for c in result.columns
    ]
    head = f"trace: {len(rows)} of {result.columns_compared} columns differ"
    return f"{head}\n{table(header, rows, right=range(1, 5))}"
