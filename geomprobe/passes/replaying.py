"""Pass 2: the same run again, compared with the recording at every step and measured before each update."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import EnvironmentMismatch, ReplayDiverged, RunError, Stopped, UsageError
from geomprobe.measure.group_values import GroupValues
from geomprobe.measure.measurement import Measurement
from geomprobe.passes import finalize
from geomprobe.passes.attempts import AttemptLog, GroupCommit, manifest_of
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.restore import Resumer
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.options import ReplayOptions, require_same_options
from geomprobe.passes.references.loaded import References
from geomprobe.passes.row_buffer import Block, RowBuffer
from geomprobe.passes.session import Session, part_attributes
from geomprobe.probe.events import Events
from geomprobe.probe.loops import Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.columns import Columns
from geomprobe.reproducibility.comparison import Comparison
from geomprobe.reproducibility.digest import same_bits
from geomprobe.reproducibility.environment import FIRST_STEP_SECTIONS, require_same
from geomprobe.reproducibility.fingerprint import FinalState, StepFingerprint
from geomprobe.trace.absence import ABSENT, EPOCH, GIVEN_UP, LATE, RATE, Absence, steps_of
from geomprobe.trace.atomic_file import write_json
from geomprobe.trace.blame import FINAL_STATE, FINAL_WEIGHTS
from geomprobe.trace.record import Record
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import FINAL, VALUES
from geomprobe.trace.stream.writer import Table


class SegmentEnded(BaseException):
    """A replay of a part of a run has come to where the next part begins; see `TraceSealer`."""


def replaying(
    run: RunFolder,
    record: Record,
    references: References,
    manifest: dict[str, Any],
    options: ReplayOptions,
    point: ResumePoint | None = None,
    segment: int | None = None,
    ranks: Ranks | None = None,
) -> Session:
    """Pass 2 over a recorded run, as a session with its listeners.

    Args:
        run: the run folder.
        record: its sealed record; each process of the run has its own.
        references: the weights to measure against.
        manifest: what is known of the environment before the script runs.
        options: what to measure, and whether to continue past the first difference.
        point: where to begin, if not at the start.
        segment: replay only up to this step; other processes do the rest, and the last one seals the trace.
        ranks: the processes of the run.
    """
    ranks = ranks or Ranks()
    manifest["measure"] = {**options.described(), "files": references.digests}
    # A resumed replay skips only rows that were found equal before they were committed.
    start = point.step if point is not None else 0
    comparison = Comparison(record, run.path, start, None if ranks.alone else ranks.rank)

    def listeners(session: Session, probe: Probe, fingerprint: StepFingerprint, resumer: Resumer) -> list[Events]:
        if len(probe.optimizers) > 1 and (options.before_clipping or options.per_rank):
            raise UsageError(
                "Several optimizers step this model: the gradient before clipping, and that of each rank, is only "
                "measured where there is one. Leave --before-clipping and --per-rank out."
            )
        measurement = Measurement(probe, options, session.layout, session.sources, reader=fingerprint.reader)
        if session.updates.clipped_by:  # by now, in the first step of a script without `attach`
            measurement.clipping_missed()
        fingerprint.state_steps = record.state_steps
        state = FinalState(fingerprint)
        rows = RowChecker(
            session, probe, fingerprint, state, run, record, references, measurement, comparison, options, segment
        )
        sealer = TraceSealer(session, rows)
        return [*measurement.listeners, state, rows, sealer]

    def without_steps() -> ReplayDiverged:
        comparison.differs(0, "length", "steps")
        return comparison.error()

    chosen = record.manifest.get("recording", {}).get("optimizer")
    return Session(manifest, ranks, point, listeners, without_steps, chosen)


@dataclass(eq=False)
class RowChecker(Events):
    """Measures each step, compares its fingerprint with the recording's, and commits the rows that are equal."""

    session: Session
    probe: Probe
    fingerprint: StepFingerprint
    final_state: FinalState
    run: RunFolder
    record: Record
    references: References
    measurement: Measurement
    comparison: Comparison
    options: ReplayOptions
    segment: int | None  # the step before which this replay ends; None for the end of the run

    # Made at the first update, when the manifest and what is measured are known.
    opened: bool = False
    _said: set[Absence] = field(default_factory=set)
    _rows: RowBuffer = field(init=False)
    _commit: GroupCommit = field(init=False)
    _groups: GroupValues = field(init=False)
    _final: dict[str, Tensor] = field(init=False)
    _row: dict[str, Any] = field(init=False)

    def first_update(self) -> None:
        session = self.session
        if not self.options.uncertified:
            require_same(self.record.manifest, session.manifest, FIRST_STEP_SECTIONS, self.run.path)
        self._require_same_layout()
        self._require_same_options()
        references = self.references.beside(self.probe.parameters)
        self._final = references[FINAL]
        self.measurement.open(references, record=self.record, seed=session.manifest["seed"])
        self._groups = GroupValues(self.probe.optimizers)
        columns = self._columns()
        self._rows = RowBuffer(self.fingerprint.device, columns, self._compare_and_commit)
        log = None
        if session.ranks.first:
            table = next(table for table in self._rows.tables if table.name == VALUES)
            names = (*table.columns, "steps/same") if self.options.uncertified else table.columns
            attributes = part_attributes(session.manifest)
            log = AttemptLog(self.run, "trace", [Table(VALUES, names, "float64")], attributes, session.point)
        self._commit = GroupCommit(log, session.ranks, session.steps, marked=self.options.uncertified)
        self.opened = True

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        step = self.probe.step
        stop = self.record.num_steps if self.segment is None else self.segment
        if step >= stop and not self.options.uncertified:
            self._rows.flush()  # an earlier difference is the cause, and comes first
            self.differs(step, "length", "steps")
        reading = self.measurement.read(gradients, grad_scale)
        loss, absent = self.session.sources.settle(reading)
        measured = self.measurement.row(gradients, grad_scale, {"loss": loss}, absent, reading)
        epoch = self.session.passes.epoch
        self._row = {"epoch": [epoch], **measured, **self.fingerprint.take(reading, grad_scale)}
        if np.isnan(epoch):
            self._row["absent"] = self._row["absent"] + EPOCH.number
        self._groups.before_update()
        if "attempt" in self._counted:
            self._row["attempt"] = [step + self.session.updates.skipped]
        if "moving" in self._counted:
            self._row["moving"] = [self.probe.moving]

    def parent_stepping(self) -> None:
        self._groups.parent_stepping()

    def updated(self) -> None:
        self._groups.after_update(self.probe.moving)

    def after_update(self) -> None:
        if isinstance(unknown := self._groups.unknown_rates, Tensor) or unknown:
            self._row["absent"] = self._row["absent"] + RATE.number * torch.as_tensor(unknown > 0)
        self._rows.append(self._row | self._groups.values())
        # The script may load other weights when training is over: only now are they the final iterate.
        if self.probe.step == self.record.num_steps:
            self.comparison.final_equal = all(
                same_bits(local(p), self._final[name]) for name, p in self.probe.parameters.items()
            )
        if self.session.stop.due(self.probe.step):
            raise Stopped(together=True)

    def complete(self) -> None:
        """Compare what is left, and commit it once every process has found its own part equal.

        Raises:
            ReplayDiverged: the replay was not the same run.
        """
        steps, found = self.probe.step, self.comparison
        self.flush()
        if found.difference is None and steps < self.record.num_steps:
            self.differs(steps, "length", "steps")
        same_state = self.record.final_state in (None, self.final_state.digest)
        if found.difference is None and not found.final_equal:
            self.differs(steps, "weights", FINAL_WEIGHTS, *([] if same_state else ["optimizer"]))
        if found.difference is None and not same_state:
            self.differs(steps, "optimizer", FINAL_STATE)
        if not self.opened:
            raise found.error()
        self.agree()

    def agree(self) -> None:
        """Commit the rows that are left, once every process has found its part to be the recorded one."""
        self._rows.flush()
        # A process that has not found that stops, and ends the others, but for an uncertified replay.
        self.comparison.join(self.session.ranks.all_gather("found", self.comparison.found()))
        self._commit.commit_all()

    def differs(self, step: int, component: str, tensor: str, *also: str) -> None:
        """Something that is in no fingerprint differs: the end of the replay, unless it is uncertified.

        Raises:
            ReplayDiverged: it is.
        """
        self.comparison.differs(step, component, tensor, *also)
        if not self.options.uncertified:
            raise self.comparison.error()

    @property
    def diverged(self) -> bool:
        """Whether a difference has ended the replay."""
        return self.comparison.difference is not None and not self.options.uncertified

    def flush(self) -> None:
        """Compare and commit the rows so far.

        Raises:
            ReplayDiverged: one of them is not the recorded one.
        """
        if self.opened:
            self._rows.flush()

    def close(self) -> None:
        if self.opened:
            try:
                with suppress(ReplayDiverged):  # the next attempt finds it
                    self._rows.flush()
            finally:
                self._commit.close()

    @property
    def _counted(self) -> dict[str, str]:
        """What of a row is counted here, by its name in the row: the column of ``/steps``."""
        counted = {"epoch": "epoch"}
        if self.record.manifest.get("updates", {}).get("scaled"):
            counted["attempt"] = "attempt"  # of a GradScaler, which skips some
        if len(self.probe.optimizers) > 1:
            counted["moving"] = "optimizer"
        return counted

    def _columns(self) -> list[Columns]:
        """Of a row, in the order of the trace's table and of the fingerprint."""
        on_host = {name: (f"steps/{column}",) for name, column in self._counted.items()}
        on_device = {"loss": ("steps/loss",), "absent": (ABSENT,), **self.measurement.columns}
        return [
            *(Columns(name, VALUES, columns, "float64", False) for name, columns in on_host.items()),
            *self._groups.columns,
            *(Columns(name, VALUES, columns, "float64", True) for name, columns in on_device.items()),
            *self.fingerprint.columns,
        ]

    def _compare_and_commit(self, block: Block) -> None:
        """Take a block of rows from the buffer.

        Raises:
            ReplayDiverged: a step in it is not the recorded one.
        """
        found, values = self.comparison, block[VALUES]
        if self.diverged:
            return
        self._say_absent(values)
        equal = found.block(self.fingerprint.layout, block, len(values))
        if self.options.uncertified:
            same = (np.arange(len(values)) < equal).astype(np.float64)
            self._commit.append({VALUES: np.column_stack([values, same])}, equal)
        elif equal:
            self._commit.append({VALUES: values[:equal]}, equal)
        if self.diverged:
            raise found.error()

    def _say_absent(self, values: NDArray[np.float64]) -> None:
        """Say on standard error, once for each reason, why numbers are left out that the script can bring back."""
        table = next(table for table in self._rows.tables if table.name == VALUES)
        for absence, rows in steps_of(values[:, table.columns.index(ABSENT)]).items():
            if absence not in (*self._said, EPOCH, LATE, GIVEN_UP) and self.session.ranks.first:
                step = self.probe.step - len(values) + int(rows[0])
                print(f"geomprobe: at step {step}, and where it is so again, {absence}", file=sys.stderr)
            self._said.add(absence)

    def _require_same_layout(self) -> None:
        for component, names in self.fingerprint.layout.items():
            then = self.record.names(component)
            if list(names) != then:
                only = sorted(set(names) ^ set(then)) or ["their order"]
                raise EnvironmentMismatch(
                    f"{self.run.path} was recorded with {len(then)} entries under {component}, and here there are "
                    f"{len(names)} (not in both: {', '.join(only[:5])}), so the steps cannot be compared. Nothing was "
                    "replayed. Build the same model and optimizer, or record the run again."
                )

    def _require_same_options(self) -> None:
        # Of the references, the content of their files counts, not the path.
        measured = self.session.manifest["measure"].items()
        now = {name: value for name, value in measured if name not in ("argv", "references")}
        point = self.session.point
        for part in point.earlier if point is not None else ():
            require_same_options(f"{part.path} was replayed", manifest_of([part])["measure"], now)


