"""The probe: what a training loop calls, and the optimizer hook that sees each gradient before it is used.

A probe knows nothing of files. It turns what happens in the loop into `geomprobe.probe.events`, which it reports to
the running pass; where no pass is running, `attach` returns a probe that only does what the loop asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from geomprobe.errors import UsageError
from geomprobe.probe.events import Observer, observing
from geomprobe.probe.hooks.global_hooks import ModelCalls
from geomprobe.probe.hooks.step_calls import StepHook
from geomprobe.probe.inert import InertProbe, LocalHook
from geomprobe.probe.loops import Loops
from geomprobe.probe.parameters import holds, measured_parameters, raw

Item = TypeVar("Item")


class Oracle(NamedTuple):
    """A loss whose gradient a script wants measured beside the step's own; see `Probe.held_out`."""

    loss: Callable[..., Tensor]
    loader: DataLoader[Any] | None


def attach(model: nn.Module | None, optimizer: Optimizer | Sequence[Optimizer], **stateful: Any) -> Probe | InertProbe:
    """Put a probe on a training loop.

    Under ``geomprobe record`` and ``replay`` (or `geomprobe.two_pass`) the probe reports to the running
    pass; otherwise it is inert, at no measurable cost, so the line can stay in the script for good.

    Args:
        model: the module that is trained; its parameters' names and its buffers are what a trace shows.
        optimizer: the raw optimizer. A wrapper that holds it as ``.optimizer`` (accelerate) is unwrapped. Several that
            step the model in turn, as ``[muon, adamw]``, make one path: a row is one update by any of them, G is the
            gradient that it takes on its own parameters and 0 for all others, and the column ``steps/optimizer`` says
            which one moves, by its place in the list.
        **stateful: further objects with ``state_dict`` and ``load_state_dict``, such as
            ``scheduler=scheduler, scaler=scaler``. ``None`` values are ignored.

    Returns:
        A handle: ``.remove()`` takes it off, and it is a context manager.

    Raises:
        UsageError: for an object without ``state_dict``, an optimizer that is in the list twice, or a second probe in
            one run.
        UnsupportedTraining: for LBFGS, complex parameters, or an optimizer with nothing to train.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> probe = attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> [epoch for epoch in probe.epochs(2)]
    [0, 1]
    """
    for name, thing in stateful.items():
        if thing is not None and not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise UsageError(
                f"attach(..., {name}={type(thing).__name__}): it has no state_dict and load_state_dict, "
                "so its state can be neither kept nor compared. Pass an object that has both, or leave it out."
            )
    observer = observing()
    if observer is None:
        return InertProbe()
    optimizers = [raw(each) for each in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
    if len(set(optimizers)) < len(optimizers):
        raise UsageError("attach(model, [...]): an optimizer is in the list twice. Name each of them once.")
    given = {name: thing for name, thing in stateful.items() if thing is not None}
    return Probe(model, optimizers, given, observer, explicit=True)


class Probe:
    """A probe on one model and its optimizers, reporting to a pass. Made by `attach`.

    Attributes:
        model: the trained module, or None where a script without `attach` never called one.
        optimizers: the raw optimizers; nearly always one.
        moving: which of them moves the weights now, or did so last; the first one before any step.
        parameters: the measured parameters by name: those of all optimizers, each once.
        calls: those of the model.
        hook: on the optimizers' steps.
        step: number of updates so far.
        loops: the script's loops over epochs and batches.
        oracles: the gradients that the script names beside the step's own.
        explicit: whether the script asked for it by `attach`.
    """

    active = True

    def __init__(
        self,
        model: nn.Module | None,
        optimizers: Sequence[Optimizer],
        stateful: Mapping[str, Any],
        observer: Observer,
        explicit: bool = False,
    ) -> None:
        self.explicit = explicit
        self.model = model
        self.optimizers, self.moving = list(optimizers), 0
        self.stateful = dict(stateful)
        self.parameters = measured_parameters(model, *optimizers)
        self._moves = [holds(each, self.parameters.values()) for each in optimizers]
        self.oracles: dict[str, Oracle] = {}
        self.step = 0
        self.loops = Loops(observer)
        self._observer = observer
        self._begun = self._removed = False
        observer.attached(self)
        self.hook = StepHook(self, observer, self._begin)
        self._loads = None if model is None else model.register_load_state_dict_pre_hook(LocalHook(self._loading))
        self.calls = ModelCalls(model, self._entered)

    @property
    def optimizer(self) -> Optimizer:
        """The one of the optimizers that moves the weights now, or did so last."""
        return self.optimizers[self.moving]

    @property
    def moves(self) -> list[bool]:
        """For each of the parameters, whether `optimizer` holds it."""
        return self._moves[self.moving]

    @property
    def epoch(self) -> float | None:
        """The current epoch; None while unknown, NaN where it is not clear. A framework that has the loop sets it."""
        loops = self.loops
        counted = loops.counted and not loops.named
        return math.nan if counted and loops.depth != 1 else loops.epoch

    @epoch.setter
    def epoch(self, number: float) -> None:
        self.loops.epoch = number

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every parameter of the model, and of the optimizer where the model lacks it."""
        found: dict[str, Tensor] = dict(self.model.named_parameters()) if self.model is not None else {}
        known = {id(weight) for weight in found.values()}
        return found | {name: p for name, p in self.parameters.items() if id(p) not in known}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers, those that ``state_dict`` leaves out among them."""
        return dict(self.model.named_buffers()) if self.model is not None else {}

    # What the loop calls

    def epochs(self, count: int) -> Iterator[int]:
        """Iterate over epochs ``0 .. count-1``, so that the trace knows them and the terminal shows them.

        Args:
            count: number of epochs.
        """
        self._begin()
        yield from self.loops.epochs(count)

    def batches(self, loader: Iterable[Item]) -> Iterator[Item]:
        """Iterate over ``loader``, fingerprinting each batch as it comes.

        Args:
            loader: any iterable of batches: tensors, or nested tuples, mappings and strings.
        """
        self._begin()
        loops, first_step = self.loops, self.step
        if loops.epoch is None:
            loops.epoch, loops.counted = 0, True
        loops.depth += 1
        try:
            yield from loops.batches(loader, _length(loader))
        finally:  # of a break, too
            loops.depth -= 1
            if loops.counted and not loops.named and self.step > first_step:  # an evaluation loop is no epoch
                loops.epoch += 1 if not loops.depth else math.nan

    def fetched(self, batch: Any) -> None:
        """Fingerprint a batch that came by another way than :meth:`batches`: from a framework's loop.

        Args:
            batch: as for :meth:`batches`.
        """
        self._begin()
        self._observer.fetched(batch)

    def backward(self, loss: Tensor, closure: Callable[[], Tensor] | None = None, **options: Any) -> None:
        """``loss.backward(**options)``, letting the pass see the loss.

        Args:
            loss: the step's scalar loss, or its part under accumulation; scaled by a GradScaler or not.
            closure: evaluates the loss of this very minibatch again, for models whose training kernels have
                no second derivative.
            **options: as for :meth:`torch.Tensor.backward`.
        """
        plain = all(option is None or option is False for option in options.values())
        run = functools.partial(loss.backward, **options)
        self._observer.backward([loss], run, plain, closure=closure, weights=[options.get("gradient")])

    def reference(self, name: str, if_lower: float | None = None) -> None:
        """Keep the weights as they are now as the reference ``name``, replacing an earlier one.

        Args:
            name: letters, digits, ``-``, ``_`` and ``.``; ``final`` is taken by the final iterate.
            if_lower: only where this is lower than at every call before, as a validation loss is at the best iterate;
                geomprobe remembers the lowest across a resumption.
        """
        self._observer.reference(name, if_lower)

    def sharpness_of(self, closure: Callable[[], Tensor]) -> None:
        """Take ``replay --sharpness-every``'s eigenvalue of a fixed loss instead of each minibatch's.

        Args:
            closure: evaluates that loss, such as the model's on one batch kept for it.
        """
        self._observer.sharpness_of(closure)

    def held_out(self, loss: Callable[..., Tensor], loader: DataLoader[Any] | None = None) -> None:
        """Name the minibatches of ``replay --held-out-every``, which the updates do not use.

        Args:
            loss: of a batch, its mean over the samples; without ``loader`` it takes nothing, and draws its own.
            loader: each time another batch is drawn from its data set, by a random stream that belongs to the step.
        """
        self.oracles["held_out"] = Oracle(loss, loader)

    def full_gradient_of(self, loss: Callable[..., Tensor], loader: DataLoader[Any] | None = None) -> None:
        """Name the loss of ``replay --full-gradient-every``.

        Args:
            loss: of a batch, its mean over the samples; without ``loader`` it takes nothing and is the whole loss.
            loader: all samples of its data set, in batches of its size.
        """
        self.oracles["full_gradient"] = Oracle(loss, loader)

    def remove(self) -> None:
        """Take the hooks off; the pass ends with the steps seen so far."""
        if self._removed:
            return
        self._removed = True
        self.hook.remove()
        self.calls.remove()
        if self._loads is not None:
            self._loads.remove()
        self._observer.detached()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # What a pass and the hooks call

    def resume_from(self, step: int) -> None:
        """The state before ``step`` was put back: count on from there."""
        self.step = self.hook.begun = step

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._observer.begin()

    def _entered(self, inputs: Any) -> None:
        self._begin()
        self._observer.entered(inputs)

    def _loading(self, *_: Any) -> None:
        self._observer.weights_will_change()


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # iterable data sets have none
        return None
