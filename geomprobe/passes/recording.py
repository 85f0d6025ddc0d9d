"""Pass 1: train as the script does, and keep what a replay needs: fingerprints, references and checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.distributed.step_barrier import StepBarrier
from geomprobe.errors import Stopped, UnsupportedTraining
from geomprobe.measure.group_values import GroupValues
from geomprobe.passes import finalize
from geomprobe.passes.attempts import AttemptLog
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.ddp_buckets import buckets
from geomprobe.passes.checkpoint.restore import Resumer
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.options import RecordOptions, interval
from geomprobe.passes.references.averages import Averages
from geomprobe.passes.references.kept import KeptReferences
from geomprobe.passes.row_buffer import Block, RowBuffer
from geomprobe.passes.session import Session, part_attributes
from geomprobe.passes.sketching import StepSketch
from geomprobe.probe.events import Events
from geomprobe.probe.loops import TOP, Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.columns import Columns
from geomprobe.reproducibility.environment import source_digests
from geomprobe.reproducibility.fingerprint import FinalState, StepFingerprint
from geomprobe.trace.blame import StateSteps
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import FINAL, FINGERPRINTS, STEPS
from geomprobe.trace.stream.writer import WriteFailed


def recording(
    run: RunFolder,
    manifest: dict[str, Any],
    options: RecordOptions,
    ranks: Ranks | None = None,
    point: ResumePoint | None = None,
) -> Session:
    """Pass 1 over a run, as a session with its listeners.

    ``manifest`` is what is known of the environment before the script runs, ``point`` where to continue a recording.
    """
    manifest["recording"] = options.described()
    state_steps = StateSteps.of({} if point is None else point.manifest)
    manifest["optimizer_state_steps"] = state_steps._asdict()
    ranks = ranks or Ranks()
    own = run.of_rank(ranks.rank)

    def listeners(session: Session, probe: Probe, fingerprint: StepFingerprint, resumer: Resumer) -> list[Events]:
        fingerprint.state_steps = state_steps
        references = KeptReferences(own, ranks, session.layout.sharded)
        averages = [AverageKeeper(probe, options, references)] if options.ema or options.average else []
        taken = [name for each in averages for name in each.averages.weights]
        sketch = StepSketch(session, probe, options) if options.sketch else None
        rows = RecordWriter(session, probe, own, fingerprint, sketch)
        replicated = session.layout.kind == "DDP" and not ranks.alone
        shared = checkpoint.SharedByFirst(ranks, run.checkpoints) if replicated else None
        final_state = FinalState(fingerprint)
        return [
            SourceDigests(manifest),
            FinalWeights(probe, references),
            final_state,
            *averages,
            ReferenceKeeper(session, probe, frozenset(options.reference_steps), references, taken),
            *([sketch] if sketch else []),
            rows,
            Checkpointer(session, fingerprint, resumer, rows, options, own, shared),
            RecordSealer(session, own, rows, references, final_state),
        ]

    return Session(manifest, ranks, point, listeners, _no_steps, options.optimizer)


def _no_steps() -> UnsupportedTraining:
    return UnsupportedTraining(
        "No optimizer stepped, so there is no path to record. Does the script train when it is run this "
        "way? A step must go through torch.optim.Optimizer.step."
    )


@dataclass(eq=False)
class SourceDigests(Events):
    """Notes the digests of the script's own files, which it may import at any time until it ends."""

    manifest: dict[str, Any]

    def first_update(self) -> None:
        root = self.manifest["script"].get("root")
        self.manifest["sources"] = source_digests(Path(root)) if root else {}

    def complete(self) -> None:
        self.first_update()


class FinalWeights(Events):
    """Keeps the final iterate: what the last step left, also where the script loads other weights afterwards."""

    def __init__(self, probe: Probe, references: KeptReferences) -> None:
        self._probe, self._references = probe, references
        self._kept: dict[str, Tensor] | None = None  # a copy, from before something else moves the weights
        self._left = self._versions()

    def after_update(self) -> None:
        self._kept = None
        self._left = self._versions()

    def restored(self) -> None:
        self._left = self._versions()

    def weights_will_change(self) -> None:
        if self._probe.step and self._kept is None and self._versions() == self._left:
            self._kept = {name: p.detach().clone() for name, p in self._probe.parameters.items()}

    def detached(self) -> None:
        self.weights_will_change()

    def complete(self) -> None:
        """Take the reference ``final``.

        Raises:
            UnsupportedTraining: no optimizer stepped, or something moved the weights after the last step.
        """
        step = self._probe.step
        if step == 0:
            raise _no_steps()
        if self._kept is None and self._versions() != self._left:
            raise UnsupportedTraining(
                f"Something other than the optimizer changed the weights after the last step ({step - 1}), "
                "so the final iterate is lost. Iterate with `for epoch in probe.epochs(n)`, which keeps it when "
                "the loop ends, or take the change out."
            )
        self._references.take(FINAL, self._probe.parameters if self._kept is None else self._kept, step)

    def _versions(self) -> list[tuple[int, int]]:
        """What changes wherever anything writes to the weights, or exchanges their memory."""
        return [(p._version, p.data_ptr()) for p in map(local, self._probe.parameters.values())]


