"""What a recording keeps beside its fingerprints, and when it writes checkpoints."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from geomprobe.errors import UsageError
from geomprobe.passes.references.averages import require_decay
from geomprobe.probe.loops import TOP, Position

_SPECIFICATION = re.compile(r"(\d+)(steps|min)")


@dataclass(frozen=True)
class RetentionPolicy:
    """When checkpoints are written, and how many are kept.

    Attributes:
        every: ``"epoch"``, ``"500steps"``, ``"30min"`` or ``"never"``.
        keep: how many at most, spread evenly over the steps; None for all.

    Raises:
        UsageError: ``every`` is none of these, or ``keep`` is below 2.

    >>> RetentionPolicy("2steps").parsed
    (2, 'steps')
    """

    every: str = "epoch"
    keep: int | None = 32

    def __post_init__(self) -> None:
        if self.every not in ("epoch", "never") and not self.parsed[0]:
            raise UsageError(
                f"checkpoints every {self.every!r}: say epoch, never, or a number of steps or minutes, as 500steps "
                "or 30min"
            )
        if self.keep is not None and self.keep < 2:
            raise UsageError(
                f"keep {self.keep} checkpoints: at least 2, the first and the latest, are always kept"
            )

    @property
    def parsed(self) -> tuple[int, str]:
        """``every`` as a number and its unit; 0 where it is no number of anything."""
        found = _SPECIFICATION.fullmatch(self.every)
        return (int(found[1]), found[2]) if found else (0, self.every)

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


@dataclass(frozen=True)
class RecordOptions:
    """What a recording keeps beside the fingerprints; an attempt to go on with it takes the same.

    Attributes:
        reference_steps: steps t whose weights ``w_t`` are kept as the reference ``step-t``.
        ema: decays of the exponential moving averages of the weights that are kept as references.
        average: keep the running average of the weights as a reference.
        keeping: when checkpoints are written, and how many are kept.
    """

    reference_steps: tuple[int, ...] = ()
    ema: tuple[float, ...] = ()
    average: bool = False
    keeping: RetentionPolicy = field(default_factory=RetentionPolicy)

    def __post_init__(self) -> None:
        for decay in self.ema:
            require_decay(decay)

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "reference_steps": list(self.reference_steps),
            "ema": list(self.ema),
            "average": self.average,
            "checkpoint_every": self.keeping.every,
            "keep_checkpoints": self.keeping.keep,
        }

    @classmethod
    def of(cls, described: dict[str, Any]) -> RecordOptions:
        """What `described` described."""
        keeping = RetentionPolicy(described["checkpoint_every"], described["keep_checkpoints"])
        steps, ema = tuple(described["reference_steps"]), tuple(described["ema"])
        return cls(steps, ema, described["average"], keeping)


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
