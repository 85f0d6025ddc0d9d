"""Pass 2: the same run again, compared with the recording at every step and measured before each update."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import EnvironmentMismatch, ReplayDiverged, RunError, Stopped
from geomprobe.measure.options import MeasureOptions
from geomprobe.passes import finalize as sealing
from geomprobe.passes.attempts import AttemptLog, manifest_of
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.restore import Resumer
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.group_commit import GroupCommit
from geomprobe.passes.named_measurement import Measurement
from geomprobe.passes.param_groups import ParamGroups
from geomprobe.passes.references.loaded import References
from geomprobe.passes.row_buffer import Block, RowBuffer
from geomprobe.passes.session import Session, part_attributes
from geomprobe.probe.events import Closure, Events
from geomprobe.probe.hooks.mute import muted
from geomprobe.probe.loops import Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.columns import Columns
from geomprobe.reproducibility.comparison import Comparison
from geomprobe.reproducibility.environment_check import FIRST_STEP_SECTIONS, require_same
from geomprobe.reproducibility.fingerprint import StepFingerprint
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
    measure: MeasureOptions,
    uncertified: bool = False,
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
        measure: what to measure.
        uncertified: go on past the first difference, marking every later row.
        point: where to begin, if not at the start.
        segment: replay only up to this step; others do the rest, and whoever is last seals the trace.
        ranks: the processes of the run.
    """
    ranks = Ranks() if ranks is None else ranks
    manifest["measure"] = {**measure.described(), "options": {**asdict(measure), "files": references.digests}}
    # A resumed replay goes on only over rows that were found equal before they were committed.
    start = point.step if point is not None else 0
    comparison = Comparison(record, run.path, start, None if ranks.alone else ranks.rank)

    def listeners(
        session: Session, probe: Probe, fingerprint: StepFingerprint, resumer: Resumer
    ) -> list[Events]:
        measurement = Measurement(probe, measure, session.layout)
        rows = RowChecker(
            session,
            probe,
            fingerprint,
            run,
            record,
            references,
            measurement,
            comparison,
            uncertified,
            segment,
        )
        sealer = TraceSealer(session, fingerprint, run, record, measurement, comparison, rows, segment)
        return [MeasuredSteps(session, measurement), rows, sealer]

    def without_steps() -> ReplayDiverged:
        comparison.differs(0, "length", "steps")
        return comparison.error()

    return Session(manifest, ranks, point, listeners, without_steps)


class MeasuredSteps(Events):
    """Passes what happens in a step on to its measurement, which takes over the backward pass."""

    def __init__(self, session: Session, measurement: Measurement) -> None:
        self._measurement = measurement
        if session.updates.clipped_by:  # by now, in the first step of a script without `attach`
            measurement.clipping_missed()

    def fetch_ended(self, came: bool) -> None:
        if came and torch.is_grad_enabled():
            self._measurement.fetched()

    def entered(self, inputs: Any) -> None:
        self._measurement.entered()

    def sharpness_of(self, closure: Closure) -> None:
        self._measurement.sharpness_of(closure)

    def gradients_dropped(self) -> None:
        self._measurement.dropped()

    def before_clipping(self, factor: Tensor | None) -> None:
        self._measurement.clipping(factor)

    def step_skipped(self) -> None:
        self._measurement.skipped()

    def differentiate(
        self, loss: Tensor, closure: Closure | None, run: Callable[[], None], plain: bool
    ) -> None:
        self._measurement.backward(loss, closure, run, plain)


