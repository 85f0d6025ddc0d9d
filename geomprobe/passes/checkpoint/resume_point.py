"""Where a pass goes on that was cut off, or begins in the middle: from which checkpoint, over which rows."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import RunError
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.probe.loops import Position
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.stream.reader import Header


@dataclass(frozen=True)
class ResumePoint:
    """How a pass goes on.

    Attributes:
        manifest: of the run as it was begun.
        earlier: the parts that earlier attempts have committed.
        reached: how far their rows reach.
        first: the first step whose row is wanted.
        step: the step to go on from.
        checkpoint: the state before that step; None for the start of the script, as ever.
        position: where the script's loops stand there.
        digests: of the state, by component.
        buckets: DDP's there.
    """

    manifest: dict[str, Any]
    earlier: tuple[Header, ...] = ()
    reached: int = 0
    first: int = 0
    step: int = 0
    checkpoint: Path | None = None
    position: Position | None = None
    digests: dict[str, list[int]] | None = None
    buckets: list[str | None] = field(default_factory=list)


def find_resume_point(
    run: RunFolder,
    manifest: dict[str, Any],
    earlier: Sequence[Header],
    reached: int,
    latest: int,
    first: int = 0,
    ranks: Ranks | None = None,
) -> ResumePoint:
    """Go on from the last whole checkpoint at or before a step; a damaged one is named and passed over.

    Every process of the run goes on from the last one that is whole for all.

    Args:
        run: whose checkpoints, of this process.
        manifest: of the run as it was begun.
        earlier: the parts of earlier attempts.
        reached: how far their rows reach.
        latest: the step.
        first: the first step whose row is wanted.
        ranks: the processes of the run.
    """
    ranks = Ranks() if ranks is None else ranks
    for attempt in itertools.count():
        step, facts = _last_whole(run, latest)
        steps = ranks.all_gather(f"last checkpoint/{attempt}", step)
        latest = min(steps)
        if latest == max(steps):
            break
    begin = ResumePoint(manifest, tuple(earlier), reached, first)
    if facts is None:
        return begin
    return replace(
        begin,
        step=step,
        checkpoint=checkpoint.folder(run.checkpoints, step),
        position=Position(*facts["position"]),
        digests=facts["digests"],
        buckets=facts["buckets"],
    )


def _last_whole(run: RunFolder, latest: int) -> tuple[int, dict[str, Any] | None]:
    """The step and the facts of the last whole checkpoint at or before a step; 0 and None where there is none."""
    for step in reversed(checkpoint.saved(run.checkpoints)):
        if 0 < step <= latest:
            try:
                return step, checkpoint.verify(checkpoint.folder(run.checkpoints, step))
            except RunError as error:
                print(f"geomprobe: {error}: an earlier one is taken", file=sys.stderr)
    return 0, None


def cuts(run: RunFolder, world_size: int) -> list[int]:
    """The steps at which a run can be cut into segments: those that every process has a checkpoint of.

    >>> cuts(RunFolder("nowhere"), 1)
    []
    """
    of_ranks = [set(checkpoint.saved(run.of_rank(rank).checkpoints)) for rank in range(world_size)]
    return sorted(set.intersection(*of_ranks))


def segments(steps: Sequence[int], total: int, count: int) -> list[tuple[int, int]]:
    """Cut a run at its checkpoints into pieces whose longest is as short as can be.

    Args:
        steps: of the checkpoints.
        total: steps of the run.
        count: how many pieces at most.

    Returns:
        First step and the step after the last of each piece; fewer than ``count`` where checkpoints are too few.

    >>> segments([0, 10, 20, 30, 40], 45, 2)
    [(0, 20), (20, 45)]
    >>> segments([0, 5, 10, 15], 20, 3)
    [(0, 10), (10, 15), (15, 20)]
    >>> segments([0], 45, 3)
    [(0, 45)]
    """
    cuts = sorted({0, total, *(step for step in steps if 0 < step < total)})
    low, high = max(b - a for a, b in itertools.pairwise(cuts)), total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_pieces(cuts, middle, 0)) <= count else (middle + 1, high)
    return _pieces(cuts, low, count)


def _pieces(cuts: Sequence[int], longest: int, count: int) -> list[tuple[int, int]]:
    """Pieces of at most ``longest`` steps, as few as can be, or ``count``; no two cuts are farther apart than that."""
    pieces: list[tuple[int, int]] = []
    first = 0
    for i, (cut, following) in enumerate(itertools.pairwise(cuts)):
        left = len(cuts) - 1 - i  # pieces that the rest could still be cut into
        if cut > first and (following - first > longest or len(pieces) + 1 + left <= count):
            pieces.append((first, cut))
            first = cut
    return [*pieces, (first, cuts[-1])]
