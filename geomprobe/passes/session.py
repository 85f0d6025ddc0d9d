"""What both passes do at the probe's events: gather a step's evidence, and know the run at its first step."""

from __future__ import annotations

import contextlib
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from geomprobe.distributed.layout import Layout
from geomprobe.distributed.manifest import across_ranks
from geomprobe.distributed.ranks import Ranks
from geomprobe.distributed.step_barrier import StepBarrier
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.measure.curvature.global_loss import without_gradients
from geomprobe.passes.checkpoint.restore import Restore
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.passes.param_groups import described
from geomprobe.probe.hooks.grad_scaler import tag_scaled
from geomprobe.probe.hooks.step_calls import Args, Kwargs, given_closure, nested_step, replace_closure
from geomprobe.probe.loader_passes import LoaderPasses
from geomprobe.probe.loops import Position
from geomprobe.probe.model_discovery import ModelDiscovery, refuse_another
from geomprobe.probe.probe import Probe
from geomprobe.probe.step_attempts import StepAttempts
from geomprobe.reproducibility.fingerprint import StepFingerprint

Closure = Callable[[], Tensor]


class Session(ABC):
    """One pass over a run, at the events of the probe and of what is seen around it.

    Attributes:
        probe: the attached probe, or None before there is one.
        manifest: what is known of the environment; the first step completes it.
        failure: what stopped the pass; raised again at each event and at the end, for scripts that swallow it.
        updates: the steps that the script attempts.
        resumption: where the pass goes on; None at the start of the run.
        restart: brings the training there.
        stop_asked: whether the pass is to stop where it can go on later.
    """

    def __init__(
        self, manifest: dict[str, Any], ranks: Ranks | None = None, resumption: ResumePoint | None = None
    ) -> None:
        self.manifest = manifest
        self.ranks = Ranks() if ranks is None else ranks
        self.layout = Layout()
        self.resumption = resumption
        self.restart = Restore(resumption)
        self.stop_asked = False
        self._meeting = StepBarrier(self.ranks, "stop")
        self._begun = self._opened = False
        self.evidence = StepFingerprint()
        self.updates = StepAttempts()
        self.probe: Probe | None = None
        self.failure: BaseException | None = None
        self._begun_steps = 0  # begun, whether or not the optimizer finished them
        self._called = ModelDiscovery()
        self._sources = LoaderPasses()
        self._names_its_losses = False
        self._in_backward = False
        self._factor: Tensor | None = None

    @property
    def goal(self) -> Position | None:
        """Where the script's loops have to get to before training goes on, or None."""
        return self.restart.goal

    @property
    def steps(self) -> int:
        """Updates seen so far."""
        return 0 if self.probe is None else self.probe.step

    # Events of the probe

    def attached(self, probe: Probe) -> None:
        if self.probe is not None:
            raise UsageError(
                f"attach was called twice in one run: first on {described(self.probe.optimizer)}, then on "
                f"{described(probe.optimizer)}. One run measures one optimizer; record them as two runs."
            )
        self.probe = probe
        self.layout = Layout.of(probe.model, probe.parameters)
        self.ranks.require_all(self.layout.world_size)
        self.evidence.bind(probe)
        self.updates.bind(probe)

    def begin(self) -> None:
        """Training is about to start: weights, buffers and RNG are still the initial ones."""
        self._begun = True

    def iterating(self, loader: Any, position: Position | None) -> int:
        """A loop over a loader begins; gives how many of its batches to skip."""
        with self._lasting():
            return self.restart.iterating(loader, position)

    def between_steps(self, position: Position) -> None:
        """The script's loops stand at a position between two steps."""
        with self._lasting():
            if self.goal is None:
                self.boundary(position)
            elif position == self.goal:
                assert self.probe is not None
                rest = self.restart.put_back(self.probe, self.evidence, self.layout)
                self._begun_steps = self.probe.step
                self.updates.load_state_dict(rest["updates"])
                self.restored(rest)

    def fetching(self) -> None:
        self._stop_if_failed()
        self.evidence.fetching()

    def fetch_ended(self, came: bool) -> None:
        self.evidence.fetch_ended(came)

    def fetched(self, batch: Any) -> None:
        self.evidence.fetched(batch)

    def entered(self, inputs: Any) -> None:
        self.evidence.entered(inputs)

    def backward(self, loss: Tensor, *, closure: Closure | None = None, **options: Any) -> None:
        if not self._names_its_losses:
            self._names_its_losses = True
            self.gradients_dropped()
        self._note_loss(loss)
        plain = all(option is None or option is False for option in options.values())
        with self._ignoring_backward():
            self.differentiate(loss, closure, functools.partial(loss.backward, **options), plain)

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        assert self.probe is not None
        with self._lasting():
            self.restart.require_goal()
            self._require_whole_updates()
            self.probe.require_same_parameters()
            if not self._opened:
                self._opened = True
                across = across_ranks(self.probe.model, self.probe.parameters, self.layout, self.ranks)
                self.manifest |= self.restart.manifest(self.probe, self._sources.loader, across)
                self.restart.require_same_sums(self.layout)
                self.open()
            if (reason := self._sources.stepped(self.probe.epoch)) is not None:
                self.cannot_go_on(reason)
            self.measure(gradients, grad_scale)
            self._begun_steps += 1

    def after_update(self) -> None:
        with self._lasting():
            self.updated()

    def weights_will_change(self) -> None:
        """Something other than the optimizer may be about to change the weights."""

    def reference(self, name: str, if_lower: float | None = None) -> None:
        """The script asks for its present weights to be kept."""

    def sharpness_of(self, closure: Closure) -> None:
        """The script names the loss whose sharpness is wanted."""

    def detached(self) -> None:
        self.weights_will_change()

    # What is seen around the probe

    def backward_called(self, losses: Sequence[Tensor], run: Callable[[], None], plain: bool) -> None:
        """``torch.autograd.backward`` is called by something other than the probe; ``run`` does it."""
        if self._names_its_losses or self._in_backward:
            run()
            return
        for loss in losses:
            self._note_loss(loss)
        with self._ignoring_backward():
            self.differentiate(losses[0], None, run, plain and len(losses) == 1)

    def loss_scaled(self, factor: Tensor) -> None:
        """A GradScaler has scaled a loss; the next backward pass is of it, or of what was made of it."""
        self._factor = factor
        self.updates.loss_scaled(factor)

    def gradients_dropped(self) -> None:
        self.evidence.gradients_dropped()

    def loader_made(self, loader: DataLoader[Any]) -> None:
        if not self._begun:
            self.restart.loaders.append(loader)

    def loader_iterated(self, loader: DataLoader[Any], iterator: Iterator[Any]) -> None:
        self._sources.begun(loader, iterator)

    def batch_came(self, iterator: Iterator[Any]) -> None:
        if torch.is_grad_enabled():  # evaluation is not part of the step
            self._sources.gave(iterator)

    def optimizer_stepping(
        self, optimizer: Optimizer, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """An optimizer is about to step; may return the call to make instead, as torch's own hooks do."""
        if nested_step(optimizer):
            return None
        with self._lasting():
            if self.probe is None:
                closure = given_closure(args, kwargs)
                if closure is not None and not self._called.of(optimizer):
                    return replace_closure(args, kwargs, self._attaching(optimizer, closure))
                self._attach_to(optimizer)
            elif optimizer is not self.probe.optimizer:
                refuse_another(self.probe, optimizer)
        return None

    def module_entered(self, module: nn.Module, inputs: Any) -> bool:
        """A module is called from outside any other; returns whether to be told of the next one."""
        if self.probe is not None:
            if any(module is one for one in self._called.several):
                self.entered(inputs)
            return bool(self._called.several) or self.probe.calls.met(module, inputs)
        self._called.add(module)
        self.evidence.entered(inputs)
        return True

    # What a pass adds

    def boundary(self, position: Position) -> None:
        """The script stands between two steps, where a checkpoint can be taken, or a segment ends."""

    def cannot_go_on(self, reason: str) -> None:
        """This training turns out not to be one that another process can go on with from its middle."""

    def restored(self, rest: dict[str, Any]) -> None:
        """A checkpoint has been put back; ``rest`` holds what is no tensor."""

    @abstractmethod
    def open(self) -> None:
        """The first update is about to happen, and the manifest is complete."""

    def differentiate(
        self, loss: Tensor, closure: Closure | None, run: Callable[[], None], plain: bool
    ) -> None:
        """Run the backward pass of a loss; a pass may do it in its own way, to the same bits."""
        run()

    @abstractmethod
    def measure(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        """An update is about to happen."""

    @abstractmethod
    def updated(self) -> None:
        """The optimizer has moved the weights."""

    # Shared by the passes

    @property
    def epoch(self) -> float:
        """The current epoch: named by the script, else passes over a loader that led to steps, else NaN."""
        assert self.probe is not None
        if self.probe.epoch is not None:
            return self.probe.epoch
        return self._sources.epoch

    def part_attributes(self) -> dict[str, Any]:
        """What a part says of the run that it is streamed from."""
        return {
            "manifest": json.dumps(self.manifest),
            "num_parameters": self.manifest["model"]["num_parameters"],
        }

    @contextlib.contextmanager
    def _ignoring_backward(self) -> Iterator[None]:
        before, self._in_backward = self._in_backward, True
        try:
            yield
        finally:
            self._in_backward = before

    def stopping(self) -> bool:
        """Whether the pass is to stop here, between two steps; all processes of the run stop at the same place."""
        if self.stop_asked:
            self._meeting.call()
        return self._meeting.due(self.steps)

    def _note_loss(self, loss: Tensor) -> None:
        if self.probe is not None and without_gradients(self.probe.parameters.values(), self.probe.model):
            self.gradients_dropped()  # a step that was skipped left losses, but no gradients
        if self._factor is not None:
            tag_scaled(loss, self._factor)
            self._factor = None
        self.evidence.loss_seen(loss)

    def _stop_if_failed(self) -> None:
        self.ranks.stop_if_another_failed()
        if self.failure is not None:
            raise self.failure

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        """What is raised in here ends the pass, even where the script catches it and goes on."""
        self._stop_if_failed()
        try:
            yield
        except BaseException as error:
            self.failure = error
            raise

    def _require_whole_updates(self) -> None:
        if self.probe is not None and self._begun_steps != self.probe.step:
            name = type(self.probe.optimizer).__name__
            raise UnsupportedTraining(
                f"{name}.step raised in step {self.probe.step}, and the script went on. What that step did to the "
                "weights is not known, so no later one can be measured. Mend what raised, or let it end the script."
            )

    def _attach_to(self, optimizer: Optimizer) -> None:
        Probe(self._called.trained_by(optimizer), optimizer, {}, self)

    def _attaching(self, optimizer: Optimizer, closure: Closure) -> Closure:
        """The first closure, for a script that calls its model in there: only then is the model known."""

        def attach_and_measure() -> Tensor:
            loss = closure()
            with self._lasting():
                if self.probe is None:
                    self._attach_to(optimizer)
                assert self.probe is not None
                self.probe.update_due()
            return loss

        return attach_and_measure
