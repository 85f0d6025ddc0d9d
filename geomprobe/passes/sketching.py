"""The sketch of a step, as part of its row in the record: see `geomprobe.trace.projection` for what it is.

With ``--sketch-every N`` a sketch is taken at each N-th step, and written in N equal parts: one in that step's row and
one in each of the rows that follow. So each row holds as many numbers, and the file grows as evenly as N is large.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.distributed.dtensor import local_gradient
from geomprobe.kernels.sketch import Projector, numbered
from geomprobe.passes.options import RecordOptions
from geomprobe.passes.session import Session
from geomprobe.probe.events import Events
from geomprobe.probe.hooks.global_hooks import muted
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.columns import Columns
from geomprobe.trace.schema import SKETCH


class StepSketch(Events):
    """Sketches the weights and the gradient of the steps that are due.

    `RecordWriter` asks it for each row, before the optimizer moves the weights. Where the weights are replicated, rank
    0 alone keeps a sketch. Where they are sharded, each rank keeps that of its own shard, and the reader adds them up,
    so that a step exchanges nothing.

    Attributes:
        columns: of a row; none where another rank keeps the sketch.
    """

    name = SKETCH

    def __init__(self, session: Session, probe: Probe, options: RecordOptions) -> None:
        self._session, self._probe, self._every, size = session, probe, options.sketch_every, options.sketch
        self._parameters: list[Tensor] = list(probe.parameters.values())
        self._projector = Projector(size, self._parameters[0].device)
        self._width = -(-2 * size // self._every)
        self._parts = torch.zeros(self._every, self._width, dtype=torch.float64, device=self._parameters[0].device)
        layout = session.layout
        self._keeps = layout.sharded or session.ranks.first
        names = tuple(map(str, range(self._width)))
        self.columns = [Columns(SKETCH, SKETCH, names, "float64", True)] if self._keeps else []

    def begin(self) -> None:
        if self._session.ranks.first:
            print(
                f"geomprobe: the sketch adds {8 * self._width:,} bytes a step"
                f"{' and rank' if self._session.layout.sharded else ''} to the record: {self._projector.size} numbers "
                "of the weights and as many of the gradient, in float64"
                f"{f', of one step in {self._every}' if self._every > 1 else ''}.",
                file=sys.stderr,
            )

    def first_update(self) -> None:
        self._session.manifest["sketch"] = {
            "size": self._projector.size,
            "every": self._every,
            "seed": self._projector.seed,
            "sharded": self._session.layout.sharded,
            "shapes": [list(parameter.shape) for parameter in self._parameters],
        }

    def row(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> dict[str, Tensor]:
        """This step's part, by the name of its columns: of its own sketch, or of that of the last step that was due."""
        place = self._probe.step % self._every
        if place == 0:
            with muted():
                self._take(gradients, grad_scale)
        return {SKETCH: self._parts[place]} if self._keeps else {}

    def state_dict(self) -> dict[str, Any]:
        return {"parts": self._parts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._parts = state["parts"].to(self._parts.device)

    @torch.no_grad()
    def _take(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        if self._session.layout.kind in ("FSDP2", "DTensor"):  # on every rank: it may exchange
            pairs = zip(gradients, self._parameters, strict=True)
            gradients = [local_gradient(gradient, parameter) for gradient, parameter in pairs]
        if not self._keeps:
            return
        owned = self._session.layout.owned
        weights = self._projector(numbered(self._parameters, self._parameters, owned))
        gradient = self._projector(numbered(gradients, self._parameters, owned))
        if grad_scale is not None:
            gradient = gradient / grad_scale.double()
        flat = torch.cat([weights, gradient])
        self._parts = torch.nn.functional.pad(flat, (0, self._parts.numel() - len(flat))).view(self._parts.shape)