class AverageKeeper(Events):
    """Keeps averages of the weights along the path, as references."""

    name = "averages"

    def __init__(self, probe: Probe, options: RecordOptions, references: KeptReferences) -> None:
        self._probe, self._options, self._references = probe, options, references
        self.averages = self._from_here()

    def begin(self) -> None:
        self.averages = self._from_here()  # the script may have loaded weights since it attached

    def after_update(self) -> None:
        self.averages.update()

    def complete(self) -> None:
        for name, weights in self.averages.weights.items():
            self._references.take(name, weights, self._probe.step)

    def state_dict(self) -> dict[str, Any]:
        return self.averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averages.load_state_dict(state)

    def _from_here(self) -> Averages:
        return Averages(self._probe.parameters, decays=self._options.ema, running=self._options.average)


@dataclass(eq=False)
class ReferenceKeeper(Events):
    """Keeps the weights of the steps that were asked for, and those that the script asks for, as references."""

    name = "references"

    session: Session
    probe: Probe
    wanted: Collection[int]  # steps
    references: KeptReferences
    taken: Collection[str]  # names that the script cannot give

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        if self.probe.step in self.wanted:
            self._take(f"step-{self.probe.step}")

    def reference(self, name: str, if_lower: float | None = None) -> None:
        self.references.require_free(name, self.taken)
        if if_lower is None or self.references.is_lowest(name, float(if_lower)):
            self._take(name)

    def complete(self) -> None:
        if missed := sorted(t for t in self.wanted if f"step-{t}" not in self.references):
            self.session.manifest["missed_reference_steps"] = missed

    def state_dict(self) -> dict[str, Any]:
        return self.references.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.references.load_state_dict(dict(state))

    def _take(self, name: str) -> None:
        self.references.take(name, self.probe.parameters, self.probe.step)


class RecordWriter(Events):
    """Writes one row a step: epoch, loss, learning rate, fingerprint and, where it is asked for, the sketch."""

    _log: AttemptLog  # opened at the first update, since it needs the manifest

    def __init__(
        self,
        session: Session,
        probe: Probe,
        run: RunFolder,
        fingerprint: StepFingerprint,
        sketch: StepSketch | None = None,
    ) -> None:
        self._session, self._probe, self._run, self._fingerprint = session, probe, run, fingerprint
        self._groups, self._sketch = GroupValues(probe.optimizers), sketch
        places = {"epoch": False, "loss": True}
        columns = [Columns(name, STEPS, (name,), "float64", on_device) for name, on_device in places.items()]
        columns.append(self._groups.rate_column)
        columns += [each._replace(table=f"{FINGERPRINTS}/{each.table}") for each in fingerprint.columns]
        columns += sketch.columns if sketch else []
        self._rows = RowBuffer(fingerprint.device, columns, self._write)
        self._row: dict[str, Any] = {}
        self.opened = False

    def first_update(self) -> None:
        attributes = part_attributes(self._session.manifest)
        self._log = AttemptLog(self._run, "record", self._rows.tables, attributes, self._session.point)
        self.opened = True

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        self._groups.before_update()
        reading = self._fingerprint.reader.read(gradients, grad_scale, sums=False)
        loss, _ = self._session.sources.settle(reading)
        self._row = {
            "epoch": [self._session.passes.epoch],
            "loss": loss,
            **self._fingerprint.take(reading, grad_scale),
        }
        if self._sketch:
            self._row |= self._sketch.row(gradients, grad_scale)

    def parent_stepping(self) -> None:
        self._groups.parent_stepping()

    def updated(self) -> None:
        self._groups.after_update(self._probe.moving)

    def after_update(self) -> None:
        self._rows.append(self._row | {"lr": self._groups.rate_value})

    def flush(self) -> None:
        """Write the rows so far."""
        self._rows.flush()

    def close(self) -> None:
        try:
            self._rows.flush()
        finally:
            if self.opened:
                self._log.close()

    def complete(self) -> None:
        self.close()

    def _write(self, block: Block) -> None:
        self._log.append(block)


