"""Whether what happens now is an event of the run, or something that a pass evaluates on the side."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

# How many `muted` are entered, in the whole process: hooks run in the threads of autograd and of loaders too.
# Only `muted` writes it.
_entered = 0


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Inside, models run, gradients are taken and loaders are iterated without an event of the run.

    >>> with muted():
    ...     is_muted()
    True
    """
    global _entered
    _entered += 1
    try:
        yield
    finally:
        _entered -= 1


def is_muted() -> bool:
    """Whether what happens now is no event of the run.

    >>> is_muted()
    False
    """
    return _entered > 0


def unless_muted(original: Callable[..., Any], reporting: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``reporting``, and ``original`` inside `muted`.

    >>> call = unless_muted(min, max)
    >>> with muted():
    ...     call(1, 2)
    1
    >>> call(1, 2)
    2
    """

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (original if _entered else reporting)(*args, **kwargs)

    return either
