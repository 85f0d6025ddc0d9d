"""Find what a path holds, a sealed file or the parts of a pass, and refuse everything else by what it is."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.path_folders import path_folders
from geomprobe.trace.stream.reader import Header, begun_parts, checked, part_state, read_header, stream_part
from geomprobe.trace.stream.writer import Table

T = TypeVar("T")


class NothingThere(RunError):
    """A run has no pass of the kind that was asked for, not even a damaged one."""


@dataclass(frozen=True)
class Source:
    """Where a pass's rows are: in one sealed `file`, or still in `parts`; `path` is what was asked for."""

    path: Path
    status: str
    num_parameters: int
    manifest: dict[str, Any]
    file: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # what `geomprobe.trace.validation` found in the file
    parts: tuple[Header, ...] = ()


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop`` (excluded) of a part."""

    part: Header
    start: int
    stop: int

    @property
    def first_step(self) -> int:
        """The step of row ``start``."""
        return self.part.first_step + self.start

    @property
    def stop_step(self) -> int:
        """The step after the last row's."""
        return self.part.first_step + self.stop


def find(path: Path, kind: str) -> Source:
    """What a run folder or a file holds of one kind, sealed or streaming.

    Args:
        path: a run folder, a sealed file or a part.
        kind: ``"geomprobe-trace"`` or ``"geomprobe-record"``.

    Raises:
        RunError: there is nothing of that kind; the message says what there is instead.
    """
    if not path.exists():
        raise NothingThere(f"{path} {'is a link that leads to nothing' if path.is_symlink() else 'does not exist'}")
    if not path.is_dir():
        return _of_file(path, Path(os.path.realpath(path)) if path.is_symlink() else path, kind)
    sealed = path / schema.FILES[kind]
    if os.path.lexists(sealed):
        return _of_file(path, sealed, kind)
    files = sorted((path / schema.STREAM_DIR).glob("[!.]*.h5"))
    headers = begun_parts(file for file in files if not file.name.startswith(schema.REFERENCE_PREFIX))
    wanted = tuple(header for header in headers if header.schema == kind)
    if wanted:
        return _of_parts(path, wanted, kind)
    raise _nothing(path, kind, headers)


def kind_of(path: Path) -> str | None:
    """The schema that a file names, such as ``"geomprobe-record"``; None where it is none of geomprobe's."""
    for kind in schema.FILES:
        with contextlib.suppress(RunError):
            find(path, kind)
            return kind
    return None


def read_settled(path: Path, kind: str, read: Callable[[Source], T]) -> T:
    """`read` what `find` finds; once more if the pass sealed its parts in between."""
    sealed = path / schema.FILES[kind]
    was_sealed = sealed.exists()
    try:
        return read(find(path, kind))
    except RunError:
        if was_sealed or not sealed.exists():
            raise
        return read(find(path, kind))


def spans(parts: Sequence[Header]) -> list[Span]:
    """The rows of parts in the order of steps, each step once: where two hold a step, the earlier part has it.

    >>> first = Header(Path("a"), "geomprobe-trace", 1, 0, {}, {}, rows=10)
    >>> resumed = Header(Path("b"), "geomprobe-trace", 1, 8, {}, {}, rows=10)
    >>> [(span.part.path.name, span.first_step, span.stop - span.start) for span in spans([first, resumed])]
    [('a', 0, 10), ('b', 10, 8)]
    """
    found = []
    step = 0
    for part in sorted(parts, key=lambda part: part.first_step):
        step = max(step, part.first_step)
        if step < part.stop_step:
            found.append(Span(part, step - part.first_step, part.rows))
            step = part.stop_step
    return found


def read_rows(
    found: Sequence[Span], table: Table, start: int = 0, stop: int | None = None
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Steps [rows] and a table [rows, columns] of parts, of the steps from ``start`` to before ``stop``."""
    steps, values = [np.empty(0, np.int64)], [np.empty((0, len(table.columns)), table.dtype)]
    for span in found:
        first = max(start - span.part.first_step, span.start)
        last = span.stop if stop is None else min(stop - span.part.first_step, span.stop)
        if first < last:
            with stream_part(span.part.path, tables=[table.name], start=first, stop=last) as (_, blocks):
                for block in blocks:
                    steps.append(block["step"])
                    values.append(block[table.name])
    return np.concatenate(steps), np.concatenate(values)


def _of_file(path: Path, file: Path, kind: str) -> Source:
    state = part_state(file)
    if state == "foreign":
        raise RunError(f"{file} is no HDF5 file; name a run folder, or a file that geomprobe wrote")
    if state == "closed":
        found = checked(file, "sealed")
        _check(file, kind, found)
        if not found["part"]:
            return Source(path, found["status"], found["num_parameters"], found["manifest"], file, found)
    return _of_parts(path, (read_header(file),), kind)


def _of_parts(path: Path, parts: tuple[Header, ...], kind: str) -> Source:
    for part in parts:
        require_readable_part(part, kind)
        if part.tables != parts[0].tables:
            raise RunError(f"{parts[0].path} and {part.path} hold different columns; they are of two passes")
    attributes = parts[0].attributes
    manifest = json.loads(str(attributes.get("manifest", "{}")))
    return Source(path, "incomplete", int(attributes.get("num_parameters", 0)), manifest, parts=parts)


def require_readable_part(part: Header, kind: str) -> None:
    """Refuse a part of another kind or version.

    Raises:
        RunError: with what it is, and what to do.
    """
    _check(part.path, kind, {"schema": part.schema, "schema_version": part.schema_version})


def _check(path: Path, kind: str, attributes: Mapping[str, Any]) -> None:
    found, version = attributes.get("schema"), attributes.get("schema_version")
    if found not in schema.FILES:
        raise RunError(f"{path} is an HDF5 file, but geomprobe did not make it; name a run folder")
    if found != kind:
        raise NothingThere(f"{path} holds {found}, not {kind}; name the run folder or its {schema.FILES[kind]}")
    readable = schema.VERSIONS[kind]
    if kind == schema.RECORD_SCHEMA and isinstance(version, int) and version < readable:
        raise RunError(
            f"{path} is a record of schema version {version}, which has no digests of gradients, and this geomprobe "
            f"reads version {readable}. Record the run again: geomprobe record --force"
        )
    if version != readable:
        raise RunError(
            f"{path} is of schema version {version}, and this geomprobe reads version {readable}. "
            "Open it with the geomprobe that wrote it, or make it again"
        )


def _nothing(path: Path, kind: str, headers: list[Header]) -> NothingThere:
    if folders := path_folders(path):
        named = ", ".join(map(str, folders.values()))
        return NothingThere(f"{path} holds the paths of {len(folders)} optimizers, each a run by itself: {named}")
    if kind == schema.TRACE_SCHEMA and (path / schema.RECORD_FILE).exists():
        return NothingThere(f"{path} was recorded, but not replayed yet. Run: geomprobe replay {path}")
    if kind == schema.TRACE_SCHEMA and headers:
        return NothingThere(
            f"{path} is still being recorded, or was cut off; it has no trace yet. Record it to the end"
        )
    if (path / schema.STREAM_DIR).is_dir():
        return NothingThere(f"{path} holds no rows yet: its first pass has only begun, or was cut off as it did")
    return NothingThere(f"{path} is no run of geomprobe. Make one: geomprobe record -o {path} train.py")