@dataclass(eq=False)
class TraceSealer(Events):
    """Ends a replay: seals the trace with its certificate, or leaves a proof for the next segment."""

    session: Session
    rows: RowChecker

    def between_steps(self, position: Position) -> None:
        stop = self.rows.segment
        at_end = stop is not None and self.session.steps == stop < self.rows.record.num_steps
        if at_end and position == self._end["position"]:
            self._end_segment(self.session.steps)

    def complete(self) -> None:
        self.rows.close()
        if self.rows.segment is not None:
            self._prove()
        else:
            self._seal("complete" if self.rows.comparison.difference is None else "uncertified")
        self.session.ranks.broadcast("sealed", True)

    def fail(self, failure: BaseException | None) -> None:
        """Seal what comes before a divergence, if that is why the pass or the script has failed.

        Raises:
            ReplayDiverged: the rows that were left show that the replay had diverged before.
        """
        try:
            self.rows.flush()
        finally:
            self.rows.close()
            if self.rows.diverged:
                self._seal("diverged", self.rows.comparison.equal)

    def _seal(self, status: str, num_steps: int | None = None) -> None:
        if self.rows.segment is None and self.session.ranks.first and self.rows.opened:
            finalize.seal(self.rows.run, "trace", status=status, num_steps=num_steps, **self._facts())

    def _facts(self) -> dict[str, Any]:
        session = self.session
        session.manifest["measure"]["curvature"] = self.rows.measurement.curvature_found()
        session.manifest["updates"] = updates = session.updates.described(session.steps)
        certificate = self.rows.comparison.certificate(self.rows.fingerprint.layout)
        return {
            "manifest": session.manifest,
            "certificate": certificate | {"steps_attempted": updates["attempted"]},
        }

    @functools.cached_property
    def _end(self) -> dict[str, Any]:
        """The facts of the checkpoint that this segment ends at."""
        try:
            own = self.rows.run.of_rank(self.session.ranks.rank).checkpoints
            facts = checkpoint.facts(checkpoint.folder(own, self.session.steps))
        except RunError as error:
            raise RunError(
                f"{error}: this segment ends there, so its end cannot be compared. What was measured is kept. Remove "
                "that checkpoint, so that the run is cut elsewhere, and continue: "
                f"geomprobe replay {self.rows.run.path} --resume"
            ) from error
        return {**facts, "position": Position(*facts["position"])}

    def _end_segment(self, step: int) -> None:
        """Compare the state with the checkpoint that the next segment starts from, and leave a proof.

        Raises:
            SegmentEnded: always, when it is equal.
            ReplayDiverged: it is not.
        """
        self.rows.flush()
        if (different := self.rows.fingerprint.differs_from(self._end["digests"])) is not None:
            self.rows.differs(step, *different)
        self.rows.agree()
        self.rows.close()
        self._prove()
        raise SegmentEnded

    def _prove(self) -> None:
        """Leave word that the state before the next step was compared, and found equal."""
        if self.session.ranks.first:
            write_json(self.rows.run.proof("trace", self.session.steps), self._facts())
