"""The weights that a recording keeps to measure against: which, from which step, and the same on every process."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import UsageError
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import FINAL, REFERENCE_NAME
from geomprobe.trace.weights import write_reference


class KeptReferences:
    """References of one recording, in the order in which they were first taken.

    ``run`` is where this process keeps them until they are sealed; where weights are ``sharded``, each process keeps a
    shard of its own, and else rank 0 keeps all.

    >>> kept = KeptReferences(RunFolder("runs/a"), Ranks(), sharded=False)
    >>> [kept.is_lowest("best", loss) for loss in (0.5, 0.7, 0.4)]
    [True, False, True]
    """

    def __init__(self, run: RunFolder, ranks: Ranks, sharded: bool) -> None:
        self._run, self._ranks = run, ranks
        self._steps: dict[str, int] = {}  # before which each was taken last
        self._lowest: dict[str, float] = {}  # of those that are the best so far
        self._asked = 0
        self._sharded = sharded

    def __contains__(self, name: str) -> bool:
        return name in self._steps

    @property
    def names(self) -> list[str]:
        return list(self._steps)

    def require_free(self, name: str, averages: Collection[str]) -> None:
        """Refuse a name that the script cannot give to a reference.

        Raises:
            UsageError: it is not one.
        """
        if name == FINAL or not REFERENCE_NAME.fullmatch(name):
            raise UsageError(
                f"probe.reference({name!r}): a reference's name is made of letters, digits, '.', '_' and '-', "
                f"and {FINAL!r} is the final iterate, which is always kept. Choose another name."
            )
        if name in averages:
            raise UsageError(
                f"probe.reference({name!r}): this recording keeps an average of the weights by that name. "
                "Choose another."
            )

    def is_lowest(self, name: str, value: float) -> bool:
        """Whether a value is lower than all before it; where weights are sharded, whether rank 0's is."""
        lower = value < self._lowest.get(name, float("inf"))
        if lower:
            self._lowest[name] = value
        if not self._sharded:
            return lower
        # Each rank may have a value of its own, and all have to keep their shards of the same weights.
        self._asked += 1
        taken: bool = self._ranks.broadcast(f"{name} is lowest/{self._asked}", lower)
        return taken

    def take(self, name: str, weights: Mapping[str, Tensor], step: int) -> None:
        """Keep weights, by parameter, as they are before ``step``; they replace earlier ones by that name.

        Raises:
            WriteFailed: the disk refused.
        """
        if self._ranks.first or self._sharded:
            arrays = {parameter: _to_numpy(local(tensor)) for parameter, tensor in weights.items()}
            write_reference(self._run.stored_reference(name), arrays)
        self._steps[name] = step

    def drop_chimeras(self) -> list[str]:
        """Drop references whose shards the processes took before different steps, or some not at all; gives names.

        Every process must call this.
        """
        if not self._sharded:
            return []
        found = self._ranks.all_gather("references", self._steps)
        chimeras = [name for name, step in found[0].items() if any(of.get(name) != step for of in found)]
        self._steps = {name: step for name, step in self._steps.items() if name not in chimeras}
        if chimeras and self._ranks.first:
            print(
                f"geomprobe: no reference {', '.join(chimeras)} is kept: the weights are sharded, and the ranks did "
                "not all call probe.reference before the same step. Call it on every rank.",
                file=sys.stderr,
            )
        return chimeras

    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self._steps), "lowest": dict(self._lowest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._lowest = state["steps"], state["lowest"]


def _to_numpy(tensor: Tensor) -> tuple[NDArray[Any], str]:
    """The tensor's values on the host, and torch's name of their dtype; bit for bit, for dtypes that NumPy lacks too.

    These (bfloat16, the 8-bit floats) come as unsigned integers of their size.
    """
    host = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if hasattr(np, name):
        return host.numpy(), name
    return host.view({1: torch.uint8, 2: torch.uint16}[tensor.element_size()]).numpy(), name
