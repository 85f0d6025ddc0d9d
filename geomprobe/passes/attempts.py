"""The rows of a pass over several attempts: what was committed before is compared, and only the rest is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import RunError
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.trace.atomic_file import atomic_file
from geomprobe.trace.locate import require_readable_part
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import SCHEMAS, VALUES, Kind
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
    """The parts with rows of an earlier attempt, by first step; the caller has the lock of the run, or of that range.

    Parts that begin in the range and never got a row are removed, and damaged ones are cut before the damage.
    """
    begun(run, kind)  # parts of another version are refused, not taken for empty ones
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
    """The parts that have rows, by first step, as they are: others may be writing them.

    Raises:
        RunError: one is of another version of the format.
    """
    headers = [header for path in run.parts(kind) if (header := _header(path)) is not None]
    for header in headers:
        require_readable_part(header, SCHEMAS[kind])
    found = [header for header in headers if header.rows]
    return sorted(found, key=lambda header: header.first_step)


def contiguous_end(run: RunFolder, kind: Kind, parts: Sequence[Header], first: int = 0) -> int:
    """How far the rows reach from a step on without a gap, each part proven to continue the one before it.

    It is proven where its process had started earlier than that one ends, since it then went over the same steps again,
    or where the other's process compared the state in which it ended.
    """
    reached = first
    for part in parts:
        if part.first_step > reached or part.stop_step <= reached:
            continue
        if kind == "trace" and part.first_step == reached > first:
            started = int(part.attributes.get(STARTED, part.first_step))
            if started >= reached and not run.proof(kind, reached).exists():
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
    """Takes a pass's rows in the order of their steps; ``attributes`` are those of each part.

    Raises:
        RunError: an earlier part has other columns.
    """

    def __init__(
        self,
        run: RunFolder,
        kind: Kind,
        tables: Sequence[Table],
        attributes: Mapping[str, str | int | float],
        point: ResumePoint | None = None,
    ) -> None:
        point = point or ResumePoint({})
        started, earlier = point.step, point.earlier
        self._first = point.first
        self._run, self._kind, self._tables = run, kind, tables
        self._attributes = {**attributes, STARTED: started}
        self._writer: PartWriter | None = None
        self._next = started
        for part in earlier:
            if part.tables != {table.name: table for table in tables}:
                raise RunError(
                    f"{part.path} holds other columns than this pass would write: it was started with other options. "
                    "Give the same ones, or start over with --force."
                )
        self._earlier = [_rows(part, started) for part in earlier if part.stop_step > started]
        end_readers()
        if self._known(started) is None and started >= self._first:
            self._writer = self._part(started)

    def append(self, blocks: Tables) -> None:
        """Compare or write the rows of the next steps: by table, an array [k, columns].

        Raises:
            RunError: a row differs from the one that an earlier attempt committed for the same step.
            WriteFailed: the disk refused; rows appended before are safe.
        """
        first, count = self._next, len(next(iter(blocks.values())))
        step = first
        while step < first + count:
            known = self._known(step)
            starts = (self._first, *(rows.first for rows in self._earlier))
            ends = [known.stop] if known is not None else [start for start in starts if start > step]
            stop = min([first + count, *ends])
            piece = {name: block[step - first : stop - first] for name, block in blocks.items()}
            if known is not None:
                self._compare(step, piece, known)
            elif step >= self._first:  # what comes before is another segment's
                self._write(step, piece)
            step = stop
        self._next = step

    def close(self) -> None:
        """Close the part; safe to call twice."""
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
        """The rows of an earlier attempt with this step, if there are any."""
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
                    "given to attach? Nothing was changed; --force starts over."
                )


class GroupCommit:
    """Commits rows once every process has compared their steps with its own recording.

    Args:
        log: where rank 0 commits them; None on the others, which only publish how far they have come.
        ranks: the processes of the run.
        first: the first step.
        marked: rows that differ come too, marked in their last column.
    """

    def __init__(self, log: AttemptLog | None, ranks: Ranks, first: int, marked: bool = False) -> None:
        self._log, self._ranks, self._marked = log, ranks, marked
        self._compared = first
        self._waiting: list[tuple[int, Tables]] = []  # with the step after each block
        self._differs = False

    def append(self, blocks: Tables, equal: int) -> None:
        """Take the next rows, of which ``equal`` are equal here, and commit those that all have compared."""
        count = len(blocks[VALUES])
        if equal < count and not self._differs:
            self._differs = True
            self._ranks.publish("differs", self._compared + equal)
        self._compared += count
        if self._log is None:
            self._ranks.publish("compared", self._compared)
            return
        self._waiting.append((self._compared, blocks))
        others = self._ranks.published("compared").values()  # rank 0, which has the log, publishes none
        all_have = len(others) == self._ranks.size - 1
        self._commit(min(others, default=math.inf) if all_have else 0)

    def commit_all(self) -> None:
        """Every process has compared everything."""
        self._commit(math.inf)

    def close(self) -> None:
        """Close the part; rows that not all have compared are not written."""
        if self._log is not None:
            self._log.close()

    def _commit(self, until: float) -> None:
        while self._log is not None and self._waiting and self._waiting[0][0] <= until:
            stop, blocks = self._waiting.pop(0)
            if self._marked:
                values = blocks[VALUES]
                first_different = min(self._ranks.published("differs").values(), default=math.inf)
                if first_different < stop:
                    values[max(0, int(first_different) - (stop - len(values))) :, -1] = 0.0
            self._log.append(blocks)


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
    found: dict[str, Any] = json.loads(str(parts[0].attributes.get("manifest", "{}")))
    return found
