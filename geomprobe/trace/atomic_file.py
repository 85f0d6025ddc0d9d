"""Write a file aside and put it in its place whole, so that its name never shows half a file."""

from __future__ import annotations

import json
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
def atomic_file(path: Path) -> Iterator[Path]:
    """A path in the same folder to write a file at, which is synced and renamed to `path` at the end.

    Where anything fails, what `path` held before stays, and the file aside is removed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.txt"
    >>> with atomic_file(path) as aside:
    ...     _ = aside.write_text("whole")
    >>> path.read_text(), aside.exists()
    ('whole', False)
    """
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)  # what a kill left, or a link to another file
    try:
        yield aside
        _sync(aside, os.O_RDWR)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder, and orders a rename by itself.
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(value))


@contextmanager
def atomic_hdf5(path: Path) -> Iterator[Any]:
    """An ``h5py.File`` that is written as an `atomic_file`.

    Raises:
        WriteFailed: the disk is full or refused a write.
    """
    with atomic_file(path) as aside:
        try:
            file = h5py.File(aside, "w", libver=_LIBVER)
        except OSError as error:
            raise WriteFailed(f"cannot create {aside}: {reason(error)}. Make room, or the folder, there") from error
        try:
            yield file
            file.flush()
        except BaseException as error:
            abandon(file)
            if isinstance(error, (OSError, RuntimeError)) and not isinstance(error, WriteFailed):
                raise WriteFailed(
                    f"cannot write {path}: {reason(error)}. What was there before is untouched; "
                    "free space on that disk and try again"
                ) from error
            raise
        file.close()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
