"""Pass 1: train as the script does, and keep what a replay needs: fingerprints, references, environment."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomprobe import checkpoint, sealing
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.observation import Observation
from geomprobe.rows import Block, Rows
from geomprobe.run import Run
from geomprobe.tensors import to_numpy
from geomprobe.trace.reference import write_reference
from geomprobe.trace.schema import FINAL, FINGERPRINTS, RECORD_SCHEMA, STEPS
from geomprobe.trace.writer import PartWriter, Table, WriteFailed

REFERENCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Recording(Observation):
    """Records a run into a run directory.

    Args:
        run: where to.
        manifest: what is known of the environment before the script runs.
        reference_steps: steps t whose weights ``w_t`` are kept as the reference ``step-t``.
    """

    def __init__(self, run: Run, manifest: dict[str, Any], reference_steps: Collection[int] = ()) -> None:
        super().__init__(manifest)
        self._run = run
        self._reference_steps = frozenset(reference_steps)
        self._references: dict[str, None] = {}  # in the order they were first taken
        self._writer: PartWriter | None = None
        self._rows: Rows | None = None
        self._final: dict[str, Tensor] | None = None
        self._marks: list[tuple[int, int]] = []

    @property
    def steps(self) -> int:
        """Updates seen so far."""
        return 0 if self.probe is None else self.probe.step

    def begin(self) -> None:
        assert self.probe is not None
        with self._lasting():
            checkpoint.save(self._run.checkpoints, self.probe)

    def open(self) -> None:
        assert self.probe is not None
        layout = self.evidence.layout
        tables = [Table(STEPS, ("epoch", "loss", "lr"), "float64")]
        tables += [Table(f"{FINGERPRINTS}/{name}", columns, "int64") for name, columns in layout.items()]
        self._writer = PartWriter(
            self._run.part("record", 0),
            schema=RECORD_SCHEMA,
            tables=tables,
            attributes=self.part_attributes(),
        )
        self._rows = Rows(self.evidence.device, 2, self.evidence.device_columns, self._write)

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

    def weights_will_change(self) -> None:
        # The script may load its best checkpoint when training is over; w_T is what the last step left.
        if self.probe is not None and self.probe.step and self._final is None and not self._moved():
            self._final = {name: p.detach().clone() for name, p in self.probe.parameters.items()}

    def reference(self, name: str) -> None:
        if name == FINAL or not REFERENCE_NAME.fullmatch(name):
            raise UsageError(
                f"probe.reference({name!r}): a reference's name is made of letters, digits, '.', '_' and '-', "
                f"and {FINAL!r} is the final iterate, which is always kept. Choose another name."
            )
        with self._lasting():
            self._take(name)

    def complete(self) -> None:
        """The script has ended well: keep ``w_T`` and seal the record.

        Raises:
            UnsupportedTraining: no optimizer stepped, or something moved the weights after the last step.
            Exception: what stopped the pass earlier, where the script caught it and went on.
        """
        with self._lasting():
            self._require_whole_updates()
            self._keep_final()
            self._seal("complete")

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
        missed = sorted(t for t in self._reference_steps if f"step-{t}" not in self._references)
        if missed:
            self.manifest["missed_reference_steps"] = missed

    def fail(self) -> None:
        """The script has failed: seal what was recorded, without references, as ``failed``."""
        if self._writer is None:
            self._run.clear_stream()  # references of a run without a step
        elif isinstance(self.failure, WriteFailed) or sealing.planned(self._run, "record"):
            self.close()
        else:
            self._seal("failed")

    def close(self) -> None:
        if self._rows is not None:
            rows, self._rows = self._rows, None
            rows.flush()
        if self._writer is not None:
            self._writer.close()

    def _seal(self, status: str) -> None:
        Recording.close(self)
        references = list(self._references) if status == "complete" else []
        sealing.seal(self._run, "record", status=status, manifest=self.manifest, references=references)

    def _write(self, block: Block) -> None:
        assert self._writer is not None
        prints = self.evidence.assemble(block.integers, block.host_integers)
        steps = np.hstack([block.host_floats, block.floats])
        self._writer.append({STEPS: steps, **{f"{FINGERPRINTS}/{name}": v for name, v in prints.items()}})

    def _take(self, name: str, weights: dict[str, Tensor] | None = None) -> None:
        assert self.probe is not None
        source = self.probe.parameters if weights is None else weights
        arrays = {parameter: to_numpy(tensor) for parameter, tensor in source.items()}
        write_reference(self._run.stored_reference(name), arrays)
        self._references[name] = None

    def _versions(self) -> list[tuple[int, int]]:
        assert self.probe is not None
        return [(p._version, p.data_ptr()) for p in self.probe.parameters.values()]

    def _moved(self) -> bool:
        return self._versions() != self._marks
