"""Follow the parts of a pass while they grow, come and go: each look reads only what is new."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from geomprobe.errors import RunError
from geomprobe.trace.run_lock import present
from geomprobe.trace.schema import TABLES, Kind
from geomprobe.trace.stream.reader import Block, Header, PartNotBegun, stream_part

# Within this time a file may be written twice and still look the same to stat.
_SETTLED_S = 1.0

_Stamp = tuple[int, int]


class Reader(Protocol):
    """What `Following` hands rows to."""

    def take(self, header: Header, block: Block) -> None:
        """Rows that were not there before: ``block["step"]`` [k] and the pass's float table [k, columns]."""

    def forget(self) -> None:
        """What was taken so far no longer holds; all that does comes again."""


class _Rewritten(Exception):
    """A part is gone, or is another one than it was."""


@dataclass
class _Known:
    """How far a part was read."""

    header: Header
    last: bytes
    stamp: _Stamp
    settled: bool


class Following:
    """Reads the growing parts of a pass, each row once, and only of the parts that have grown.

    Parts may grow several at a time, be cut off, vanish, and be replaced by others under the same name. Their
    writers are not disturbed, and need not be alive.

    Args:
        stream: the run's folder of parts.
        kind: which pass.

    Attributes:
        problems: by part, why it cannot be read; it is not tried again before it has changed.
    """

    def __init__(self, stream: Path, kind: Kind) -> None:
        self.problems: dict[Path, str] = {}
        self._stream, self._kind = stream, kind
        self._known: dict[Path, _Known] = {}
        self._failed: dict[Path, _Stamp] = {}

    def look(self, reader: Reader) -> list[Header]:
        """Hand over what is new, and give the parts that have begun, each with the rows that were read of it."""
        for _ in range(2):  # a part that is rewritten the second time, too, is for the next look
            try:
                self._read_all(reader)
                break
            except _Rewritten:
                self._known.clear()
                reader.forget()
        return [known.header for known in self._known.values()]

    def _read_all(self, reader: Reader) -> None:
        stamps = {path: stamp for path in parts(self._stream, self._kind) if (stamp := _stamp(path)) is not None}
        if self._known.keys() - stamps.keys():
            raise _Rewritten
        self._failed = {path: stamp for path, stamp in self._failed.items() if stamps.get(path) == stamp}
        self.problems = {path: self.problems[path] for path in self._failed}
        # The one that was written last comes last, so that the last row taken is the newest.
        for path, stamp in sorted(stamps.items(), key=lambda item: (item[1][1], item[0])):
            known = self._known.get(path)
            seen = known is not None and known.settled and known.stamp == stamp
            if not seen and path not in self._failed:
                self._read(path, stamp, reader)

    def _read(self, path: Path, stamp: _Stamp, reader: Reader) -> None:
        looked = time.time()
        known = self._known.get(path)
        # The last row that was read is read again: if it has changed, the part is another one.
        start = max(0, known.header.rows - 1) if known is not None else 0
        table = TABLES[self._kind]
        try:
            with stream_part(path, tables=[table], start=start) as (header, blocks):
                if known is None or not known.header.rows:
                    known = _Known(dataclasses.replace(header, rows=0), b"", stamp, False)
                for block in blocks:
                    self._take(path, known, header, block, reader)
                if known.header.rows > header.rows:
                    raise _Rewritten
            known.stamp, known.settled = stamp, looked - stamp[1] / 1e9 > _SETTLED_S
            self._known[path] = known
        except PartNotBegun:
            if known is not None:
                raise _Rewritten from None
        except RunError as error:
            if _stamp(path) is None:
                raise _Rewritten from error
            self.problems[path], self._failed[path] = str(error), stamp

    def _take(self, path: Path, known: _Known, header: Header, block: Block, reader: Reader) -> None:
        table = TABLES[self._kind]
        rows = np.ascontiguousarray(block[table])
        begins = int(block["step"][0]) - header.first_step
        if begins < known.header.rows:
            if known.header.first_step != header.first_step or rows[0].tobytes() != known.last:
                raise _Rewritten
            block = {"step": block["step"][1:], table: rows[1:]}
        if len(block["step"]):
            reader.take(header, block)
            known.header = dataclasses.replace(header, rows=known.header.rows + len(block["step"]))
            known.last = rows[-1].tobytes()
            self._known[path] = known


def parts(stream: Path, kind: Kind) -> list[Path]:
    """The parts of a pass that are there now."""
    return present(stream, f"{kind}-*[0-9].h5")


def _stamp(path: Path) -> _Stamp | None:
    """Size and time of the last write; None where the file is gone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
