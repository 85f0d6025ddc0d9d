"""When a recording writes checkpoints, and which of them it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from geomprobe.passes.options import checkpoint_interval
from geomprobe.probe.loops import TOP, Position


@dataclass(frozen=True)
class RetentionPolicy:
    """When checkpoints are written, and how many are kept.

    Attributes:
        every: ``"epoch"``, ``"500steps"``, ``"30min"`` or ``"never"``.
        keep: how many at most, spread evenly over the steps; None for all.

    >>> RetentionPolicy("2steps").parsed
    (2, 'steps')
    """

    every: str = "epoch"
    keep: int | None = 32

    @property
    def parsed(self) -> tuple[int, str]:
        """``every`` as a number and its unit; 0 where it is no number of anything."""
        return checkpoint_interval(self.every)

    def too_many(self, steps: list[int]) -> list[int]:
        """Which of the checkpoints on disk go: those whose neighbors lie closest, never the first or the last.

        >>> RetentionPolicy(keep=4).too_many([0, 10, 20, 30, 40, 50])
        [10, 30]
        """
        left, gone = list(steps), []
        while self.keep is not None and len(left) > self.keep:
            i = min(range(1, len(left) - 1), key=lambda i: left[i + 1] - left[i - 1])
            gone.append(left.pop(i))
        return gone


class CheckpointTimer:
    """Tells between the steps of a run when a checkpoint is due; it stays due until one is `taken`.

    Args:
        keeping: the policy.
        clock: seconds.

    >>> due = CheckpointTimer(RetentionPolicy("2steps"))
    >>> due(Position(0, 0, 0, 1), 1), due(Position(0, 0, 0, 2), 2), due(Position(0, 0, 0, 3), 3)
    (False, True, True)
    >>> due.taken(3); due(Position(0, 0, 0, 4), 4)
    False
    """

    def __init__(self, keeping: RetentionPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._unit = keeping.parsed
        self._clock = clock
        self._epoch_passed = False
        self.taken(0)

    def __call__(self, position: Position, step: int) -> bool:
        """Whether one is due at a position, before a step."""
        if step == self._step:
            return False
        self._epoch_passed |= position.sweep == TOP
        if self._unit == "min":
            return self._clock() - self._time >= 60 * self._count
        if self._unit == "steps":
            return step - self._step >= self._count
        return self._unit == "epoch" and self._epoch_passed

    def taken(self, step: int) -> None:
        """One has been taken before a step."""
        self._step, self._time, self._epoch_passed = step, self._clock(), False