class RowChecker(Events):
    """Measures each step, compares its fingerprint with the recording's, and commits the rows that are equal.

    Args:
        session: of the pass.
        probe: on the training.
        fingerprint: of its steps.
        run: the run folder.
        record: the recording to compare with.
        references: the weights to measure against.
        measurement: of each step.
        comparison: what was found.
        uncertified: go on past the first difference, marking every later row.
        segment: the step before which this replay ends; None for the end of the run.

    Attributes:
        opened: whether the first update has come, and with it the columns and the files.
    """

    # Made at the first update, when the manifest and what is measured are known.
    _rows: RowBuffer
    _commit: GroupCommit
    _groups: ParamGroups
    _final: dict[str, Tensor]

    def __init__(
        self,
        session: Session,
        probe: Probe,
        fingerprint: StepFingerprint,
        run: RunFolder,
        record: Record,
        references: References,
        measurement: Measurement,
        comparison: Comparison,
        uncertified: bool,
        segment: int | None,
    ) -> None:
        self._session, self._probe, self._fingerprint = session, probe, fingerprint
        self._run, self._record, self._references = run, record, references
        self._measurement, self._comparison, self._uncertified = measurement, comparison, uncertified
        self._stop = record.num_steps if segment is None else segment
        self._counts_attempts = record.manifest.get("updates", {}).get("scaled", False)
        self._row: dict[str, Any] = {}
        self.opened = False

    def first_update(self) -> None:
        session = self._session
        if not self._uncertified:
            require_same(self._record.manifest, session.manifest, FIRST_STEP_SECTIONS, self._run.path)
        self._require_same_layout()
        self._require_same_options()
        references = self._references.beside(self._probe.parameters)
        self._final = references[FINAL]
        self._measurement.open(references, self._record, session.manifest["seed"])
        self._groups = ParamGroups(self._probe.optimizer)
        columns = self._columns()
        self._rows = RowBuffer(self._fingerprint.device, columns, self._compare_and_commit)
        log = None
        if session.ranks.first:
            table = next(table for table in self._rows.tables if table.name == VALUES)
            names = (*table.columns, "steps/same") if self._uncertified else table.columns
            attributes = part_attributes(session.manifest)
            log = AttemptLog(self._run, "trace", [Table(VALUES, names, "float64")], attributes, session.point)
        self._commit = GroupCommit(log, session.ranks, session.steps, marked=self._uncertified)
        self.opened = True

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        step = self._probe.step
        if step >= self._stop and not self._uncertified:
            self._rows.flush()  # an earlier difference is the cause, and comes first
            self.differs(step, "length", "steps")
        loss = self._session.losses.total(self._fingerprint.device).reshape(1)
        with muted():
            self._row = self._measurement.row(gradients, grad_scale, {"loss": loss})
        self._row |= {"epoch": [self._session.passes.epoch], **self._fingerprint.take()}
        if self._counts_attempts:
            self._row["attempt"] = [step + self._session.updates.skipped]

    def after_update(self) -> None:
        self._rows.append(self._row | self._groups.values())
        # The script may load other weights when training is over: only now are they the final iterate.
        if self._probe.step == self._record.num_steps:
            self._comparison.final_equal = all(
                _same_bits(local(p), self._final[name]) for name, p in self._probe.parameters.items()
            )
        if self._session.stop.due(self._probe.step):
            raise Stopped(together=True)

    def complete(self) -> None:
        """Compare what is left, and commit it once every process has found its own part equal.

        Raises:
            ReplayDiverged: the replay was not the same run.
        """
        steps, found = self._probe.step, self._comparison
        self.flush()
        if found.difference is None and steps < self._record.num_steps:
            self.differs(steps, "length", "steps")
        if found.difference is None and not found.final_equal:
            self.differs(steps, "weights", "final weights")
        if not self.opened:
            raise found.error()
        self.agree()

    def agree(self) -> None:
        """Commit the rows that were held back, once every process has found its part to be the recorded one."""
        self._rows.flush()
        # A process that has not found that stops, and ends the others, but for an uncertified replay.
        self._comparison.join(self._session.ranks.said_by_all("found", self._comparison.found()))
        self._commit.commit_all()

    def differs(self, step: int, component: str, tensor: str) -> None:
        """Something that is in no fingerprint differs: the end of the replay, unless it is uncertified.

        Raises:
            ReplayDiverged: it is.
        """
        self._comparison.differs(step, component, tensor)
        if not self._uncertified:
            raise self._comparison.error()

    @property
    def diverged(self) -> bool:
        """Whether a difference has ended the replay."""
        return self._comparison.difference is not None and not self._uncertified

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

    def _columns(self) -> list[Columns]:
        """Of a row, in the order of the trace's table and of the fingerprint."""
        on_host = {"epoch": ("steps/epoch",)} | (
            {"attempt": ("steps/attempt",)} if self._counts_attempts else {}
        )
        on_device = {"loss": ("steps/loss",), **self._measurement.columns}
        return [
            *(Columns(name, VALUES, columns, "float64", False) for name, columns in on_host.items()),
            *self._groups.columns,
            *(Columns(name, VALUES, columns, "float64", True) for name, columns in on_device.items()),
            *self._fingerprint.columns,
        ]

    def _compare_and_commit(self, block: Block) -> None:
        """Take a block of rows from the buffer.

        Raises:
            ReplayDiverged: a step in it is not the recorded one.
        """
        found, values = self._comparison, block[VALUES]
        if self.diverged:
            return
        equal = found.block(self._fingerprint.layout, block, len(values))
        if self._uncertified:
            same = (np.arange(len(values)) < equal).astype(np.float64)
            self._commit.append({VALUES: np.column_stack([values, same])}, equal)
        elif equal:
            self._commit.append({VALUES: values[:equal]}, equal)
        if self.diverged:
            raise found.error()

    def _require_same_layout(self) -> None:
        for component, names in self._fingerprint.layout.items():
            then = self._record.names(component)
            if list(names) != then:
                only = sorted(set(names) ^ set(then)) or ["their order"]
                raise EnvironmentMismatch(
                    f"{self._run.path} was recorded with {len(then)} entries under {component}, and here there are "
                    f"{len(names)} (not in both: {', '.join(only[:5])}), so the steps cannot be compared. Nothing was "
                    "replayed. Build the same model and optimizer, or record anew."
                )

    def _require_same_options(self) -> None:
        point = self._session.point
        now = json.loads(json.dumps(self._session.manifest["measure"]["options"]))
        for part in point.earlier if point is not None else ():
            then = manifest_of([part])["measure"]["options"]
            if differing := sorted(name for name in now if now[name] != then.get(name)):
                name = differing[0]
                raise RunError(
                    f"{part.path} was replayed with {name} = {then.get(name)}, and now it is {now[name]}: one trace "
                    "cannot hold both. Give the same options, or begin anew with --force."
                )


