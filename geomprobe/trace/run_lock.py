"""Locks on a run: the operating system keeps them, and drops them when their holder dies, so none is ever stale."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from geomprobe.errors import RunError

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
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its last holder took the file away just before we locked it
