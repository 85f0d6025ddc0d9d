"""Tell which processes hold a run for writing, and whether they live, without touching their locks."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

_HOLDER = re.compile(r"process (\d+) on (\S+)")


@dataclass(frozen=True)
class Writer:
    """Who a lock file names. ``alive`` is None where this machine cannot know."""

    process: int
    host: str
    alive: bool | None


def writers(stream: Path) -> list[Writer]:
    """The processes named by the lock files of a run, the living ones first.

    To try a lock, even a shared one and for a moment, could make a writer fail that starts right then. So the text
    of the lock file is read instead, and its process looked for. A file without text yet counts for nothing.

    Args:
        stream: the run's folder of parts, which also holds its locks.

    >>> import tempfile
    >>> stream = Path(tempfile.mkdtemp())
    >>> _ = (stream / "lock").write_text(f"process 1 on elsewhere")
    >>> writers(stream)
    [Writer(process=1, host='elsewhere', alive=None)]
    """
    found = {_writer(path) for path in present(stream, "lock*")} - {None}
    order = (True, None, False)
    return sorted(
        (writer for writer in found if writer is not None),
        key=lambda writer: (order.index(writer.alive), writer.process),
    )


def present(folder: Path, pattern: str) -> list[Path]:
    """Paths of a folder that match a pattern; none where its owner has just taken it away.

    >>> present(Path("nowhere"), "*")
    []
    """
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []


def _writer(lock: Path) -> Writer | None:
    try:
        named = _HOLDER.match(lock.read_text(errors="replace"))
    except OSError:  # it was let go a moment ago
        return None
    if named is None:
        return None
    process, host = int(named[1]), named[2]
    return Writer(process, host, _holds(process, lock) if host == socket.gethostname() else None)


def _holds(process: int, lock: Path) -> bool:
    """Whether a process of this machine lives and, where that can be seen, has the file open.

    So a later process of the same number does not count, nor a dead one whose parent has not noticed.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to somebody else
    try:
        descriptors = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:  # there is no such thing here, or it belongs to somebody else
        return True
    return any(_same_file(descriptor, lock) for descriptor in descriptors)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # it was closed a moment ago
        return False
