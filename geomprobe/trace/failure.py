"""What to do when HDF5 cannot write: say what is safe, and let go of the file without a crash."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from geomprobe.errors import RunError


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


def reason(error: BaseException) -> str:
    """The operating system's own words, which HDF5 buries in a long line.

    >>> reason(OSError("write failed: errno = 28, error message = 'No space left on device', buf = 0x1"))
    'No space left on device'
    """
    text = " ".join(str(error).split())
    _, marker, rest = text.partition("error message = '")
    return rest.split("'")[0] if marker else text
