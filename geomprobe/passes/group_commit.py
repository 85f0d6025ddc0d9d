"""Rows of a trace that several processes have to compare before one of them commits them."""

from __future__ import annotations

import math

from geomprobe.distributed.ranks import Ranks
from geomprobe.passes.attempts import AttemptLog, Tables
from geomprobe.trace.schema import VALUES


class GroupCommit:
    """Holds rows back until every process has compared their steps with its own recording.

    Args:
        log: where rank 0 commits them; None on the others, which only tell how far they have come.
        ranks: the processes of the run.
        first: the first step.
        marked: rows that differ come too, and say so in their last column.
    """

    def __init__(self, log: AttemptLog | None, ranks: Ranks, first: int, marked: bool = False) -> None:
        self._log, self._ranks, self._marked = log, ranks, marked
        self._compared = first
        self._held: list[tuple[int, Tables]] = []
        self._differs = False

    def append(self, blocks: Tables, equal: int) -> None:
        """Take the next rows, and commit those that all have compared.

        Args:
            blocks: by table.
            equal: how many of them are equal here.
        """
        count = len(blocks[VALUES])
        if equal < count and not self._differs:
            self._differs = True
            self._ranks.publish("differs", self._compared + equal)
        self._compared += count
        if self._log is None:
            self._ranks.publish("compared", self._compared)
            return
        self._held.append((self._compared, blocks))
        self._commit(self._log, self._compared_by_all())

    def _compared_by_all(self) -> int | None:
        """The step up to which the other processes have compared; None where there is no other."""
        others = self._ranks.published("compared").values()  # rank 0, which has the log, publishes none
        return None if self._ranks.alone else min(others) if len(others) == self._ranks.size - 1 else 0

    def commit_all(self) -> None:
        """Every process has compared everything."""
        if self._log is not None:
            self._commit(self._log, None)

    def close(self) -> None:
        """Let go of the part; rows that are held back are not written."""
        if self._log is not None:
            self._log.close()

    def _commit(self, log: AttemptLog, until: int | None) -> None:
        while self._held and (until is None or self._held[0][0] <= until):
            stop, blocks = self._held.pop(0)
            if self._marked:
                values = blocks[VALUES]
                first_different = min(self._ranks.published("differs").values(), default=math.inf)
                if first_different < stop:
                    values[max(0, int(first_different) - (stop - len(values))) :, -1] = 0.0
            log.append(blocks)
