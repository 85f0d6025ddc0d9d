"""Whether what happens now is an event of the run, or something that a pass evaluates on the side."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

_unheard = 0


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Inside, models run, gradients are taken and loaders are iterated without an observer being told.

    >>> with muted():
    ...     hears()
    False
    """
    global _unheard
    _unheard += 1
    try:
        yield
    finally:
        _unheard -= 1


def hears() -> bool:
    """Whether what happens now is reported.

    >>> hears()
    True
    """
    return not _unheard


def unless_muted(original: Callable[..., Any], reporting: Callable[..., Any]) -> Callable[..., Any]:
    """``reporting`` where what happens is heard, ``original`` where it is not.

    >>> call = unless_muted(min, max)
    >>> with muted():
    ...     call(1, 2)
    1
    >>> call(1, 2)
    2
    """

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (reporting if hears() else original)(*args, **kwargs)

    return either
