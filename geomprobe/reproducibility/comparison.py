"""Compares a replay with its recording, block by block, and finds in what they differ first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import ReplayDiverged
from geomprobe.reproducibility.fingerprint import Layout
from geomprobe.trace.blame import FINAL_STATE, Difference, cause_before, first_difference, likely
from geomprobe.trace.certificate import Certificate, FirstDifference
from geomprobe.trace.record import Record


class Comparison:
    """How far a replay is the recorded run.

    Args:
        record: the recording.
        run: the run's folder, for messages.
        start: the step that the replay begins at; those before it were found equal earlier.
        rank: which of several processes this is; None where there is one.

    Attributes:
        compared: steps compared.
        equal: steps that were equal before the first difference.
        difference: the first one, with its step; None where there is none.
        final_equal: whether the weights were the final iterate, bit for bit, after the last step.
    """

    def __init__(self, record: Record, run: Path, start: int, rank: int | None = None) -> None:
        self._record, self._run, self._rank = record, run, rank
        self.compared = self.equal = start
        self.difference: tuple[int, Difference] | None = None
        self.final_equal = False

    def block(self, layout: Layout, prints: Mapping[str, NDArray[np.int64]], count: int) -> int:
        """Compare the next ``count`` steps; gives how many rows come before the first difference.

        Args:
            layout: column names by component.
            prints: fingerprints [count, columns] by component.
        """
        start = self.compared
        self.compared += count
        if self.difference is not None:
            return 0
        recorded = {name: self._record.fingerprints(name, start, start + count) for name in layout}
        known = min(count, self._record.num_steps - start)
        different = np.zeros(count, bool)
        different[known:] = True
        for name in layout:
            different[:known] |= (recorded[name] != prints[name][:known]).any(axis=1)
        row = int(different.argmax()) if different.any() else count
        self.equal += row
        if row < known:
            pair = ({name: rows[name][row] for name in layout} for rows in (recorded, prints))
            difference = first_difference(layout, *pair)
            assert difference is not None
            self.difference = start + row, difference
        elif row < count:
            self.difference = start + row, Difference("length", "steps")
        return row

    def differs(self, step: int, component: str, tensor: str, *also: str) -> None:
        """Something that is in no fingerprint differs."""
        self.difference = step, Difference(component, tensor, also)

    def found(self) -> dict[str, Any]:
        """What one of several processes sends to the others, in the end."""
        step, difference = self.difference or (None, None)
        return {
            "equal": self.equal,
            "final_equal": self.final_equal,
            "difference": None if difference is None else [step, *difference],
        }

    def join(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Make it what all processes have found, each in its own part, by rank."""
        self.equal = min(each["equal"] for each in found)
        self.final_equal = all(each["final_equal"] for each in found)
        if len(found) == 1:
            return
        differing = [
            (step, cause_before(component), rank, Difference(component, tensor, tuple(also), more))
            for rank, each in enumerate(found)
            for step, component, tensor, also, more in ([each["difference"]] if each["difference"] else [])
        ]
        if differing:  # what one process's batch changes is in the gradients of all, in the same step
            step, _, self._rank, difference = min(differing)
            self.difference = step, difference

    def certificate(self, layout: Layout) -> dict[str, Any]:
        """The entries of a `Certificate`: what was compared, and what was found."""
        first = None
        if self.difference is not None:
            step, difference = self.difference
            first = FirstDifference(step, difference.component, difference.tensor, self._rank)
        return Certificate(
            steps_recorded=self._record.num_steps,
            steps_compared=self.compared,
            steps_equal=self.equal,
            final_weights_equal=self.final_equal,
            components=tuple(layout),
            first_difference=first,
        ).as_json()

    def error(self) -> ReplayDiverged:
        """The first difference, as what stops a replay."""
        assert self.difference is not None
        step, difference = self.difference
        total, run = self._record.num_steps, self._run
        if difference.component == "length":
            what = f"was recorded with {total} steps, and the replay took {'more' if step >= total else step}"
        elif step >= total and difference.component == "weights":
            what = f"reached the end, but the weights after step {total - 1} are not w_T bit for bit"
            what += " (did the script write to them through .data after its last step?)"
        elif difference.tensor == FINAL_STATE:
            what = f"reached the end, but the optimizer's state after step {total - 1} is another one"
        else:
            what = f"differed from its recording at step {step} of {total}: first the {difference.component} "
            what += f"({difference.tensor})"
        also = f", then {', '.join(difference.also)}" if difference.also else ""
        where = "" if self._rank is None else f" on rank {self._rank}"
        why = likely(step, difference, self._record.state_steps)
        if difference.component == "gradient" and self._rank is not None:
            why += "; or another rank's batch or loss is not the recorded one, and its own message says so"
        return ReplayDiverged(
            f"The replay of {run}{where} {what}{also}. All {self.equal} steps before it were equal. "
            f"Likely, {why}. `geomprobe inspect {run}` shows what was measured up to "
            f"there; `geomprobe replay {run} --force --uncertified` goes on past it and marks every later row.",
            step=step,
            component=difference.component,
            tensor=difference.tensor,
        )
