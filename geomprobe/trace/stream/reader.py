"""Read a part, live, closed or cut off by a kill: only committed rows, and never a hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace.stream.writer import Table

TIMEOUT_S = 20.0

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from geomprobe.trace.stream.child import serve; serve(sys.argv[2])"
)

Block = dict[str, NDArray[Any]]


class PartNotBegun(RunError):
    """The part was created, but its writer has not got as far as its first row, or was killed before."""


@dataclass(frozen=True)
class Header:
    """What a part says of itself, and how many of its rows are marked as committed."""

    path: Path
    schema: str
    schema_version: int
    first_step: int
    attributes: Mapping[str, str | int | float]
    tables: Mapping[str, Table]
    rows: int

    @property
    def stop_step(self) -> int:
        """The step after the last committed one."""
        return self.first_step + self.rows


@dataclass(frozen=True)
class Part:
    """A part in memory: by table name, its column names and its committed rows [rows, columns]."""

    schema: str
    first_step: int
    attributes: Mapping[str, str | int | float]
    tables: Mapping[str, tuple[tuple[str, ...], NDArray[Any]]]
    rows: int


def part_state(path: Path) -> Literal["new", "streaming", "closed", "foreign"]:
    """How far a part's writer has got, told by the first 12 bytes alone, without HDF5.

    ``"new"``: nothing to read yet. ``"streaming"``: a writer holds it, or was killed. ``"closed"``: it is an
    ordinary, closed HDF5 file. ``"foreign"``: it is no HDF5 file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> path.touch()
    >>> part_state(path)
    'new'
    """
    with open(path, "rb") as file:
        head = file.read(12)
    if not head.strip(b"\0"):
        return "new"
    if len(head) < 12 or not head.startswith(_SIGNATURE):
        return "foreign"
    version, flags = head[8], head[11]
    # Superblock 3 keeps "open for writing" in bit 0 and "by SWMR" in bit 2.
    if version < 3 or not flags & 1:
        return "closed"
    return "streaming" if flags & 4 else "new"


def read_header(path: Path, timeout_s: float = TIMEOUT_S) -> Header:
    """What a part says of itself, without its rows.

    Raises:
        PartNotBegun: its writer has not begun.
        RunError: it is missing, no part, or damaged.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> with PartWriter(path, schema="geomprobe-record", tables=[], attributes={}, first_step=5):
    ...     header = read_header(path)
    >>> header.first_step, header.rows
    (5, 0)
    """
    with stream_part(path, stop=0, timeout_s=timeout_s) as (header, _):
        return header


def read_part(path: Path, timeout_s: float = TIMEOUT_S) -> Part:
    """All committed rows of a part, in memory.

    Args:
        path: the part, which may be being written by a living process.
        timeout_s: how long one block (about 4 MiB) may take.

    Raises:
        PartNotBegun: its writer has not begun.
        RunError: it is missing, no part, or damaged.

    >>> read_part(Path("nowhere.h5"))
    Traceback (most recent call last):
        ...
    geomprobe.errors.RunError: nowhere.h5 does not exist
    """
    with stream_part(path, timeout_s=timeout_s) as (header, blocks):
        whole = list(blocks)
    tables = {}
    for name, table in header.tables.items():
        empty = np.empty((0, len(table.columns)), table.dtype)
        tables[name] = (table.columns, np.concatenate([empty, *(block[name] for block in whole)]))
    rows = sum(len(block["step"]) for block in whole)
    return Part(header.schema, header.first_step, header.attributes, tables, rows)


@contextmanager
def stream_part(
    path: Path,
    *,
    tables: Sequence[str] | None = None,
    start: int = 0,
    stop: int | None = None,
    block_rows: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[tuple[Header, Iterator[Block]]]:
    """A part's header and its committed rows, block by block in bounded memory.

    A row that a power cut or a failing disk has changed ends the blocks before it, and so before ``header.rows``.

    Args:
        path: the part.
        tables: the tables wanted; all of them where None.
        start: first row wanted.
        stop: the row after the last one wanted; what is committed now where None.
        block_rows: rows of a block; as many as make about 4 MiB where None.
        timeout_s: how long the child process may take for a block.

    Yields:
        The header, and an iterator of dicts: ``"step"`` [k] and, by table name, [k, columns].

    Raises:
        PartNotBegun: its writer has not begun.
        RunError: it is missing, no part, or damaged.

    >>> import tempfile
    >>> from geomprobe.trace.stream.writer import PartWriter
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> table = Table("fingerprints/loss", ("loss",), "int64")
    >>> with PartWriter(path, schema="geomprobe-record", tables=[table], attributes={}) as writer:
    ...     writer.append({"fingerprints/loss": np.array([[7], [8], [9]])})
    >>> with stream_part(path, start=1) as (header, blocks):
    ...     [block["fingerprints/loss"].tolist() for block in blocks]
    [[[8], [9]]]
    """
    path = Path(path)
    _refuse_unreadable(path)
    request = {"path": str(path), "tables": tables, "start": start, "stop": stop, "block_rows": block_rows}
    # Isolated, so that no file of the working folder passes for a standard module before the path is set.
    command = [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pipe = _Pipe(process, path, timeout_s)
        try:
            header = _parse(path, pipe.line())
            yield header, _blocks(header, pipe, tables)
        finally:
            process.kill()


def _refuse_unreadable(path: Path) -> None:
    try:
        state = part_state(path)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    if state == "new":
        raise PartNotBegun(f"{path} holds nothing yet: its writer has just started, or was killed as it did")
    if state == "foreign":
        raise RunError(f"{path} is no HDF5 file, so it is no part of a run")


def _parse(path: Path, line: bytes) -> Header:
    fields = json.loads(line)
    layout = fields.pop("tables")
    tables = {name: Table(name, tuple(table["columns"]), table["dtype"]) for name, table in layout.items()}
    return Header(path=path, tables=tables, **fields)


def _blocks(header: Header, pipe: _Pipe, names: Sequence[str] | None) -> Iterator[Block]:
    tables = [table for name, table in header.tables.items() if names is None or name in names]
    while count := int(pipe.numbers(1, "int64")[0]):
        block: Block = {"step": pipe.numbers(count, "int64")}
        for table in tables:
            width = len(table.columns)
            block[table.name] = pipe.numbers(count * width, table.dtype).reshape(count, width)
        yield block


class _Pipe:
    """The child's standard output, where each read either delivers or raises in bounded time."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, timeout_s: float) -> None:
        self._process = process
        self._path = path
        self._timeout_s = timeout_s

    def line(self) -> bytes:
        return self._read(lambda stream: stream.readline(), lambda data: data.endswith(b"\n"))

    def numbers(self, count: int, dtype: str) -> NDArray[Any]:
        size = 8 * count
        data = self._read(lambda stream: stream.read(size), lambda data: len(data) == size)
        return np.frombuffer(data, dtype)

    def _read(self, read: Any, whole: Any) -> bytes:
        late = threading.Event()
        watch = threading.Timer(self._timeout_s, self._stop, [late])
        watch.start()
        try:
            data: bytes = read(self._process.stdout)
        finally:
            watch.cancel()
        if not whole(data):
            raise self._failure(late.is_set())
        return data

    def _stop(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _failure(self, late: bool) -> RunError:
        advice = "Its rows cannot be recovered; run the pass again"
        if late:
            return RunError(
                f"reading {self._path} did not end within {self._timeout_s:g} s: it is damaged. {advice}"
            )
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        code = self._process.wait()
        cause = said[-1] if said else signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return RunError(f"{self._path} cannot be read as a part of a run ({cause}). {advice}")
