"""Bring a training to where a checkpoint was taken of it, and put the checkpoint back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from geomprobe.distributed.manifest import across_ranks
from geomprobe.errors import RunError
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.passes.checkpoint.ddp_buckets import WarmUp, require_buckets
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.checkpoint.training_state import capture, restore, restore_streams, streams
from geomprobe.probe.events import Events
from geomprobe.probe.loops import TOP, Position
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.environment import (
    FIRST_STEP_SECTIONS,
    require_same,
    require_same_kind,
    training_manifest,
)
from geomprobe.reproducibility.fingerprint import StepFingerprint

if TYPE_CHECKING:
    from geomprobe.passes.session import Session

TRAINING = "training"  # the entry of a checkpoint's contents for the state of the script's own training


class Resumer(Events):
    """Takes a pass to the middle of a run, and knows what a checkpoint needs so that another process can do so.

    The session's `goal` is where the script's loops have to get to, and ``point`` where the pass continues.

    Attributes:
        position: where the script's loops stand between two steps; None before the first time.
    """

    name = "loops"

    def __init__(self, session: Session, probe: Probe, fingerprint: StepFingerprint, point: ResumePoint | None) -> None:
        self._session, self._probe, self._fingerprint = session, probe, fingerprint
        self._point = point or ResumePoint({})
        # Its loader, and the random streams before its iterator was made.
        self._begun_loop: tuple[Any, dict[str, Any]] | None = None
        self._first = True
        self.position: Position | None = None

    @property
    def loops_over_batches(self) -> bool:
        """Whether the script's loops are known, down to the batches: then each place between two steps is reported."""
        return self._begun_loop is not None and self._probe.loops.named

    def iterating(self, loader: Any, position: Position | None) -> int:
        """A loop over a loader begins, at a position if it may take steps; gives how many of its batches to skip."""
        goal = self._session.goal
        if position is None or goal is None:
            self._begun_loop = (loader, streams([loader])) if position is not None else None
            return 0
        assert self._point.checkpoint is not None
        with checkpoint.nonsense_named(self._point.checkpoint):
            then = self._stored[self.name]
            restore_streams([loader], then["streams"])
            self._begun_loop = loader, then["streams"]
        if then["loader"] is None:
            return goal.batch
        loader.load_state_dict(then["loader"])
        return 0

    def between_steps(self, position: Position) -> None:
        self.position = position

    def goal_reached(self) -> None:
        """Put the state back, and compare it with the digests that were taken of it.

        Raises:
            RunError: the training is not the one that the checkpoint is of.
        """
        contents, step = self._stored, self._point.step
        del self._stored
        assert self._point.checkpoint is not None
        with checkpoint.nonsense_named(self._point.checkpoint):
            restore(self._probe, self._loaders(self._begun_loop), contents[TRAINING])
            self._session.load_state_dict(contents)
            self._probe.resume_from(step)
            self._session.goal = None
            different = self._fingerprint.differs_from(self._point.digests or {})
        if different is not None:
            raise RunError(
                f"{self._point.checkpoint} was put back, but the {different[0]} ({different[1]}) is not what it was. "
                "Build the model, optimizer and attached objects as they were built when the run began."
            )
        WarmUp(self._session.layout.replicas, step)

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        """Complete the manifest at the first update here, as the run's first update had it, and open the files.

        Raises:
            RunError: a step comes before the loops are where the checkpoint was taken, or sums over the processes would
                come in another order.
            EnvironmentMismatch: it is another training than the one that the checkpoint is of.
        """
        if not self._first:
            return
        self._require_goal()
        self._first = False
        session, probe, point = self._session, self._probe, self._point
        across = across_ranks(probe.model, probe.parameters, session.layout, session.ranks)
        found = training_manifest(probe.model, probe.optimizers, probe.parameters, session.passes.loader) | across
        if point.checkpoint is not None:
            # The learning rate changes over time, and the loader that gives the first batch may be another one.
            require_same(point.manifest, found, ("flags", "model", "ranks"), point.checkpoint, "go on")
            require_same_kind(point.manifest["optimizer"], found["optimizer"], point.checkpoint)
            found |= {name: point.manifest[name] for name in FIRST_STEP_SECTIONS if name in point.manifest}
        session.manifest |= found
        if point.buckets:
            require_buckets(point.buckets, session.layout.replicas)
        session.first_update()

    def complete(self) -> None:
        self._require_goal()

    def capture(self) -> dict[str, Any]:
        """The training's own state, between two steps."""
        return {TRAINING: capture(self._probe, self._loaders(self._loop()))}

    def state_dict(self) -> dict[str, Any]:
        """What `iterating` needs before all else is put back: the streams before the loop's iterator was made."""
        loop = self._loop()
        if loop is None:
            return {"streams": None, "loader": None}
        loader, before = loop
        # accelerate's wrapper has the methods whether or not the loader in it does
        own = hasattr(getattr(loader, "base_dataloader", loader), "load_state_dict")
        return {"streams": before, "loader": loader.state_dict() if own else None}

    def _loop(self) -> tuple[Any, dict[str, Any]] | None:
        """The loop over batches that the script stands in the middle of."""
        return None if self.position is None or self.position.sweep == TOP else self._begun_loop

    def _loaders(self, loop: tuple[Any, dict[str, Any]] | None) -> list[Any]:
        return [*self._session.passes.made, *([loop[0]] if loop is not None else [])]

    def _require_goal(self) -> None:
        if (goal := self._session.goal) is not None:
            raise RunError(
                f"the script takes a step, or ends, before its loop over epochs is back at epoch {goal.epoch}, "
                "where the checkpoint was taken. Take all steps inside `for epoch in probe.epochs(n)`, with the same "
                "n, and the batches from probe.batches(loader). As it is, this run can only start over, with --force."
            )

    @functools.cached_property
    def _stored(self) -> dict[str, Any]:
        assert self._point.checkpoint is not None  # there is a goal only where there is a checkpoint
        return checkpoint.read(self._point.checkpoint)