class TraceSealer(Events):
    """Ends a replay: seals the trace with its certificate, or leaves a proof for the next segment.

    Args:
        session: of the pass.
        fingerprint: of its steps.
        run: the run folder.
        record: the recording.
        measurement: of its steps.
        comparison: what was found.
        rows: the rows of the trace.
        segment: the step before which this replay ends; None for the end of the run.
    """

    def __init__(
        self,
        session: Session,
        fingerprint: StepFingerprint,
        run: RunFolder,
        record: Record,
        measurement: Measurement,
        comparison: Comparison,
        rows: RowChecker,
        segment: int | None,
    ) -> None:
        self._session, self._fingerprint, self._run, self._record = session, fingerprint, run, record
        self._measurement, self._comparison, self._rows, self._segment = (
            measurement,
            comparison,
            rows,
            segment,
        )

    def between_steps(self, position: Position) -> None:
        stop = self._segment
        at_end = stop is not None and self._session.steps == stop < self._record.num_steps
        if at_end and position == self._end["position"]:
            self._end_segment(self._session.steps)

    def complete(self) -> None:
        self._rows.close()
        if self._segment is not None:
            self._prove()
        else:
            self._seal("complete" if self._comparison.difference is None else "uncertified")
        self._session.ranks.said_by_first("sealed", True)

    def fail(self, failure: BaseException | None) -> None:
        """Seal what comes before a divergence, if that is why the pass or the script has failed.

        Raises:
            ReplayDiverged: the rows that were left show that the replay had diverged before.
        """
        try:
            self._rows.flush()
        finally:
            self._rows.close()
            if self._rows.diverged:
                self._seal("diverged", self._comparison.equal)

    def _seal(self, status: str, num_steps: int | None = None) -> None:
        if self._segment is None and self._session.ranks.first and self._rows.opened:
            sealing.seal(self._run, "trace", status=status, num_steps=num_steps, **self._facts())

    def _facts(self) -> dict[str, Any]:
        session = self._session
        session.manifest["measure"]["curvature"] = self._measurement.curvature_found()
        session.manifest["updates"] = updates = session.updates.described(session.steps)
        certificate = self._comparison.certificate(self._fingerprint.layout)
        return {
            "manifest": session.manifest,
            "certificate": certificate | {"steps_attempted": updates["attempted"]},
        }

    @functools.cached_property
    def _end(self) -> dict[str, Any]:
        """What the checkpoint that this segment ends at says of itself."""
        try:
            own = self._run.of_rank(self._session.ranks.rank).checkpoints
            facts = checkpoint.facts(checkpoint.folder(own, self._session.steps))
        except RunError as error:
            raise RunError(
                f"{error}: this segment ends there, so its end cannot be compared. What was measured is kept. Remove "
                "that checkpoint, so that the run is cut elsewhere, and go on: "
                f"geomprobe replay {self._run.path} --resume"
            ) from error
        return {**facts, "position": Position(*facts["position"])}

    def _end_segment(self, step: int) -> None:
        """Compare the state with the checkpoint that the next segment starts from, and leave a proof.

        Raises:
            SegmentEnded: always, when it is equal.
            ReplayDiverged: it is not.
        """
        self._rows.flush()
        recorded = self._end["digests"]
        for component, digests in self._fingerprint.state().items():
            names = self._fingerprint.layout[component][-len(digests) :]
            for name, now, then in zip(names, digests, recorded[component], strict=True):
                if now != then:
                    self._rows.differs(step, component, name)
        self._rows.agree()
        self._rows.close()
        self._prove()
        raise SegmentEnded

    def _prove(self) -> None:
        """Leave word that the state before the next step was compared, and found equal."""
        if self._session.ranks.first:
            sealing.write_down(self._run.proof("trace", self._session.steps), self._facts())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(raw), b.contiguous().view(raw))
