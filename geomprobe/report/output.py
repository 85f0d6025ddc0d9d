"""The file that a report writes: never overwritten unless asked, never half there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from geomprobe.errors import RunError, UsageError
from geomprobe.trace.atomic_file import atomic_file


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to write a file where something is already.

    Raises:
        UsageError: ``path`` is a folder, or it exists and ``force`` is not set.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force overwrites it")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Another name in the same folder to write to, as `atomic_file` gives it.

    Raises:
        RunError: the file cannot be written; what was there before stays.
    """
    with write_errors(path), atomic_file(path) as aside:
        yield aside


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's error where ``path`` cannot be written into a `RunError`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}. What was there before is untouched") from error
