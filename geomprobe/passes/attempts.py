"""The rows of a pass over several attempts: what was committed before is compared, and only the rest is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.trace.atomic_file import atomic_file
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import SCHEMAS, Kind
from geomprobe.trace.stream.reader import (
    Header,
    PartNotBegun,
    end_readers,
    read_header,
    read_part,
    stream_part,
)
from geomprobe.trace.stream.writer import PartWriter, Table

STARTED = "started"  # attribute of a part: the step from which its process ran, at or before its first row

Tables = Mapping[str, NDArray[Any]]


def committed(run: RunFolder, kind: Kind, first: int = 0, stop: int | None = None) -> list[Header]:
    """The parts with rows of an earlier attempt, by first step; the caller holds the run, or that range of it.

    Parts that begin in the range and never got a row are removed, and damaged ones are cut before the damage.

    Args:
        run: the run.
        kind: which pass.
        first: the first step of the range that the caller holds.
        stop: the step after it; None for the end.
    """
    found = []
    for path in run.parts(kind):
        begins = int(path.stem.rpartition("-")[2])
        own = begins >= first and (stop is None or begins < stop)
        header = _mended(path) if own else _header(path)
        if header is not None and header.rows:
            found.append(header)
        elif own:
            path.unlink()
    return sorted(found, key=lambda header: header.first_step)


def begun(run: RunFolder, kind: Kind) -> list[Header]:
    """The parts that have rows, by first step, as they are: others may be writing them."""
    found = [header for path in run.parts(kind) if (header := _header(path)) is not None and header.rows]
    return sorted(found, key=lambda header: header.first_step)


def contiguous_end(run: RunFolder, kind: Kind, parts: Sequence[Header], first: int = 0) -> int:
    """How far the rows reach from a step on without a gap, and without a seam that nobody has proven.

    A part is continuous with the one before it where its process had started earlier than that one ends, since it then
    went over the same steps again, or where the other's process compared the state in which it ended.
    """
    reached = first
    for part in parts:
        if part.first_step > reached or part.stop_step <= reached:
            continue
        seam = kind == "trace" and part.first_step == reached and reached > first
        if (
            seam
            and int(part.attributes.get(STARTED, part.first_step)) >= reached
            and not run.proof(kind, reached).exists()
        ):
            break
        reached = part.stop_step
    return reached


@dataclass(frozen=True)
class _Rows:
    """Committed rows in memory, from step ``first`` on."""

    path: Path
    first: int
    tables: Tables

    @property
    def stop(self) -> int:
        return self.first + len(next(iter(self.tables.values())))


class AttemptLog:
    """Takes a pass's rows in the order of their steps.

    Args:
        run: the run.
        kind: which pass.
        tables: the tables of its parts.
        attributes: what each part says of the run.
        resumption: where this process goes on, and over which parts of earlier attempts.

    Raises:
        RunError: an earlier part holds other columns.
    """

    def __init__(
        self,
        run: RunFolder,
        kind: Kind,
        tables: Sequence[Table],
        attributes: Mapping[str, str | int | float],
        resumption: ResumePoint | None = None,
    ) -> None:
        going_on = ResumePoint({}) if resumption is None else resumption
        started, earlier = going_on.step, going_on.earlier
        self._first = going_on.first
        self._run, self._kind, self._tables = run, kind, tables
        self._attributes = {**attributes, STARTED: started}
        self._writer: PartWriter | None = None
        self._next = started
        for part in earlier:
            if part.tables != {table.name: table for table in tables}:
                raise RunError(
                    f"{part.path} holds other columns than this pass would write: it was begun with other options. "
                    "Give the same ones, or begin anew with --force."
                )
        self._earlier = [_rows(part, started) for part in earlier if part.stop_step > started]
        end_readers()
        if self._known(started) is None and started >= self._first:
            self._writer = self._part(started)

    def append(self, blocks: Tables) -> None:
        """Compare or write the rows of the next steps.

        Args:
            blocks: by table, an array [k, columns].

        Raises:
            RunError: a row differs from the one that an earlier attempt committed for the same step.
            WriteFailed: the disk refused; rows appended before are safe.
        """
        first, count = self._next, len(next(iter(blocks.values())))
        step = first
        while step < first + count:
            known = self._known(step)
            ahead = [
                start for start in (self._first, *(rows.first for rows in self._earlier)) if start > step
            ]
            stop = min([first + count, *([known.stop] if known is not None else ahead)])
            piece = {name: block[step - first : stop - first] for name, block in blocks.items()}
            if known is not None:
                self._compare(step, piece, known)
            elif step >= self._first:  # what comes before is another segment's
                self._write(step, piece)
            step = stop
        self._next = step

    def close(self) -> None:
        """Let go of the part; safe to call twice."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, piece: Tables) -> None:
        writer = self._writer
        if writer is None or writer.next_step != step:
            self.close()
            self._writer = writer = self._part(step)
        writer.append(piece)

    def _part(self, step: int) -> PartWriter:
        return PartWriter(
            self._run.part(self._kind, step),
            schema=SCHEMAS[self._kind],
            tables=self._tables,
            attributes=self._attributes,
            first_step=step,
        )

    def _known(self, step: int) -> _Rows | None:
        """The rows of an earlier attempt that hold a step."""
        return next((rows for rows in self._earlier if rows.first <= step < rows.stop), None)

    def _compare(self, step: int, piece: Tables, known: _Rows) -> None:
        for table in self._tables:
            if not table.columns:
                continue
            now = np.ascontiguousarray(piece[table.name])
            then = known.tables[table.name][step - known.first :][: len(now)]
            different = now.view(np.int64) != np.ascontiguousarray(then).view(np.int64)
            if different.any():
                row, column = (int(found[0]) for found in np.nonzero(different))
                raise RunError(
                    f"{known.path} holds step {step + row} already, as an earlier attempt saw it, and now its "
                    f"{table.name} ({table.columns[column]}) is another: this is not the run that was cut off. "
                    "Does the script keep state of its own, such as a counter or a random generator, that was not "
                    "given to attach? Nothing was changed; --force begins anew."
                )


def _rows(part: Header, first: int) -> _Rows:
    start = max(0, first - part.first_step)
    with stream_part(part.path, start=start, stop=part.rows) as (_, blocks):
        whole = list(blocks)
    names = [name for name, table in part.tables.items() if table.columns]
    tables = {name: np.concatenate([block[name] for block in whole]) for name in names}
    return _Rows(part.path, part.first_step + start, tables)


def _header(path: Path) -> Header | None:
    try:
        return read_header(path)
    except PartNotBegun:
        return None


def _mended(path: Path) -> Header | None:
    """The header of a part, which is cut before its first damaged row, if it has one."""
    try:
        with stream_part(path) as (header, blocks):
            whole = sum(len(block["step"]) for block in blocks)
    except PartNotBegun:
        return None
    if whole == header.rows:
        return header
    part = read_part(path)
    tables = [Table(name, columns, header.tables[name].dtype) for name, (columns, _) in part.tables.items()]
    own = {"schema": part.schema, "attributes": part.attributes, "first_step": part.first_step}
    with atomic_file(path) as aside:
        aside.unlink(missing_ok=True)  # a kill may have left one
        with PartWriter(aside, tables=tables, **own) as writer:  # type: ignore[arg-type]
            writer.append({name: rows for name, (_, rows) in part.tables.items()})
    return read_header(path)


def manifest_of(parts: Sequence[Header]) -> dict[str, Any]:
    """The manifest that the first of several parts carries."""
    found: dict[str, Any] = json.loads(str(parts[0].attributes["manifest"]))
    return found