@dataclass(eq=False)
class Checkpointer(Events):
    """Writes checkpoints between the steps where they are due, and one where the pass is asked to stop."""

    session: Session  # whose listeners' state it keeps beside the training's own
    fingerprint: StepFingerprint
    resumer: Resumer
    rows: RecordWriter
    options: RecordOptions
    run: RunFolder
    shared: checkpoint.SharedByFirst | None  # what rank 0 writes for all

    def __post_init__(self) -> None:
        self.run.stream.mkdir(parents=True, exist_ok=True)
        self._writer = checkpoint.Writer(self.run.checkpoints, self.options.keep_checkpoints, self.shared)
        self._count, self._unit = interval(self.options.checkpoint_every)
        self._clock = StepBarrier(self.session.ranks, "checkpoint")
        self._stops = False
        self._taken(0)

    def begin(self) -> None:
        point = self.session.point
        if point is None or not point.earlier:
            self._save()

    def between_steps(self, position: Position) -> None:
        due = self._due(position)
        self._stops |= self.session.stop.due(self.session.steps)
        if self._unit == "never":
            self._stop_if_due()
        elif (due or self._stops) and not self.session.losses.values:  # else gradients wait for their update
            self._save()
            self._stop_if_due()

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        reason = self.session.passes.not_resumable
        if reason is None or self._unit == "never":
            return
        self._unit = "never"
        self.session.manifest["recording"]["no_checkpoints"] = reason
        self._writer.wait()
        for step in checkpoint.saved(self.run.checkpoints)[1:]:
            checkpoint.remove(self.run.checkpoints, step)
        print(
            f"geomprobe: no checkpoints are kept, because {reason}: a run that is cut off would start over, and its "
            "replay cannot be split.",
            file=sys.stderr,
        )

    def after_update(self) -> None:
        if not self.resumer.loops_over_batches:  # else a place for a checkpoint comes before the next step
            self._stops |= self.session.stop.due(self.session.steps)
            self._stop_if_due()

    def restored(self) -> None:
        self._taken(self.session.steps)

    def complete(self) -> None:
        self._writer.close()

    def fail(self, failure: BaseException | None) -> None:
        self._writer.close()

    def close(self) -> None:
        self._writer.close()

    def _due(self, position: Position) -> bool:
        """Whether a checkpoint is due between two steps; it stays due until one is written."""
        since = self.session.steps - self._last
        self._epoch_passed |= position.sweep == TOP and since > 0
        if self._unit == "min":  # by the clock of rank 0, for all
            if self.session.ranks.first and since and time.monotonic() - self._time >= 60 * self._count:
                self._clock.call()
            self._overdue |= self._clock.due(self.session.steps)
            return self._overdue
        return since >= self._count if self._unit == "steps" else since > 0 and self._epoch_passed

    def _taken(self, step: int) -> None:
        self._last, self._time = step, time.monotonic()
        self._epoch_passed = self._overdue = False

    def _stop_if_due(self) -> None:
        if self._stops:
            raise Stopped(together=True)

    def _save(self) -> None:
        contents = {**self.session.state_dict(), **self.resumer.capture()}
        facts = {
            "position": self.resumer.position,
            "digests": self.fingerprint.state(),
            "buckets": buckets(self.session.layout.replicas),
        }
        self.rows.flush()  # so that they reach as far as the checkpoint, whatever comes
        self._writer.submit(self.session.steps, contents, facts)
        self._taken(self.session.steps)


@dataclass(eq=False)
class RecordSealer(Events):
    """Seals the rows and the references into ``record.h5`` when the pass is over; the last of the listeners."""

    session: Session
    run: RunFolder
    rows: RecordWriter
    references: KeptReferences
    final_state: FinalState

    def complete(self) -> None:
        """Seal the record, once all processes have ended with as many steps.

        Raises:
            UnsupportedTraining: they have not.
        """
        session = self.session
        if chimeras := self.references.drop_chimeras():
            session.manifest["references_left_out"] = chimeras
        found = session.ranks.all_gather("recorded", [session.steps, self.final_state.digest])
        if not session.ranks.first:
            session.ranks.broadcast("sealed")
            return
        for rank, (count, _) in enumerate(found):
            if count != session.steps:
                raise UnsupportedTraining(
                    f"rank 0 took {session.steps} steps and rank {rank} took {count}: they are not one training. Give "
                    "every process the same number of batches."
                )
        session.manifest["final_optimizer_state"] = [state for _, state in found]
        self._seal("complete", self.references.names)

    def fail(self, failure: BaseException | None) -> None:
        """Seal what was recorded, without references, as ``failed``; where others are part of it, leave the parts."""
        if not self.run.parts("record"):
            self.run.clear_stream()  # references of a run without a step
            return
        self.rows.close()
        if (
            self.rows.opened
            and self.session.ranks.alone
            and not isinstance(failure, WriteFailed)
            and not finalize.planned(self.run, "record")
        ):
            self._seal("failed", [])

    def _seal(self, status: str, references: Sequence[str]) -> None:
        manifest = self.session.manifest
        manifest["updates"] = self.session.updates.described(self.session.steps)
        finalize.seal(self.run, "record", status=status, manifest=manifest, references=references)
        self.session.ranks.broadcast("sealed", status)
