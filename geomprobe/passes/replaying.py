"""Pass 2: the same run again, compared with the recording at every step and measured before each update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import EnvironmentMismatch, ReplayDiverged, RunError, Stopped
from geomprobe.measure.measurement import Measurement
from geomprobe.measure.options import MeasureOptions
from geomprobe.passes import finalize as sealing
from geomprobe.passes.attempts import AttemptLog, manifest_of
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.group_commit import GroupCommit
from geomprobe.passes.options import require_same_options
from geomprobe.passes.param_groups import group_columns, group_values
from geomprobe.passes.references.loaded import References
from geomprobe.passes.row_buffer import Block, RowBuffer
from geomprobe.passes.session import Closure, Session
from geomprobe.probe.loops import Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.comparison import Comparison
from geomprobe.reproducibility.digest import same_bits
from geomprobe.reproducibility.environment_check import FIRST_STEP_SECTIONS, require_same
from geomprobe.trace.atomic_file import write_json
from geomprobe.trace.record import Record
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import FINAL, VALUES
from geomprobe.trace.stream.writer import Table


class SegmentEnded(BaseException):
    """A replay of a part of a run has come to where the next part begins; see `Replaying`."""


class Replaying(Session):
    """Replays a recorded run, comparing and measuring.

    Args:
        run: the run directory.
        record: its sealed record.
        references: the weights to measure against.
        manifest: what is known of the environment before the script runs.
        measure: what to measure.
        uncertified: go on past the first difference, marking every later row.
        resumption: where to begin, if not at the start.
        segment: replay only from the step where the resumption begins to the one before this step; others do the rest,
            and whoever is last seals the trace.
        ranks: the processes of the run; each has its own recording.
    """

    def __init__(
        self,
        run: RunFolder,
        record: Record,
        references: References,
        manifest: dict[str, Any],
        measure: MeasureOptions,
        uncertified: bool = False,
        resumption: ResumePoint | None = None,
        segment: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(manifest, ranks, resumption)
        self._segment = segment is not None
        self._stop = record.num_steps if segment is None else segment
        self._run, self._record, self._measure, self._uncertified = run, record, measure, uncertified
        self._measurement: Measurement | None = None
        self._references = references
        self.manifest["measure"] = {**measure.described(), "files": self._references.digests}
        self._counts_attempts = record.manifest.get("updates", {}).get("scaled", False)
        # A replay goes on only over rows that were found equal before they were committed.
        start = resumption.step if resumption is not None else 0
        self._comparison = Comparison(record, run.path, start, None if self.ranks.alone else self.ranks.rank)
        self._stream: GroupCommit | None = None
        self._rows: RowBuffer | None = None

    def attached(self, probe: Probe) -> None:
        super().attached(probe)
        self._measurement = Measurement(probe, self._measure, self.layout)
        self.updates.when_clipping = self._measurement.clipping
        self.updates.when_skipped = self._measurement.skipped
        if self.updates.clipped_by:
            self._measurement.clipping_missed()

    def boundary(self, position: Position) -> None:
        if self.steps == self._stop < self._record.num_steps and position == self._end["position"]:
            self._end_segment()

    def fetch_ended(self, came: bool) -> None:
        super().fetch_ended(came)
        if self._measurement is not None and came and torch.is_grad_enabled():
            self._measurement.fetched()

    def entered(self, inputs: Any) -> None:
        super().entered(inputs)
        if self._measurement is not None:
            self._measurement.entered()

    def sharpness_of(self, closure: Closure) -> None:
        assert self._measurement is not None
        self._measurement.sharpness_of(closure)

    def gradients_dropped(self) -> None:
        super().gradients_dropped()
        if self._measurement is not None:
            self._measurement.dropped()

    def differentiate(
        self, loss: Tensor, closure: Closure | None, run: Callable[[], None], plain: bool
    ) -> None:
        if self._measurement is None:  # the script has no attach, and this is its first step
            run()
        else:
            self._measurement.backward(loss, closure, run, plain)

    def open(self) -> None:
        assert self.probe is not None
        if not self._uncertified:
            require_same(self._record.manifest, self.manifest, FIRST_STEP_SECTIONS, self._run.path)
        self._require_same_layout()
        self._require_same_options()
        references = self._references.beside(self.probe.parameters)
        self._final = references[FINAL]
        assert self._measurement is not None
        self._measurement.open(references, record=self._record, seed=self.manifest["seed"])
        host_groups, device_groups = group_columns(self.probe.optimizer)
        device = [
            "steps/loss",
            *device_groups,
            *(path for paths in self._measurement.columns.values() for path in paths),
        ]
        attempt = ["steps/attempt"] if self._counts_attempts else []
        columns = ["steps/epoch", *attempt, *host_groups, *device]
        columns += ["steps/same"] if self._uncertified else []
        prints = self.evidence.device_columns
        self._rows = RowBuffer(self.evidence.device, len(device), prints, self._compare_and_write)
        stream = None
        if self.ranks.first:
            tables = [Table(VALUES, tuple(columns), "float64")]
            stream = AttemptLog(self._run, "trace", tables, self.part_attributes(), self.resumption)
        self._stream = GroupCommit(stream, self.ranks, self.steps, marked=self._uncertified)

    def measure(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        assert self.probe is not None
        assert self._rows is not None
        assert self._measurement is not None
        step = self.probe.step
        if step >= self._stop and not self._uncertified:
            self._rows.flush()  # an earlier difference is the cause, and comes first
            self._stop_if_failed()
            self._diverge(step, "length", "steps")
            self._stop_if_failed()
        row = self._measurement.row(gradients, grad_scale, {"loss": self.evidence.loss.reshape(1)})
        attempt = [float(step + self.updates.skipped)] if self._counts_attempts else []
        self._row = row, [self.epoch, *attempt], *self.evidence.take()

    def updated(self) -> None:
        assert self.probe is not None
        assert self._rows is not None
        row, counts, digests, host = self._row
        host_groups, device_groups = group_values(self.probe.optimizer)
        floats = torch.cat(
            [row["loss"], *device_groups, *(values for name, values in row.items() if name != "loss")]
        )
        self._rows.append(floats, digests, [*counts, *host_groups], host)
        self._stop_if_failed()
        # The script may load other weights when training is over: only now are they the final iterate.
        if self.steps == self._record.num_steps:
            self._comparison.final_equal = self._weights_equal_final()
        if self.stopping():
            raise Stopped(together=True)

    def complete(self) -> None:
        """The script has ended: compare what is left, and seal the trace with its certificate.

        Raises:
            ReplayDiverged: the replay was not the same run.
            Exception: what else stopped the pass, where the script caught it and went on.
        """
        self._flush()
        if self.failure is None:
            self.restart.require_goal()
            self._require_whole_updates()
        held = self._comparison
        if self.failure is None and held.difference is None and self.steps < self._record.num_steps:
            self._diverge(self.steps, "length", "steps")
        if self.failure is None and held.difference is None and not held.final_equal:
            self._diverge(self.steps, "weights", "final weights")
        if self.failure is None:
            self._agree()
        if self._segment and self.failure is None:
            self._prove()
        elif self.failure is None or isinstance(self.failure, ReplayDiverged):
            self._seal()
        self._stop_if_failed()
        self.ranks.said_by_first("sealed", True)

    def _agree(self) -> None:
        """Commit the rows that were held back, once every process has found its part to be the recorded one."""
        # A process that has not found that stops, and ends the others, but for an uncertified replay.
        self._comparison.join(self.ranks.said_by_all("found", self._comparison.found()))
        if self._stream is not None:
            self._stream.commit_all()

    def fail(self) -> None:
        """The script has failed: if the replay had diverged that is why, else the parts stay, incomplete."""
        try:
            self._flush()
            if isinstance(self.failure, ReplayDiverged):
                self._seal()
        finally:
            self.close()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            if self._stream is not None:
                self._stream.close()

    def _seal(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        if self._segment or not self.ranks.first:
            return
        self._stream = None
        status, steps = "complete", None
        if self._comparison.difference is not None:
            status, steps = (
                ("uncertified", None) if self._uncertified else ("diverged", self._comparison.equal)
            )
        sealing.seal(self._run, "trace", status=status, num_steps=steps, **self._facts())

    def _facts(self) -> dict[str, Any]:
        if self._measurement is not None:
            self.manifest["measure"]["curvature"] = self._measurement.curvature_found()
        layout = self.evidence.layout if self.probe is not None else {}
        self.manifest["updates"] = updates = self.updates.described(self.steps)
        certificate = self._comparison.certificate(layout) | {"steps_attempted": updates["attempted"]}
        return {"manifest": self.manifest, "certificate": certificate}

    @functools.cached_property
    def _end(self) -> dict[str, Any]:
        """What the checkpoint that this segment ends at says of itself."""
        try:
            own = self._run.of_rank(self.ranks.rank).checkpoints
            facts = checkpoint.facts(checkpoint.folder(own, self._stop))
        except RunError as error:
            raise RunError(
                f"{error}: this segment ends there, so its end cannot be compared. What was measured is kept. Remove "
                "that checkpoint, so that the run is cut elsewhere, and go on: "
                f"geomprobe replay {self._run.path} --resume"
            ) from error
        return {**facts, "position": Position(*facts["position"])}

    def _end_segment(self) -> None:
        """Compare the state with the checkpoint that the next segment starts from, and leave a proof.

        Raises:
            SegmentEnded: always, when it is equal.
            ReplayDiverged: it is not.
        """
        self._flush()
        self._stop_if_failed()
        recorded = self._end["digests"]
        for component, digests in self.evidence.state().items():
            names = self.evidence.layout[component][-len(digests) :]
            for name, now, then in zip(names, digests, recorded[component], strict=True):
                if now != then:
                    self._diverge(self._stop, component, name)
                    self._stop_if_failed()
        self._agree()
        self._prove()
        raise SegmentEnded

    def _prove(self) -> None:
        """Leave word that the state before the next step was compared, and found equal."""
        if self._stream is not None:
            self._stream.close()
        if self.ranks.first:
            write_json(self._run.proof("trace", self.steps), self._facts())

    def _flush(self) -> None:
        if self._rows is not None:
            rows, self._rows = self._rows, None
            rows.flush()

    def _require_same_layout(self) -> None:
        for component, names in self.evidence.layout.items():
            then = self._record.names(component)
            if list(names) != then:
                only = sorted(set(names) ^ set(then)) or ["their order"]
                raise EnvironmentMismatch(
                    f"{self._run.path} was recorded with {len(then)} entries under {component}, and here there are "
                    f"{len(names)} (not in both: {', '.join(only[:5])}), so the steps cannot be compared. Nothing was "
                    "replayed. Build the same model and optimizer, or record anew."
                )

    def _require_same_options(self) -> None:
        # Of the references, the content of their files counts, not the path.
        aside = ("argv", "references")
        now = {name: value for name, value in self.manifest["measure"].items() if name not in aside}
        for part in self.resumption.earlier if self.resumption is not None else ():
            require_same_options(f"{part.path} was replayed", manifest_of([part])["measure"], now)

    def _compare_and_write(self, block: Block) -> None:
        if self._comparison.difference is not None and not self._uncertified:
            return
        assert self._stream is not None
        prints = self.evidence.assemble(block.integers, block.host_integers)
        values = np.hstack([block.host_floats, block.floats])
        equal = self._comparison.block(self.evidence.layout, prints, len(values))
        if self._comparison.difference is not None and not self._uncertified:
            self.failure = self._comparison.error()
        if self._uncertified:
            same = np.ones((len(values), 1))
            same[equal:] = 0.0
            self._stream.append({VALUES: np.hstack([values, same])}, equal)
        elif equal:
            self._stream.append({VALUES: values[:equal]})

    def _diverge(self, step: int, component: str, tensor: str) -> None:
        self._comparison.differs(step, component, tensor)
        if not self._uncertified:
            self.failure = self._comparison.error()

    def _weights_equal_final(self) -> bool:
        assert self.probe is not None
        return all(same_bits(local(p), self._final[name]) for name, p in self.probe.parameters.items())
