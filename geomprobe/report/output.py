"""The file that a report writes: never overwritten unless asked, never half there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from geomprobe.errors import RunError, UsageError


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to write a file where something is already.

    Raises:
        UsageError: ``path`` is a folder, or it exists and ``force`` is not set.

    >>> refuse_existing(Path("new.html"), force=False)
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force overwrites it")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Another name in the same folder, to be written to; at the end it is renamed to ``path``.

    Raises:
        RunError: the file cannot be written; what was there before stays.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with written_aside(path) as aside:
    ...     _ = aside.write_text("all of it")
    >>> path.read_text()
    'all of it'
    """
    aside = path.with_name(f".{path.name}.new")
    with write_errors(path):
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's error where ``path`` cannot be written into a `RunError`."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. What was there before is untouched"
        ) from error
