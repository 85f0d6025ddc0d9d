"""Which pass over which loader gave the batch that a step trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from geomprobe.probe.events import Events

if TYPE_CHECKING:
    from geomprobe.probe.probe import Probe


class LoaderPasses(Events):
    """Follows the script's loaders and the passes over them, from before the probe is attached.

    Attributes:
        made: the loaders made before training began, in an order that every process of the run shares.
        loader: the one that gave the last batch, None where none did.
        not_resumable: why no other process could begin in the middle of this training; None where it could.
    """

    def __init__(self) -> None:
        self.made: list[DataLoader[Any]] = []
        self.loader: DataLoader[Any] | None = None
        self.not_resumable: str | None = None
        self._passes: WeakKeyDictionary[Iterator[Any], tuple[int, DataLoader[Any]]] = WeakKeyDictionary()
        self._count = 0
        self._number: int | None = None
        self._trained_on: dict[int, float] = {}  # the passes that led to steps, and their epochs
        self._probe: Probe | None = None
        self._begun = False

    @property
    def epoch(self) -> float:
        """As the script names it; else how many passes led to steps, counted from 0; NaN before the first."""
        named = None if self._probe is None else self._probe.epoch
        if named is not None:
            return named
        return len(self._trained_on) - 1 if self._trained_on else float("nan")

    def attached(self, probe: Probe) -> None:
        self._probe = probe

    def begin(self) -> None:
        self._begun = True

    def loader_made(self, loader: DataLoader[Any]) -> None:
        if not self._begun:
            self.made.append(loader)

    def loader_iterated(self, loader: DataLoader[Any], iterator: Iterator[Any]) -> None:
        self._count += 1
        self._passes[iterator] = self._count, loader  # with persistent workers it may have been another pass

    def batch_came(self, iterator: Iterator[Any]) -> None:
        if torch.is_grad_enabled():  # evaluation is not part of the step
            self._number, self.loader = self._passes.get(iterator, (None, None))

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        if self._number is None or self.loader is None:
            return
        epoch = None if self._probe is None else self._probe.epoch
        first = self._trained_on.setdefault(self._number, -1 if epoch is None else epoch)
        if epoch not in (None, first):
            self.not_resumable = "one pass over its loader lasts for several epochs"
        elif self.loader.persistent_workers and self.loader.num_workers:
            self.not_resumable = (
                "its loader keeps its workers, and their random streams, from epoch to epoch "
                "(persistent_workers=True)"
            )
