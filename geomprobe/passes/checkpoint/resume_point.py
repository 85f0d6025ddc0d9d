"""Where a pass that was cut off continues, or one for a segment begins: from which checkpoint, over which rows."""

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
from geomprobe.trace.json_values import require_form
from geomprobe.trace.printable import show
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.stream.reader import Header

_FACTS = {"position": [int], "digests": dict, "buckets": list}


@dataclass(frozen=True)
class ResumePoint:
    """Where a pass continues; by default at the start of the script."""

    manifest: dict[str, Any]  # of the run as it was started
    earlier: tuple[Header, ...] = ()  # the parts that earlier attempts have committed
    first: int = 0  # the first step whose row is wanted
    step: int = 0  # where it continues
    checkpoint: Path | None = None  # the state before that step; None for the start of the script
    position: Position | None = None  # of the script's loops there
    digests: dict[str, list[int]] | None = None  # of the state, by component
    buckets: list[str | None] = field(default_factory=list)  # DDP's there


def find_resume_point(
    run: RunFolder,
    manifest: dict[str, Any],
    earlier: Sequence[Header],
    latest: int,
    ranks: Ranks,
    first: int = 0,
) -> ResumePoint:
    """Continue at the last whole checkpoint at or before step ``latest``; a damaged one is named and left out.

    Every process of the run calls this, and all continue at the last one that is whole for all.
    """
    for attempt in itertools.count():
        step, facts = _last_whole(run, latest)
        steps = ranks.all_gather(f"last checkpoint/{attempt}", step)
        latest = min(steps)
        if latest == max(steps):
            break
    point = ResumePoint(manifest, tuple(earlier), first)
    if facts is None:
        return point
    return replace(
        point,
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
                path = checkpoint.folder(run.checkpoints, step)
                facts = require_form(checkpoint.verify(path), _FACTS, f"checkpoint {path}")
                if facts.keys() >= _FACTS.keys() and 2 <= len(facts["position"] or ()) <= 4:
                    return step, facts
                raise RunError(f"checkpoint {path} does not say where the script's loops were")
            except RunError as error:
                show(f"geomprobe: {error}: an earlier one is taken", file=sys.stderr)
    return 0, None


def cuts(run: RunFolder, world_size: int) -> list[int]:
    """The steps at which a run can be cut into segments: those that every process has a checkpoint of."""
    of_ranks = [set(checkpoint.saved(run.of_rank(rank).checkpoints)) for rank in range(world_size)]
    return sorted(set.intersection(*of_ranks))


def segments(steps: Sequence[int], total: int, count: int) -> list[tuple[int, int]]:
    """Cut a run of ``total`` steps into ``count`` pieces, at the checkpoints (``steps``) nearest to equal shares.

    Returns:
        First step and the step after the last of each piece; fewer than ``count`` where checkpoints are too few.

    >>> segments([0, 10, 20, 30, 40], 45, 2)
    [(0, 20), (20, 45)]
    >>> segments([0], 45, 3)
    [(0, 45)]
    """
    ends = sorted({total, *(step for step in steps if 0 < step < total)})
    count = min(count, len(ends))
    chosen, next_end = [0], 0
    for i in range(1, count):
        free = range(next_end, len(ends) - (count - i))  # so that each later piece has an end too
        nearest = min(free, key=lambda at: abs(ends[at] - i * total / count))
        chosen.append(ends[nearest])
        next_end = nearest + 1
    return [*itertools.pairwise([*chosen, total])]
