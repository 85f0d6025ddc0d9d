"""The probe of a script that runs by itself: every call does what the loop asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class InertProbe:
    """What `attach` returns where nothing is recorded or replayed: the loop runs as if it were not there."""

    active = False
    epoch: int | None = None

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
