"""Pass 1: train as the script does, and keep what a replay needs: fingerprints, references, environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.distributed.step_barrier import StepBarrier
from geomprobe.errors import Stopped, UnsupportedTraining
from geomprobe.passes import finalize as sealing
from geomprobe.passes.attempts import AttemptLog
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.ddp_buckets import buckets
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.checkpoint.retention import CheckpointTimer, RecordOptions
from geomprobe.passes.checkpoint.training_state import capture
from geomprobe.passes.references.averages import Averages
from geomprobe.passes.references.kept import KeptReferences
from geomprobe.passes.row_buffer import Block, RowBuffer
from geomprobe.passes.session import Session
from geomprobe.probe.loops import TOP, Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.environment import source_digests
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import FINAL, FINGERPRINTS, STEPS
from geomprobe.trace.stream.writer import Table, WriteFailed


class Recording(Session):
    """Records a run into a run directory.

    Args:
        run: where to.
        manifest: what is known of the environment before the script runs.
        options: what to keep.
        ranks: the processes of the run.
        resumption: where to go on.
    """

    def __init__(
        self,
        run: RunFolder,
        manifest: dict[str, Any],
        options: RecordOptions,
        ranks: Ranks | None = None,
        resumption: ResumePoint | None = None,
    ) -> None:
        super().__init__(manifest, ranks, resumption)
        manifest["recording"] = options.described()
        self._run, self._first_checkpoints = run.of_rank(self.ranks.rank), run.checkpoints
        self._options = options
        self._reference_steps = frozenset(options.reference_steps)
        self._averages: Averages | None = None
        self._references = KeptReferences(self._run, self.ranks)
        self._due = CheckpointTimer(options.keeping)
        self._run.stream.mkdir(parents=True, exist_ok=True)
        self._checkpoints = checkpoint.Writer(self._run.checkpoints, options.keeping.too_many)
        self._clock = StepBarrier(self.ranks, "checkpoint")
        self._overdue = self._ends = False
        self._stream: AttemptLog | None = None
        self._rows: RowBuffer | None = None
        self._final: dict[str, Tensor] | None = None
        self._marks: list[tuple[int, int]] = []
        self._no_checkpoints = options.keeping.every == "never"

    def attached(self, probe: Probe) -> None:
        super().attached(probe)
        self._references.sharded = self.layout.sharded
        if self.layout.kind == "DDP" and not self.ranks.alone:
            self._checkpoints.shared = checkpoint.SharedByFirst(self.ranks, self._first_checkpoints)

    def begin(self) -> None:
        assert self.probe is not None
        super().begin()
        if self._options.ema or self._options.average:
            self._averages = Averages(
                self.probe.parameters, decays=self._options.ema, running=self._options.average
            )
        if self.resumption is None or not self.resumption.earlier:
            with self._lasting():
                self._save(None)

    def boundary(self, position: Position) -> None:
        due = self._is_due(position)
        self._ends |= self.stopping()
        if self._no_checkpoints:
            self._stop_if_asked()
        elif (due or self._ends) and self.evidence.settled:  # else where nothing waits to be measured
            self._save(position)
            self._stop_if_asked()

    def _is_due(self, position: Position) -> bool:
        due = self._due(position, self.steps)
        if self._options.keeping.parsed[1] == "min":  # by the clock of rank 0
            if due and self.ranks.first:
                self._clock.call()
            self._overdue |= self._clock.due(self.steps)
            return self._overdue
        return due

    def cannot_go_on(self, reason: str) -> None:
        if self._no_checkpoints:
            return
        self._no_checkpoints = True
        self.manifest["recording"]["no_checkpoints"] = reason
        self._checkpoints.wait()
        for step in checkpoint.saved(self._run.checkpoints)[1:]:
            checkpoint.remove(self._run.checkpoints, step)
        print(
            f"geomprobe: no checkpoints are kept, because {reason}: a run that is cut off would start over, and its "
            "replay cannot be split.",
            file=sys.stderr,
        )

    def restored(self, rest: dict[str, Any]) -> None:
        own = rest["recording"]
        self._references.load_state_dict(own["references"])
        self._marks = self._versions()
        if self._averages is not None:
            self._averages.load_state_dict(own["averages"])
        self._due.taken(self.steps)

    def open(self) -> None:
        assert self.probe is not None
        self._note_sources()
        layout = self.evidence.layout
        tables = [Table(STEPS, ("epoch", "loss", "lr"), "float64")]
        tables += [Table(f"{FINGERPRINTS}/{name}", columns, "int64") for name, columns in layout.items()]
        self._stream = AttemptLog(self._run, "record", tables, self.part_attributes(), self.resumption)
        self._rows = RowBuffer(self.evidence.device, 2, self.evidence.device_columns, self._write)

    def measure(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        assert self.probe is not None
        if self.probe.step in self._reference_steps:
            self._take(f"step-{self.probe.step}")
        self._row = self.evidence.loss, self.epoch, *self.evidence.take()

    def updated(self) -> None:
        assert self.probe is not None
        assert self._rows is not None
        loss, epoch, digests, host = self._row
        rate = self.probe.optimizer.param_groups[0].get("lr", float("nan"))
        rate = torch.as_tensor(rate, dtype=loss.dtype).to(loss.device, non_blocking=True)
        self._rows.append(torch.stack([loss, rate]), digests, [epoch], host)
        self._final = None
        self._marks = self._versions()
        if self._averages is not None:
            self._averages.update()
        between_batches = self.restart.sweep is not None and self.probe.loops.named
        if not between_batches:  # else a checkpoint comes first
            self._ends |= self.stopping()
            self._stop_if_asked()

    def weights_will_change(self) -> None:
        # The script may load its best checkpoint when training is over; w_T is what the last step left.
        if self.probe is not None and self.probe.step and self._final is None and not self._moved():
            self._final = {name: p.detach().clone() for name, p in self.probe.parameters.items()}

    def reference(self, name: str, if_lower: float | None = None) -> None:
        self._references.require_free(name, self._averages.weights if self._averages is not None else ())
        with self._lasting():
            if if_lower is None or self._references.is_lowest(name, float(if_lower)):
                self._take(name)

    def complete(self) -> None:
        """The script has ended well: keep ``w_T`` and seal the record.

        Raises:
            UnsupportedTraining: no optimizer stepped, or something moved the weights after the last step.
            Exception: what stopped the pass earlier, where the script caught it and went on.
        """
        with self._lasting():
            self.restart.require_goal()
            self._require_whole_updates()
            self._keep_final()
            self._checkpoints.close()
            self._note_sources()
            self._close_stream()
            if chimeras := self._references.drop_chimeras():
                self.manifest["references_left_out"] = chimeras
            self.ranks.say("recorded", self.steps)
            if self.ranks.first:
                self._require_same_length(self.ranks.said("recorded"))
                self._seal("complete")
            else:
                self.ranks.said_by_first("sealed")

    def _note_sources(self) -> None:
        root = self.manifest["script"].get("root")
        self.manifest["sources"] = source_digests(Path(root)) if root else {}

    def _require_same_length(self, steps: list[int]) -> None:
        for rank, count in enumerate(steps, 1):
            if count != self.steps:
                raise UnsupportedTraining(
                    f"rank 0 took {self.steps} steps and rank {rank} took {count}: they are not one training. Give "
                    "every process the same number of batches."
                )

    def _keep_final(self) -> None:
        if self.steps == 0:
            raise UnsupportedTraining(
                "No optimizer stepped, so there is no path to record. Does the script train when it is run this "
                "way? A step must go through torch.optim.Optimizer.step."
            )
        if self._final is None and self._moved():
            raise UnsupportedTraining(
                f"Something other than the optimizer changed the weights after the last step ({self.steps - 1}), "
                "so the final iterate is lost. Iterate with `for epoch in probe.epochs(n)`, which keeps it when "
                "the loop ends, or take the change out."
            )
        self._take(FINAL, self._final)
        if self._averages is not None:
            for name, weights in self._averages.weights.items():
                self._take(name, weights)
        missed = sorted(t for t in self._reference_steps if f"step-{t}" not in self._references)
        if missed:
            self.manifest["missed_reference_steps"] = missed

    def fail(self) -> None:
        """The script has failed: seal what was recorded, without references, as ``failed``."""
        if not self._run.parts("record"):
            self._checkpoints.close()
            self._run.clear_stream()  # references of a run without a step
        elif (
            self._stream is None
            or not self.ranks.alone
            or isinstance(self.failure, WriteFailed)
            or sealing.planned(self._run, "record")
        ):
            self.close()
        else:
            self._seal("failed")

    def close(self) -> None:
        self._close_stream()
        self._checkpoints.close()

    def _close_stream(self) -> None:
        try:
            if self._rows is not None:
                rows, self._rows = self._rows, None
                rows.flush()
        finally:
            if self._stream is not None:
                self._stream.close()

    def _stop_if_asked(self) -> None:
        if self._ends:
            raise Stopped(together=True)

    def _save(self, position: Position | None) -> None:
        """Begin to write a checkpoint of the present state; ``position`` is None before the first step."""
        assert self.probe is not None
        loader, before = None, None
        if position is not None and position.sweep != TOP and self.restart.sweep is not None:
            loader, before = self.restart.sweep
        own = [loader] if loader is not None else []
        rest: dict[str, Any] = {"training": capture(self.probe, [*self.restart.loaders, *own])}
        rest["pending"] = self.evidence.pending._asdict()
        rest["sweep"] = before
        rest["updates"] = self.updates.state_dict()
        rest["loader"] = None
        # accelerate's wrapper has the methods whether or not the loader in it does
        if loader is not None and hasattr(getattr(loader, "base_dataloader", loader), "load_state_dict"):
            rest["loader"] = loader.state_dict()
        averages = self._averages.state_dict() if self._averages is not None else None
        rest["recording"] = {
            "references": self._references.state_dict(),
            "averages": averages,
        }
        facts = {
            "position": position,
            "digests": self.evidence.state(),
            "buckets": buckets(self.layout.replicas),
        }
        if self._rows is not None:
            self._rows.flush()  # so that they reach as far as the checkpoint, whatever comes
        self._checkpoints.submit(self.steps, rest, facts)
        self._due.taken(self.steps)
        self._overdue = False

    def _seal(self, status: str) -> None:
        self._close_stream()
        references = self._references.names if status == "complete" else []
        self.manifest["updates"] = self.updates.described(self.steps)
        sealing.seal(self._run, "record", status=status, manifest=self.manifest, references=references)
        self.ranks.said_by_first("sealed", status)

    def _write(self, block: Block) -> None:
        assert self._stream is not None
        prints = self.evidence.assemble(block.integers, block.host_integers)
        steps = np.hstack([block.host_floats, block.floats])
        self._stream.append({STEPS: steps, **{f"{FINGERPRINTS}/{name}": v for name, v in prints.items()}})

    def _take(self, name: str, weights: dict[str, Tensor] | None = None) -> None:
        assert self.probe is not None
        self._references.take(name, self.probe.parameters if weights is None else weights, self.steps)

    def _versions(self) -> list[tuple[int, int]]:
        assert self.probe is not None
        return [(p._version, p.data_ptr()) for p in map(local, self.probe.parameters.values())]

    def _moved(self) -> bool:
        return self._versions() != self._marks
