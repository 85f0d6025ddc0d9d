"""The measurement of a replay with its columns by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.layout import Layout
from geomprobe.measure.held_out import HeldOutGradients
from geomprobe.measure.measurement import Measurement as Unnamed
from geomprobe.measure.options import MeasureOptions
from geomprobe.probe.probe import Probe
from geomprobe.trace.record import Record
from geomprobe.trace.schema import FINAL


class Measurement:
    """`geomprobe.measure.measurement.Measurement` and the gradients beside the step's own, with rows by name."""

    def __init__(self, probe: Probe, options: MeasureOptions, layout: Layout) -> None:
        self._own = Unnamed(probe, options, layout)
        self._held_out = HeldOutGradients(probe, options, layout)
        self.entered, self.fetched, self.backward = self._own.entered, self._own.fetched, self._own.backward
        self.clipping, self.clipping_missed = self._own.clipping, self._own.clipping_missed
        self.skipped, self.dropped, self.sharpness_of = (
            self._own.skipped,
            self._own.dropped,
            self._own.sharpness_of,
        )
        self.curvature_found = self._own.curvature_found

    def open(self, references: Mapping[str, Mapping[str, Tensor]], record: Record, seed: int) -> None:
        self._own.open(references)
        self._held_out.open(references[FINAL], record, seed)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        return {"measured": tuple(self._own.columns), "held out": tuple(self._held_out.columns)}

    def row(
        self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None, means: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        widths = [mean.numel() for mean in means.values()]
        row = self._own.row(gradients, grad_scale, torch.cat(list(means.values())))
        *averaged, measured = row.split([*widths, row.numel() - sum(widths)])
        held_out = self._held_out.row().to(row.device)
        return {**dict(zip(means, averaged, strict=True)), "measured": measured, "held out": held_out}
