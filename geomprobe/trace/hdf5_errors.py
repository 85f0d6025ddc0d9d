"""What to do when HDF5 fails: say what and where in words, and let go of a file without a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geomprobe.errors import GeomprobeError, RunError


class WriteFailed(RunError):
    """The file system refused a write (a full disk, a quota); the message says what is safe and what to do."""


def abandon(file: Any) -> None:
    """Close an ``h5py.File`` leaving its bytes on disk as they are.

    HDF5 writes when it closes a file, and writes again what failed before; where that fails too, the process
    crashes. Pointed at the null device, the file's descriptor accepts everything, so the library lets go.
    """
    if not file:
        return
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(null, file.id.get_vfd_handle())
    finally:
        os.close(null)
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        file.close()


@contextlib.contextmanager
def damage_named(what: str, path: Path) -> Iterator[None]:
    """Turn whatever HDF5 raises at a changed bit into an error that says what is damaged.

    Raises:
        RunError: what was being read is damaged.

    >>> with damage_named("steps/loss", Path("trace.h5")):
    ...     raise OSError("wrong checksum")
    Traceback (most recent call last):
        ...
    geomprobe.errors.RunError: steps/loss in trace.h5 is damaged (wrong checksum)...
    """
    try:
        yield
    except GeomprobeError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise RunError(
            f"{what} in {path} is damaged ({reason(error)}). Restore the file from a copy, or make it again"
        ) from error


def reason(error: BaseException) -> str:
    """The operating system's own words, which HDF5 buries in a long line.

    >>> reason(OSError("write failed: errno = 28, error message = 'No space left on device', buf = 0x1"))
    'No space left on device'
    """
    text = " ".join(str(error).split())
    _, marker, rest = text.partition("error message = '")
    return rest.split("'")[0] if marker else text
