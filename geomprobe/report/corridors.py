"""The near-corridors of a run: the share of steps below each threshold, and the stays below one threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geomprobe.corridor.detection import occupancy, segments
from geomprobe.report.table import number, percent, table

if TYPE_CHECKING:
    from geomprobe.trace.reader import Trace

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Relative residuals at which the text gives the share of steps below; a figure draws the whole curve."""
_LONGEST = 5


def summarize(trace: Trace, threshold: float, smooth: int | None) -> dict[str, Any]:
    """Occupancy at `THRESHOLDS` and the stays below ``threshold``, as JSON values.

    Args:
        trace: one whose replay took Hg.
        threshold: a step is inside where the relative residual is below this.
        smooth: width of a moving average, in measured rows; None for no average.

    Raises:
        UsageError: nothing was measured, or the threshold is not positive.
    """
    curve = occupancy(trace, THRESHOLDS, smooth=smooth)
    stays = segments(trace, threshold, smooth=smooth)
    lengths = stays.lengths
    return {
        "smooth": smooth,
        "measured": stays.measured,
        "occupancy": list(zip(curve.thresholds.tolist(), curve.share.tolist(), strict=True)),
        "threshold": threshold,
        "share": stays.share,
        "stays": [{"entry": int(a), "exit": int(b)} for a, b in zip(stays.entries, stays.exits, strict=True)],
        "lengths": {"median": float(np.median(lengths)), "longest": int(lengths.max())} if len(lengths) else {},
    }


def render(found: dict[str, Any], num_steps: int) -> str:
    """The summary as text: the curve, then the stays."""
    smoothed = f", averaged over {found['smooth']} of them" if found["smooth"] else ""
    head = f"near-corridors: relative residual lr ||HG||/||G|| of {found['measured']} measured steps{smoothed}"
    rows = [[number(t), percent(s)] for t, s in found["occupancy"]]
    curve = table(["below", "share"], rows, right=[0, 1])
    return "\n\n".join([head, curve, _stays(found, num_steps)])


def _stays(found: dict[str, Any], num_steps: int) -> str:
    stays = sorted(found["stays"], key=lambda stay: stay["entry"] - stay["exit"])
    line = f"below {number(found['threshold'])}: {percent(found['share'])} of the measured steps, {len(stays)} stays"
    if not stays:
        return line
    lengths = found["lengths"]
    line += f", median length {number(lengths['median'])}, longest {lengths['longest']} of {num_steps} steps"
    rows = [[str(s["entry"]), str(s["exit"]), str(s["exit"] - s["entry"])] for s in stays[:_LONGEST]]
    return f"{line}\n\n{table(['entry', 'exit', 'steps'], rows, right=[0, 1, 2])}"
