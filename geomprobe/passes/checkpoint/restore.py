"""Brings a training to where a checkpoint was taken of it, and puts the checkpoint back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from geomprobe.distributed.layout import Layout
from geomprobe.errors import RunError
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.ddp_buckets import Aside, WarmUp, require_buckets
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.checkpoint.training_state import restore, restore_streams, streams
from geomprobe.probe.loops import Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.environment import training_manifest
from geomprobe.reproducibility.environment_check import FIRST_STEP_SECTIONS, require_same, require_same_kind
from geomprobe.reproducibility.fingerprint import Pending, StepFingerprint


class Restore:
    """What a pass needs to go on in the middle of a run, and to take checkpoints that allow it.

    Args:
        resumption: where to go on, or None for the start of the run.

    Attributes:
        goal: where the script's loops have to get to before the checkpoint is put back; None once they are there.
        loaders: those made before the loops, in an order that every process of the run shares.
        sweep: the loader that is looped over, and the random streams before its iterator was made.
    """

    def __init__(self, resumption: ResumePoint | None) -> None:
        self._resumption = resumption
        self.goal = resumption.position if resumption is not None else None
        self.loaders: list[DataLoader[Any]] = []
        self.sweep: tuple[Any, dict[str, Any]] | None = None

    def iterating(self, loader: Any, position: Position | None) -> int:
        """A loop over a loader begins; gives how many of its batches to skip."""
        if position is None or self.goal is None:
            self.sweep = (loader, streams([loader])) if position is not None else None
            return 0
        rest = self._stored
        restore_streams([loader], rest["sweep"])
        self.sweep = loader, rest["sweep"]
        if rest["loader"] is None:
            return self.goal.batch
        loader.load_state_dict(rest["loader"])
        return 0

    def put_back(
        self, probe: Probe, evidence: StepFingerprint, layout: Layout, ignoring: Aside
    ) -> dict[str, Any]:
        """The goal is reached: put the state back, and hold it to the digests that were taken of it.

        Args:
            probe: of the training.
            evidence: its digests.
            layout: how it is spread.
            ignoring: entered for backward passes that are not the training's.

        Returns:
            What the checkpoint holds that is no tensor.

        Raises:
            RunError: the training is not the one that the checkpoint is of.
        """
        assert self._resumption is not None
        rest = self._stored
        del self._stored
        own = [self.sweep[0]] if self.sweep is not None else []
        restore(probe, [*self.loaders, *own], rest["training"])
        evidence.go_on_from(Pending(**rest["pending"]))
        probe.step = self._resumption.step
        self.goal = None
        found, then = evidence.state(), self._resumption.digests or {}
        for component, digests in found.items():
            if digests != then.get(component):
                names = evidence.layout[component][-len(digests) :]
                pairs = zip(names, digests, then.get(component, []), strict=False)
                name = next((name for name, a, b in pairs if a != b), "the number of entries")
                raise RunError(
                    f"{self._resumption.checkpoint} was put back, but the {component} ({name}) is not what it was. "
                    "Build the model, optimizer and attached objects as they were built when the run began."
                )
        WarmUp(layout.replicas, probe.step, functools.partial(_aside, evidence, ignoring))
        return rest

    def require_same_sums(self, layout: Layout) -> None:
        """Hold the order of sums over the processes, which the first backward pass has settled, to the run's.

        Raises:
            RunError: it is another.
        """
        if self._resumption is not None and self._resumption.buckets:
            require_buckets(self._resumption.buckets, layout.replicas)

    def manifest(
        self, probe: Probe, loader: DataLoader[Any] | None, across: dict[str, Any]
    ) -> dict[str, Any]:
        """What is known of the training at its first update here, as the run's first update had it.

        Args:
            probe: on the training.
            loader: the one that gave the update's batch, if one did.
            across: sections on how it lies across processes.

        Raises:
            EnvironmentMismatch: it is another training than the one that the checkpoint is of.
        """
        found = training_manifest(probe.model, probe.optimizer, probe.parameters, loader) | across
        if self._resumption is None or self._resumption.checkpoint is None:
            return found
        # The learning rate moves on, and the loader that gives the first batch may be another one.
        before, what = self._resumption.manifest, self._resumption.checkpoint
        require_same(before, found, ("flags", "model", "ranks"), what, "go on")
        require_same_kind(before["optimizer"], found["optimizer"], what)
        return found | {name: before[name] for name in FIRST_STEP_SECTIONS if name in before}

    def require_goal(self) -> None:
        """Refuse a step, or the end, before the goal is reached.

        Raises:
            RunError: it is not.
        """
        if self.goal is not None:
            raise RunError(
                f"the script takes a step, or ends, before its loop over epochs is back at epoch {self.goal.epoch}, "
                "where the checkpoint was taken. Take all steps inside `for epoch in probe.epochs(n)`, with the same "
                "n, and the batches from probe.batches(loader). As it is, this run can only be made anew, with --force."
            )

    @functools.cached_property
    def _stored(self) -> dict[str, Any]:
        assert self._resumption is not None
        assert self._resumption.checkpoint is not None
        return checkpoint.read(self._resumption.checkpoint)


@contextlib.contextmanager
def _aside(evidence: StepFingerprint, ignoring: Aside) -> Iterator[None]:
    """What runs in here is not the training's."""
    pending = evidence.pending
    with ignoring():
        yield
    evidence.go_on_from(pending)
