"""Read a part, live, closed or cut off by a kill, and check a sealed file: only committed rows, and never a hang."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace import schema
from geomprobe.trace.regular_file import open_regular
from geomprobe.trace.stream.writer import Table

TIMEOUT_S = 20.0
WORK_S = 10.0
"""Processor time that an answer about a small file may take: a damaged file may keep HDF5 busy for ever."""
_BYTES_A_SECOND = 1 << 22

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from geomprobe.trace.stream.child import serve; serve(int(sys.argv[2]))"
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
    """How far a part's writer has got, from the first 12 bytes alone, without HDF5.

    ``"new"``: nothing to read yet. ``"streaming"``: a writer holds it, or was killed. ``"closed"``: it is an
    ordinary, closed HDF5 file. ``"foreign"``: it is no HDF5 file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "part.h5"
    >>> path.touch()
    >>> part_state(path)
    'new'
    """
    with os.fdopen(open_regular(path), "rb") as file:
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


def checked(path: Path, what: Literal["sealed", "reference"]) -> dict[str, Any]:
    """What a file that is no part says of itself, once all of it was found good; see `geomprobe.trace.validation`.

    Raises:
        RunError: it is not what a pass writes.
        FileNotFoundError: it is not there.
    """
    os.close(open_regular(path))
    columns = [column.name for column in (*schema.STEP_COLUMNS, *schema.OPTIONAL_STEP_COLUMNS)]
    request = {"as": what, "columns": columns, "timeout_s": TIMEOUT_S, **_file(path)}
    child, facts = _ask(request, path)
    child.receive()
    child.release()
    return facts


def read_header(path: Path, timeout_s: float = TIMEOUT_S) -> Header:
    """What a part says of itself, without its rows.

    Raises:
        PartNotBegun: its writer has not begun.
        RunError: it is missing, no part, or damaged.
    """
    with stream_part(path, stop=0, timeout_s=timeout_s) as (header, blocks):
        list(blocks)  # there are none, and the child, at the end of its answer, serves the next read
    return header


def begun_parts(paths: Iterable[Path], timeout_s: float = TIMEOUT_S) -> list[Header]:
    """The headers of those parts whose writers have begun.

    Raises:
        RunError: one is missing, no part, or damaged.
    """
    headers = []
    for path in paths:
        with contextlib.suppress(PartNotBegun):
            headers.append(read_header(path, timeout_s))
    return headers


def read_part(path: Path, timeout_s: float = TIMEOUT_S) -> Part:
    """All committed rows of a part, in memory.

    Args:
        path: the part, which may be being written by a living process.
        timeout_s: how long one block (about 4 MiB) may take.

    Raises:
        PartNotBegun: its writer has not begun.
        RunError: it is missing, no part, or damaged.
    """
    with stream_part(path, timeout_s=timeout_s) as (header, blocks):
        whole = list(blocks)
    tables = {}
    for name, table in header.tables.items():
        empty = np.empty((0, len(table.columns)), table.dtype)
        tables[name] = (table.columns, np.concatenate([empty, *(block[name] for block in whole)]))
    rows = sum(len(block["step"]) for block in whole)
    return Part(header.schema, header.first_step, header.attributes, tables, rows)


@contextlib.contextmanager
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
    >>> table = Table("values", ("steps/loss",), "float64")
    >>> with PartWriter(path, schema="geomprobe-trace", tables=[table], attributes={}) as writer:
    ...     writer.append({"values": np.array([[7.0], [8.0], [9.0]])})
    >>> with stream_part(path, start=1) as (header, blocks):
    ...     [block["values"].tolist() for block in blocks]
    [[[8.0], [9.0]]]
    """
    path = Path(path)
    _refuse_unreadable(path)
    wanted = {"tables": tables, "start": start, "stop": stop, "block_rows": block_rows}
    request = {"as": "part", **wanted, "timeout_s": timeout_s, **_file(path)}
    child, fields = _ask(request, path)
    try:
        layout = fields.pop("tables")
        kinds = {name: Table(name, tuple(table["columns"]), table["dtype"]) for name, table in layout.items()}
        header = Header(path=path, tables=kinds, **fields)
        if header.schema == schema.TRACE_SCHEMA and schema.VALUES in kinds:
            _require_raw(path, kinds[schema.VALUES].columns)
        yield header, _blocks(header, child, tables)
    finally:
        child.release()


def _require_raw(path: Path, columns: Iterable[str]) -> None:
    try:
        for column in columns:
            schema.check_raw(column)
    except schema.UnknownColumn as error:
        raise RunError(f"{path} is damaged: {error}") from error


