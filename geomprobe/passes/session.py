"""A pass over a training: the probe and the hooks report to it, and it passes their events on to its listeners.

`geomprobe.passes.recording` and `geomprobe.passes.replaying` each make a session with a list of listeners of their own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from geomprobe.distributed.dtensor import is_dtensor
from geomprobe.distributed.layout import Layout
from geomprobe.distributed.ranks import Ranks
from geomprobe.distributed.step_barrier import StopRequest
from geomprobe.errors import Stopped, UnsupportedTraining, UsageError
from geomprobe.measure.curvature.global_loss import without_gradients
from geomprobe.measure.gradient_sources import GradientSources
from geomprobe.passes.checkpoint.restore import Resumer
from geomprobe.passes.checkpoint.resume_point import ResumePoint
from geomprobe.probe.events import Closure, Events, Observer, Weight
from geomprobe.probe.hooks.global_hooks import listening
from geomprobe.probe.hooks.step_calls import Args, Kwargs, given_closure, nested_step, replace_closure
from geomprobe.probe.listeners import LoaderPasses, LossTracker, StepAttempts, StepProgress, UpdateChecks
from geomprobe.probe.loops import Position
from geomprobe.probe.parameters import ModelDiscovery, described, refuse_another
from geomprobe.probe.paths import OptimizerPaths
from geomprobe.probe.probe import Probe
from geomprobe.reproducibility.fingerprint import StepFingerprint, StepInputs
from geomprobe.reproducibility.refused import explained

# At these the pass raises what it failed with, again and again, for a script that catches errors and continues.
_STOPPING = {"begin", "fetching", "between_steps", "before_update", "after_update", "reference"}


class Session(Observer):
    """One pass over a run.

    It passes each event on to the listeners that override it, in the order of their list. What a listener raises ends
    the pass, even where the script catches it and continues.

    Args:
        manifest: what is known of the environment; completed at the first update.
        ranks: the processes of the run.
        point: where to continue a pass; None for the start of the run.
        make: gives the pass's own listeners, once the probe is attached.
        without_steps: gives what to raise where the script ends without a probe.
        chosen: which optimizer of a script without `attach` to measure; see `RecordOptions.optimizer`.

    Attributes:
        listeners: all of them; those that come before the pass's own see the events before the probe is attached, too.
        passes, losses, sources, inputs, updates: those of them that others ask.
        probe: the attached probe; None before there is one.
        layout: how the training is spread over processes.
        failure: what ended the pass.
        stop: whether the pass is to stop where another process can continue it.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        ranks: Ranks,
        point: ResumePoint | None,
        make: Callable[[Session, Probe, StepFingerprint, Resumer], list[Events]],
        without_steps: Callable[[], Exception],
        chosen: str | None = None,
    ) -> None:
        self.manifest, self.ranks, self.layout = manifest, ranks, Layout()
        self.point = point
        self.goal = None if point is None else point.position
        self.stop = StopRequest(ranks)
        self.probe: Probe | None = None
        self.failure: BaseException | None = None
        self.passes, self.losses, self.inputs = LoaderPasses(), LossTracker(), StepInputs()
        self.sources = GradientSources(self.losses, self._without_gradients)
        self.updates = StepAttempts(self)
        self.listeners: list[Events] = [self.passes, self.losses, self.sources, self.inputs, self.updates]
        if not ranks.alone:
            self.listeners.insert(0, StepProgress(ranks.progress))
        self._make, self._without_steps = make, without_steps
        self._resumer: Resumer | None = None
        self._models, self._chosen, self._listed = ModelDiscovery(), chosen, ""
        self._paths = OptimizerPaths(self._models, chosen)
        self._in_backward = False
        self._methods: dict[str, list[Callable[..., None]]] = {}
        self._call: dict[str, Callable[..., None]] = {}
        self._connect()

    @property
    def steps(self) -> int:
        """Updates so far."""
        return 0 if self.probe is None else self.probe.step

    # What the probe and the hooks ask

    def attached(self, probe: Probe) -> None:
        if self.probe is not None:
            raise UsageError(
                f"attach was called twice in one run: first on {described(self.probe.optimizer)}, then on "
                f"{described(probe.optimizer)}. One run measures one path: call "
                "attach(model, [first, second]) where both train one model, or record two runs."
            )
        if probe.explicit and self._chosen is not None:
            raise UsageError(
                f"--optimizer {self._chosen} was given, and the script says by attach what is measured. Leave one out."
            )
        if len(probe.optimizers) > 1 and any(map(is_dtensor, probe.parameters.values())):
            raise UnsupportedTraining(
                "Several optimizers step a model whose parameters FSDP2 spreads over the processes: which loss each of "
                "them follows is not known there. Use one optimizer, or a model that is whole on each process."
            )
        self.probe, self.layout = probe, Layout.of(probe.model, probe.parameters)
        self.ranks.require_all(self.layout.world_size)
        fingerprint = StepFingerprint(probe, self.inputs, self.losses)
        self._resumer = Resumer(self, probe, fingerprint, self.point)
        self._call["attached"](probe)
        own = self._make(self, probe, fingerprint, self._resumer)
        self.listeners += [UpdateChecks(probe), self._resumer, *own]
        self._connect()

    def iterating(self, loader: Any, position: Position | None) -> int:
        with self._errors_end_the_pass():
            return 0 if self._resumer is None else self._resumer.iterating(loader, position)

    def between_steps(self, position: Position) -> None:
        if self.goal is None:
            self._call["between_steps"](position)
        elif position == self.goal:
            self.stop_if_failed()
            self._call["goal_reached"]()
            self._call["restored"]()

    def backward(
        self,
        losses: Sequence[Tensor],
        run: Callable[[], None],
        plain: bool,
        closure: Closure | None = None,
        weights: Sequence[Weight] | None = None,
    ) -> None:
        if self._in_backward:
            run()
            return
        if self.losses.values and self.probe and self._without_gradients():
            self.gradients_dropped()  # a step that was skipped left losses, but no gradients
        self.losses_seen(losses)
        self._in_backward = True
        try:
            with self.sources.backward_pass(losses, weights or [None] * len(losses)):
                self._differentiate(losses[0], closure, run, plain and len(losses) == 1)
        finally:
            self._in_backward = False

    def optimizer_made(self, optimizer: Optimizer) -> None:
        self._paths.add(optimizer)

    def zeroed(self, optimizer: Optimizer) -> None:
        probe = self.probe
        if probe is None or (self._is_measured(optimizer) and self.sources.none_beside(optimizer)):
            self.gradients_dropped()

    def optimizer_stepping(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        measured = self._is_measured(optimizer)
        if (measured and not self._in_backward) or nested_step(optimizer):
            return None
        with self._errors_end_the_pass():
            if measured:
                self._refuse_within_backward()
                return None
            if self._chosen is not None:
                self._paths.stepping(optimizer)
            if self.probe is not None:
                chosen = self.probe.explicit or self._chosen is not None
                refuse_another(self.probe, optimizer, chosen, self._listed)
                return None
            if not self._paths.is_chosen(optimizer):
                self._listed = self._listed or self._paths.listed()
                return None
            closure = given_closure(args, kwargs)
            if closure is not None and not self._models.of(optimizer):
                return replace_closure(args, kwargs, self._attaching(optimizer, closure))
            self._attach(optimizer)
        return None

    def module_entered(self, module: nn.Module, inputs: Any) -> bool:
        if self.probe is not None:
            if any(module is one for one in self._models.several):
                self.entered(inputs)
            if not (seen := self._models.several) and self.probe.calls.is_part(module):
                self.part_entered()
            return bool(seen) or self.probe.calls.met(module, inputs)
        self._models.add(module)
        self.entered(inputs)
        return True

    def step_hook_registered(self, optimizer: Optimizer) -> None:
        if self.probe is not None and self._is_measured(optimizer):
            self.probe.hook.keep_order()

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """The state of each listener that has one, by the listener's name."""
        return {each.name: each.state_dict() for each in self.listeners if each.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back the state of each listener that is here; a replay has not all that a recording has."""
        for each in self.listeners:
            if each.name in state:
                each.load_state_dict(state[each.name])

    # The pass from outside

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Let `attach` find this pass, and the hooks report to it, while inside.

        May be entered again and again; `complete` ends the pass. An error ends it too; what the pass itself had found
        is raised in its place.
        """
        try:
            with listening(self), self.stop.by_sigterm():
                yield
        except Exception as error:
            if self.stop.asked:  # the queue has signaled the loader's workers too, and they are gone
                self.close()
                raise Stopped from error
            try:
                self.fail(self.failure)
            except Exception as found:
                raise found from error
            if self.failure not in (None, error):
                raise self.failure from error  # the script failed because the pass had stopped, or differed
            if self.manifest["strict"] and "use_deterministic_algorithms(True)" in str(error):
                told = explained(error, None if self.probe is None else self.probe.model)
                raise UnsupportedTraining(
                    f"{error} {told} The recording is strict about that: replace the operation (all of them are in "
                    "docs/cuda.md), or record with `geomprobe record --no-strict` (strict=False in Python), and the "
                    "replay will show whether it came out the same."
                ) from error
            raise
        except BaseException:  # interrupted: what is written stays as an unfinished pass
            self.close()
            raise

    def complete(self) -> None:
        """End the pass after the script has ended well, inside `reporting`.

        Raises:
            UnsupportedTraining: no optimizer stepped, or what it left is not what a recording needs.
            ReplayDiverged: a replay was not the same run.
            Exception: what ended the pass earlier, where the script caught it and continued.
        """
        with self._errors_end_the_pass():
            if self.probe is None and self._listed:
                raise UsageError(f"--optimizer {self._chosen} is true of no optimizer that stepped.{self._listed}")
            if self.probe is None:
                raise self._without_steps()
            if "paths" in self.manifest:
                self.manifest["paths"]["stepped"] = self._paths.stepped
            self._call["complete"]()

    def fail(self, failure: BaseException | None) -> None:
        self._end("fail", failure)

    def close(self) -> None:
        self._end("close")

    def stop_if_failed(self) -> None:
        """Raise what has ended the pass, here or on another process."""
        if not self.ranks.alone:
            self.ranks.stop_if_another_failed()
        if self.failure is not None:
            raise self.failure

    def _is_measured(self, optimizer: Optimizer) -> bool:
        return self.probe is not None and any(optimizer is each for each in self.probe.optimizers)

    def _refuse_within_backward(self) -> None:
        """An optimizer steps while a backward pass runs: of one optimizer all gradients may be there, of several not.

        Raises:
            UnsupportedTraining: there are several.
        """
        if self.probe is not None and len(self.probe.optimizers) > 1:
            raise UnsupportedTraining(
                f"Two optimizers step in this run, and one of them within a backward pass (at step {self.probe.step}), "
                "so the weights move while gradients are taken at them. Call the optimizers' steps after backward, or "
                "put all parameters into one optimizer's groups."
            )

    def _without_gradients(self) -> bool:
        probe = self.probe
        return probe is not None and without_gradients(probe.parameters.values(), probe.model)

    # The loop over the listeners

    def _connect(self) -> None:
        """Find which listeners override which event, once for all steps."""
        for name in (name for name, each in vars(Events).items() if callable(each) and name[0] != "_"):
            of_none = getattr(Events, name)
            methods = [getattr(each, name) for each in self.listeners if getattr(type(each), name) is not of_none]
            self._methods[name] = methods
            self._call[name] = self._passing_on(methods, name in _STOPPING)
            if name not in vars(Session) and (methods or name in _STOPPING):
                setattr(self, name, self._call[name])
        self._differentiate = (self._methods["differentiate"] or [super().differentiate])[0]

    def _passing_on(self, methods: Sequence[Callable[..., None]], stopping: bool) -> Callable[..., None]:
        alone = self.ranks.alone

        def event(*arguments: Any) -> None:
            if stopping and (self.failure is not None or not alone):
                self.stop_if_failed()
            try:
                for method in methods:
                    method(*arguments)
            except BaseException as error:
                self.failure = error
                raise

        return event

    def _end(self, name: str, *arguments: Any) -> None:
        """Let every listener end, whatever another one raises; then raise the first error."""
        errors = []
        for method in self._methods[name]:
            try:
                method(*arguments)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    @contextlib.contextmanager
    def _errors_end_the_pass(self) -> Iterator[None]:
        """What is raised in here ends the pass, even where the script catches it and continues."""
        self.stop_if_failed()
        try:
            yield
        except BaseException as error:
            self.failure = error
            raise

    # A script without `attach`

    def _attach(self, optimizer: Optimizer) -> Probe:
        self._listed = self._paths.listed()
        optimizers = self._paths.of(optimizer)
        if self._chosen is not None:
            self.manifest["paths"] = self._paths.described(optimizers)
        probe = Probe(self._models.trained_by(optimizers), optimizers, {}, self)
        if self._in_backward:
            self._refuse_within_backward()
        return probe

    def _attaching(self, optimizer: Optimizer, closure: Closure) -> Closure:
        """The first closure, for a script that calls its model in there: only then is the model known."""

        def attach_and_measure() -> Tensor:
            loss = closure()
            with self._errors_end_the_pass():
                probe = self._attach(optimizer) if self.probe is None else self.probe
                probe.hook.update_due()
            return loss

        return attach_and_measure


def part_attributes(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of each part of a pass."""
    return {"manifest": json.dumps(manifest), "num_parameters": manifest["model"]["num_parameters"]}
