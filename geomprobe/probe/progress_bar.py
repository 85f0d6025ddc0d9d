"""Progress bars in the terminal: silent where standard error is no terminal, or rich is not installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

_live: Any = None  # the one rich display; bars nest inside it


@contextlib.contextmanager
def bar(label: str, total: int | None, done: int = 0) -> Iterator[Callable[[], None]]:
    """Show progress while inside; call what it yields after each unit of work.

    Args:
        label: the unit: ``epoch``, ``batch``.
        total: how many there are, or None where that is unknown.
        done: how many of them are behind it already.

    >>> with bar("epoch", 3) as advance:
    ...     advance()
    """
    if not sys.stderr.isatty():
        yield _nothing
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _nothing
        return
    global _live
    outermost = _live is None
    if outermost:
        from rich.console import Console

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        _live = Progress(*columns, console=Console(stderr=True), transient=True)
        _live.start()
    display = _live
    task = display.add_task(label, total=total, completed=done)
    try:
        yield lambda: display.advance(task)
    finally:
        display.remove_task(task)
        if outermost:
            display.stop()
            _live = None


def _nothing() -> None:
    pass