def _file(path: Path) -> dict[str, Any]:
    """Of a request: the file, which the child may know by its whole path only, its name, and the processor's time.

    The larger a file, the more names and blocks there may be in it.
    """
    work_s = WORK_S + path.stat().st_size / _BYTES_A_SECOND
    return {"path": os.path.abspath(path), "name": str(path), "work_s": work_s}


def end_readers() -> None:
    """End the child processes that wait for the next read; one that comes later starts another.

    At exit this is done anyway. A pass does it before its script goes on, which may wait for children of its own.
    """
    while _idle:
        _idle.pop().end()


def _refuse_unreadable(path: Path) -> None:
    try:
        state = part_state(path)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    if state == "new":
        raise PartNotBegun(f"{path} holds nothing yet: its writer has just started, or was killed as it did")
    if state == "foreign":
        raise RunError(f"{path} is no HDF5 file, so it is no part of a run")


def _ask(request: Mapping[str, Any], path: Path) -> tuple[_Child, dict[str, Any]]:
    """The child that answers a request, and what the file says of itself, with which every answer begins."""
    while True:
        try:
            child, used = _idle.pop(), True
        except IndexError:
            child, used = _Child(), False
        try:
            child.ask(request)
            facts: dict[str, Any] = child.receive()
        except BaseException as error:
            child.release()
            if not (used and isinstance(error, _Died)):
                raise
            continue  # it was killed, or harmed by an earlier file, since its last answer: ask a new one
        return child, facts


def _blocks(header: Header, child: _Child, names: Sequence[str] | None) -> Iterator[Block]:
    tables = [table for name, table in header.tables.items() if names is None or name in names]
    stored = ["step", *(table.name for table in tables if table.columns)]
    while (arrays := child.receive()) is not None:
        block = dict(zip(stored, arrays, strict=True))
        empty = {t.name: np.empty((len(block["step"]), 0), t.dtype) for t in tables if not t.columns}
        yield block | empty


class _Died(RunError):
    """The child ended without an answer."""


class _Child:
    """A process that reads parts, one at a time. Each answer comes in bounded time, or an error does.

    It belongs to the thread that took it from ``_idle`` until `release`. A process that is forked from this one closes
    its copy of the connection, so that the child sees the end of it as soon as this process is gone.
    """

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        # Isolated, so that no file of the working folder passes for a standard module before the path is set.
        command = [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
        self._request: Mapping[str, Any] = {}
        self._done = False
        _living.append(self)

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send a request; `receive` gives the answers."""
        self._request, self._done = request, False
        with contextlib.suppress(OSError):  # it is dead, and the missing answer will show that
            self._connection.send(request)

    def receive(self) -> Any:
        """The next answer: see `geomprobe.trace.stream.child`."""
        path, limit = self._request["name"], self._request["timeout_s"]
        if not self._connection.poll(limit):
            raise RunError(f"reading {path} did not end within {limit:g} s: it is damaged. {self._advice}")
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            words = self._unreadable(self._last_words())
            over = self._process.wait() in (-signal.SIGPROF, -signal.SIGALRM)  # its time: another would take as long
            raise (RunError if over else _Died)(words) from None
        if isinstance(answer, tuple):
            why, ends = answer
            self._done = not ends
            raise RunError(self._unreadable(why))
        self._done = answer is None
        return answer

    def release(self) -> None:
        """Keep it for the next request; one that was left in the middle of an answer is ended."""
        if self._done:
            _idle.append(self)
        else:
            self.end()

    def end(self) -> None:
        """End it, and wait until it is gone; safe to call twice."""
        if self in _living:
            _living.remove(self)
            self._process.kill()
            self._process.wait()
            self.close()

    def close(self) -> None:
        """Close this process's ends."""
        self._connection.close()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def disown(self) -> None:
        """In a forked process: leave the child to the parent, whose it is."""
        self.close()
        self._process.returncode = 0  # so that nobody waits for it here, or warns that it still runs

    @property
    def _advice(self) -> str:
        part = self._request["as"] == "part"
        return (
            "Its rows cannot be recovered; run the pass again" if part else "Restore it from a copy, or make it again"
        )

    def _unreadable(self, cause: str) -> str:
        names = {"part": "a part of a run", "sealed": "a sealed pass", "reference": "a reference"}
        return f"{self._request['name']} cannot be read as {names[self._request['as']]} ({cause}). {self._advice}"

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        code = self._process.wait()
        return lines[-1] if lines else signal.Signals(-code).name if code < 0 else f"exit code {code}"


_living: list[_Child] = []
_idle: list[_Child] = []  # waiting for the next request; append and pop are atomic, so threads may share it


def _disown_all() -> None:
    _idle.clear()
    while _living:
        _living.pop().disown()


atexit.register(end_readers)
os.register_at_fork(after_in_child=_disown_all)
