"""A script's loops over epochs and batches: where they stand, and how a resumed run starts in the middle of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from geomprobe.errors import RunError
from geomprobe.probe import progress_bar as progress
from geomprobe.probe.events import Observer

Item = TypeVar("Item")

TOP = -1  # as a sweep: at the top of the epoch, before any


class Position(NamedTuple):
    """Where between two steps a script's loops stand.

    Attributes:
        loop: which of the script's loops over epochs.
        epoch: its epoch.
        sweep: which of that epoch's loops over batches; -1 at the top of the epoch.
        batch: how many batches that loop has given.
    """

    loop: int
    epoch: int
    sweep: int = TOP
    batch: int = 0


class Loops:
    """The loops of one training.

    A pass that is resumed in the middle has a goal. Up to there the loops give nothing: what they did is in the state
    that the pass then puts back.

    Args:
        observer: the pass.

    Attributes:
        epoch: the current epoch, or None while unknown.
        named: whether the script names its epochs.
        counted: whether its loops over batches are counted instead.
        depth: in how many loops over batches the script is now.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.epoch: float | None = None
        self.named = False
        self.counted = False
        self.depth = 0
        self._loop = TOP
        self._sweeps = 0

    def epochs(self, count: int) -> Iterator[int]:
        """Iterate over the epochs ``0 .. count - 1``, or those from the goal on."""
        self.named = True
        self._loop += 1
        goal = self._observer.goal
        if goal is not None and self._loop < goal.loop:
            return
        first = goal.epoch if goal is not None else 0
        if first >= count:
            raise RunError(
                f"the checkpoint is of epoch {first}, and the script's loop has {count} epochs. Run the script as it "
                "was run when the recording began."
            )
        try:
            with progress.bar("epoch", count, first) as advance:
                for epoch in range(first, count):
                    self.epoch, self._sweeps = epoch, 0
                    self._observer.between_steps(Position(self._loop, epoch))
                    yield epoch
                    advance()
        finally:  # after a break, too, what follows the loop is of no epoch, and may load other weights
            self.epoch = math.nan
            self._observer.weights_will_change()

    def batches(self, loader: Iterable[Item], length: int | None) -> Iterator[Item]:
        """Iterate over a loader, or over what it has from the goal on."""
        sweep = self._sweeps
        self._sweeps += 1
        observer, goal = self._observer, self._observer.goal
        if goal is not None and sweep < goal.sweep:
            return
        position = None
        if (
            self.named and self.epoch is not None and self.epoch >= 0 and torch.is_grad_enabled()
        ):  # evaluation takes no steps
            position = Position(self._loop, int(self.epoch), sweep)
        given = goal.batch if goal is not None else 0
        with progress.bar("batch", length, given) as advance:
            observer.fetching()  # making the iterator draws from the RNG already
            skipped = observer.iterating(loader, position)
            iterator = iter(loader)
            if not _skip(iterator, skipped):
                raise RunError(
                    f"the checkpoint is of batch {skipped} of epoch {self.epoch}, and the loader has fewer. Run the "
                    "script on the data that it had when the recording began."
                )
            while True:
                if position is not None:
                    observer.between_steps(position._replace(batch=given))
                observer.fetching()
                try:
                    batch = next(iterator)
                except StopIteration:
                    observer.fetch_ended(False)
                    return
                given += 1
                observer.fetch_ended(True)
                observer.fetched(batch)
                yield batch
                advance()


def _skip(iterator: Iterator[Any], count: int) -> bool:
    """Whether an iterator had ``count`` items to skip."""
    return all(next(iterator, iterator) is not iterator for _ in range(count))
