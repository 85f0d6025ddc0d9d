"""Which pass over which loader gave the batch that a step trains on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader


class LoaderPasses:
    """Follows the passes over a script's loaders.

    Attributes:
        loader: the one that gave the last batch, None where none did.
    """

    def __init__(self) -> None:
        self._passes: WeakKeyDictionary[Iterator[Any], tuple[int, DataLoader[Any]]] = WeakKeyDictionary()
        self._begun = 0
        self._number: int | None = None
        self.loader: DataLoader[Any] | None = None
        self._trained_on: dict[int, float] = {}  # the passes that led to steps, and their epochs

    @property
    def epoch(self) -> float:
        """How many passes led to steps, counted from 0; NaN before the first."""
        return len(self._trained_on) - 1 if self._trained_on else float("nan")

    def begun(self, loader: DataLoader[Any], iterator: Iterator[Any]) -> None:
        """A pass over a loader begins; an iterator with persistent workers begins another one."""
        self._begun += 1
        self._passes[iterator] = self._begun, loader

    def gave(self, iterator: Iterator[Any]) -> None:
        """A batch has come from an iterator."""
        self._number, self.loader = self._passes.get(iterator, (None, None))

    def stepped(self, epoch: int | None) -> str | None:
        """A step is taken on the last batch.

        Args:
            epoch: as the script names it, or None.

        Returns:
            Why no other process could begin in the middle of this training, None where nothing speaks against it.
        """
        if self._number is None or self.loader is None:
            return None
        first = self._trained_on.setdefault(self._number, -1 if epoch is None else epoch)
        if epoch not in (None, first):
            return "one pass over its loader lasts for several epochs"
        if self.loader.persistent_workers and self.loader.num_workers:
            return (
                "its loader keeps its workers, and their random streams, from epoch to epoch "
                "(persistent_workers=True)"
            )
        return None
