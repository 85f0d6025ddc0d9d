"""The weights that a recording keeps to measure against: which, from which step, and the same on every process."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import UsageError
from geomprobe.passes.references.raw_arrays import to_numpy
from geomprobe.trace.run_folder import RunFolder
from geomprobe.trace.schema import FINAL, REFERENCE_NAME
from geomprobe.trace.weights import write_reference


class KeptReferences:
    """References of one recording, in the order in which they were first taken.

    Args:
        run: where this process keeps them until they are sealed.
        ranks: the processes of the run.

    Attributes:
        sharded: whether each process keeps a shard of its own; replicated weights are kept once.

    >>> kept = KeptReferences(RunFolder("runs/a"), Ranks())
    >>> [kept.is_lowest("best", loss) for loss in (0.5, 0.7, 0.4)]
    [True, False, True]
    """

    def __init__(self, run: RunFolder, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        self._steps: dict[str, int] = {}  # before which each was taken last
        self._lowest: dict[str, float] = {}  # of those that are the best so far
        self._asked = 0
        self.sharded = False

    def __contains__(self, name: str) -> bool:
        return name in self._steps

    @property
    def names(self) -> list[str]:
        """Of all that were taken."""
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
        if not self.sharded:
            return lower
        # Each rank may have a value of its own, and all have to keep their shards of the same weights.
        self._asked += 1
        taken: bool = self._ranks.broadcast(f"{name} is lowest/{self._asked}", lower)
        return taken

    def take(self, name: str, weights: Mapping[str, Tensor], step: int) -> None:
        """Keep weights, replacing earlier ones by that name.

        Args:
            name: of the reference.
            weights: by parameter.
            step: the next one.

        Raises:
            WriteFailed: the disk refused.
        """
        if self._ranks.first or self.sharded:
            arrays = {parameter: to_numpy(local(tensor)) for parameter, tensor in weights.items()}
            write_reference(self._run.stored_reference(name), arrays)
        self._steps[name] = step

    def drop_chimeras(self) -> list[str]:
        """Forget references whose shards the processes took before different steps, or some not at all; say so once.

        Every process must call this.

        Returns:
            Their names.
        """
        if not self.sharded:
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
        """What a checkpoint keeps."""
        return {"steps": dict(self._steps), "lowest": dict(self._lowest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._steps, self._lowest = state["steps"], state["lowest"]
