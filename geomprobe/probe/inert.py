"""The probe of a script that runs by itself: every call does what the loop asked for, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class InertProbe:
    """What `attach` returns where nothing is recorded or replayed: the loop runs as if it were not there."""

    active = False
    epoch: float | None = None

    def epochs(self, count: int) -> Iterable[int]:
        """``range(count)``: see `Probe.epochs`."""
        return range(count)

    def batches(self, loader: Iterable[Item]) -> Iterable[Item]:
        """``loader`` itself: see `Probe.batches`."""
        return loader

    def fetched(self, batch: Any) -> None:
        """Nothing: see `Probe.fetched`."""

    def backward(self, loss: Tensor, closure: Callable[[], Tensor] | None = None, **options: Any) -> None:
        """``loss.backward(**options)``: see `Probe.backward`."""
        loss.backward(**options)

    def reference(self, name: str, if_lower: float | None = None) -> None:
        """Nothing: see `Probe.reference`."""

    def sharpness_of(self, closure: Callable[[], Tensor]) -> None:
        """Nothing: see `Probe.sharpness_of`."""

    def held_out(self, loss: Callable[..., Tensor], loader: Any = None) -> None:
        """Nothing: see `Probe.held_out`."""

    def full_gradient_of(self, loss: Callable[..., Tensor], loader: Any = None) -> None:
        """Nothing: see `Probe.full_gradient_of`."""

    def remove(self) -> None:
        """Nothing: see `Probe.remove`."""

    def __enter__(self) -> InertProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class LocalHook:
    """A hook on a module that stays in this process: copies and pickles of the module get one that does nothing.

    That one is of the standard library, so that a model that was saved during a pass loads without geomprobe.

    >>> import copy
    >>> hook = LocalHook(print)
    >>> hook("called"), copy.deepcopy(hook)("called")
    called
    (None, None)
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return contextlib.nullcontext().__exit__  # takes anything, and gives None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")
