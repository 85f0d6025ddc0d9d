"""Write an HDF5 file aside and put it in its place whole, so that its name never shows half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from geomprobe.trace.hdf5_errors import WriteFailed, abandon, reason

# The formats of HDF5 1.8: every reader of the last fifteen years opens them, their metadata is checksummed,
# and a dimension scale may serve more columns than the older formats' 64 KiB attributes can list.
_LIBVER = ("v108", "v108")


@contextmanager
def written_aside(path: Path) -> Iterator[Any]:
    """An ``h5py.File`` under another name in the same folder, synced and renamed to `path` at the end.

    Where anything fails, what `path` held before stays, and the file aside is removed.

    Raises:
        WriteFailed: the disk is full or refused a write.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.h5"
    >>> with written_aside(path) as file:
    ...     file["a"] = 1
    >>> path.exists()
    True
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        file = h5py.File(aside, "w", libver=_LIBVER)
    except OSError as error:
        raise WriteFailed(
            f"cannot create {aside}: {reason(error)}. Make room, or the folder, there"
        ) from error
    try:
        with _abandoned_on_failure(file, path):
            yield file
        file.close()
        _sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def _abandoned_on_failure(file: Any, path: Path) -> Iterator[None]:
    try:
        yield
        file.flush()
    except BaseException as error:
        abandon(file)
        if isinstance(error, (OSError, RuntimeError)) and not isinstance(error, WriteFailed):
            raise WriteFailed(
                f"cannot write {path}: {reason(error)}. What was there before is untouched; "
                "free space on that disk and try again"
            ) from error
        raise


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open a folder, and orders a rename by itself.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
