"""Locks on a run, and who has them.

The operating system keeps the locks, and drops them when their owner dies, so none is ever stale. Each lock file names
its process. Others read that text: to try a lock, even a shared one and for a moment, could make a writer fail that
starts right then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geomprobe.errors import RunError
from geomprobe.trace.regular_file import open_regular, read_bytes, require_own_folder

_HOLDER = re.compile(r"process ([0-9]{1,9}) on (\S+)")
_LONGEST = 1000
_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_all() -> None:
    while _held:
        os.close(_held.pop())


# A lock lasts until its last descriptor is closed, and a loader's workers outlive a process that is killed by seconds.
os.register_at_fork(after_in_child=_close_all)


@contextlib.contextmanager
def locked(path: Path, how: int, run: Path) -> Iterator[None]:
    """Hold a lock file, which names this process as long as it is held.

    Args:
        path: the lock file; its folder is made, and removed in the end where nothing else is in it.
        how: `fcntl.flock`'s operation: ``LOCK_EX`` or ``LOCK_SH``, and ``LOCK_NB`` to refuse rather than wait.
        run: the run that is locked, for messages.

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    descriptor = _acquire(path, how, run)
    _held.add(descriptor)
    try:
        # Only to name ourselves: if the disk is full, the files that must be written say so.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if descriptor in _held:  # or this is a process that the script has forked
            with contextlib.suppress(OSError):  # where others share the lock, the file stays for them
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                path.parent.rmdir()  # where nothing of an unfinished pass stays
            _held.remove(descriptor)
            os.close(descriptor)


def _acquire(path: Path, how: int, run: Path) -> int:
    while True:
        try:
            require_own_folder(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise RunError(
                f"{run} cannot be written: {error.strerror}. Nothing was started; choose another folder, "
                "or mend this one."
            ) from error
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RunError(
                f"{run} is being written by another process ({holder}). Wait for it to end, or choose "
                "another run folder."
            ) from error
        names = os.fstat(descriptor).st_nlink
        if names == 1:
            return descriptor
        os.close(descriptor)
        if names:  # it is another file of yours as well, and would be overwritten
            raise RunError(f"{path} has {names} names, and a lock has one. Remove it, if no pass is running")
        # Its last holder took the file away just before we locked it.


@dataclass(frozen=True)
class Writer:
    """Who a lock file names. ``alive`` is None where this machine cannot know."""

    process: int
    host: str
    alive: bool | None


def writers(stream: Path) -> list[Writer]:
    """The processes named by the lock files of a run, the living ones first; a file without text counts for nothing.

    Args:
        stream: the run's folder of parts, which also holds its locks.

    >>> import tempfile
    >>> stream = Path(tempfile.mkdtemp())
    >>> _ = (stream / "lock").write_text(f"process 1 on elsewhere")
    >>> writers(stream)
    [Writer(process=1, host='elsewhere', alive=None)]
    """
    found = {writer for path in present(stream, "lock*") if (writer := _writer(path)) is not None}
    order = (True, None, False)
    return sorted(found, key=lambda writer: (order.index(writer.alive), writer.process))


def present(folder: Path, pattern: str) -> list[Path]:
    """Paths of a folder that match a pattern; none where its owner has just taken it away."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []


def _writer(lock: Path) -> Writer | None:
    try:
        named = _HOLDER.match(read_bytes(lock, _LONGEST).decode(errors="replace"))
    except (OSError, RunError):  # it was let go a moment ago, or is no lock
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
