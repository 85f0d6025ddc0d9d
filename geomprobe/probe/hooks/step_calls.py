"""Calls of ``Optimizer.step``: the hook that sees each gradient before it is used, closures, and nested calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from geomprobe.errors import UnsupportedTraining
from geomprobe.probe.evidence import Mark, marks
from geomprobe.probe.hooks.global_hooks import muted

if TYPE_CHECKING:
    from geomprobe.probe.events import Observer
    from geomprobe.probe.probe import Probe

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_STEP = Optimizer.profile_hook_step(lambda: None).__code__  # of what torch wraps around every `step`


def nested_step(optimizer: Optimizer) -> bool:
    """Whether the running step of ``optimizer``, whose hook asks, is a part of another step of it.

    torch calls the hooks of a subclass's ``step`` and once more those of the parent's that it calls.

    >>> nested_step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    False
    """
    return _running_steps(optimizer) > 1


def _running_steps(optimizer: Optimizer) -> int:
    """How many calls of an optimizer's ``step`` are running, one in another."""
    calls = 0
    frame = inspect.currentframe()
    while frame is not None:
        calls += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return calls


def given_closure(args: Args, kwargs: Kwargs) -> Callable[[], Any] | None:
    """The closure in a call of ``Optimizer.step``, whose first argument is the optimizer."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def replace_closure(args: Args, kwargs: Kwargs, closure: Callable[[], Any]) -> tuple[Args, Kwargs]:
    """The same call with another closure."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


class StepHook:
    """The hooks on the optimizers' ``step``: they show a pass each gradient before it is used, and count the steps.

    The script's own hooks on the step may change anything. So these run after the script's before a step; after it,
    one runs before the script's, when the rates are those of the step, and one after them, when the weights are final.

    Args:
        probe: whose optimizers.
        observer: the pass.
        begin: called before anything else.

    Attributes:
        begun: updates that were begun, whether or not their optimizer has finished them.
    """

    def __init__(self, probe: Probe, observer: Observer, begin: Callable[[], None]) -> None:
        self._probe, self._observer, self._begin = probe, observer, begin
        self.begun = 0
        self._measured = self._skipped = False
        self._marks: list[Mark] = []  # of the weights where a step began, or of these and the gradients as measured
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        for optimizer in probe.optimizers:
            if _calls_parent(type(optimizer)):
                _show_parents_steps(type(optimizer))
            with muted():
                self._handles[optimizer] = [
                    optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
                    optimizer.register_step_post_hook(torch.compiler.disable(self._stepped)),
                    optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
                ]
        self.keep_order()

    def keep_order(self) -> None:
        """Put the hooks where they belong; the script has put one of its own beside them."""
        optimizer: Any  # torch declares these ordered dictionaries as plain ones
        for optimizer, handles in self._handles.items():
            before, first, last = (handle.id for handle in handles)
            optimizer._optimizer_step_pre_hooks.move_to_end(before)
            optimizer._optimizer_step_post_hooks.move_to_end(first, last=False)
            optimizer._optimizer_step_post_hooks.move_to_end(last)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            for handle in self._handles.popitem()[1]:
                handle.remove()

    def update_due(self) -> None:
        """A closure was evaluated: the present gradients are the step's.

        Raises:
            UnsupportedTraining: it was evaluated for the second time in one step, or at other weights than the step's.
        """
        name, step = type(self._probe.optimizer).__name__, self._probe.step
        if self._measured:
            raise UnsupportedTraining(
                f"{name} evaluated its closure twice in step {step}: which of the gradients is the step's is not "
                "defined. Use an optimizer that evaluates it once."
            )
        if self._marks and self._marks != self._now():
            raise UnsupportedTraining(
                f"{name} evaluated its closure at other weights than those that step {step} starts from, so gradient "
                "and distance would be of different weights. Move the weights and call backward outside of the "
                "optimizer's step, and give it no closure."
            )
        self._begin()
        self._measure()

    def _before_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if nested_step(optimizer):
            if self._measured and not self._skipped:
                self._in_parent()
            return None
        self._moves(optimizer)
        self._begin()
        self._measured = False
        closure = given_closure(args, kwargs)
        if closure is None:
            self._measure()
            return None
        self._marks = self._now()

        def measured_closure() -> Any:
            # Lightning runs forward and backward in here, so only now is there a gradient to look at.
            loss = closure()
            torch.compiler.disable(self.update_due)()
            return loss

        return replace_closure(args, kwargs, measured_closure)

    def _moves(self, optimizer: Optimizer) -> None:
        """An optimizer's step has begun.

        Raises:
            UnsupportedTraining: it is a part of another one's step.
        """
        probe = self._probe
        if len(probe.optimizers) == 1:
            return
        for other in probe.optimizers:
            if other is not optimizer and _running_steps(other):
                raise UnsupportedTraining(
                    f"{type(optimizer).__name__}.step was called within {type(other).__name__}.step (at step "
                    f"{probe.step}), so the two are one update, and have no rows of their own. Call geomprobe.attach "
                    "without the outer one."
                )
        probe.moving = next(i for i, each in enumerate(probe.optimizers) if each is optimizer)

    def _in_parent(self) -> None:
        """A subclass's step calls its parent's: what it has made of the gradients by now is what the update uses.

        Raises:
            UnsupportedTraining: it has changed the weights too.
        """
        self._observer.parent_stepping()
        before, self._marks = self._marks, []  # a second call begins where the first has moved the weights
        now = self._now(gradients=True)
        count = len(self._probe.parameters)
        if not before or before[count:] == now[count:]:
            return
        if before[:count] != now[:count]:
            name = type(self._probe.optimizer).__name__
            raise UnsupportedTraining(
                f"{name}.step changed the weights and the gradients before it called its parent's, in step "
                f"{self._probe.step}: which gradient belongs to which weights is not defined. Change the gradients "
                "before the weights, or call backward outside of the step."
            )
        self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        optimizer = self._probe.optimizer
        # A fused optimizer under a GradScaler is called on overflow too, and skips on its own. Asking costs
        # one synchronization, the same that the scaler itself pays with every other optimizer.
        overflow = getattr(optimizer, "found_inf", None)
        if self._measured:  # for the second time
            self.begun = self._probe.step
        self._measured = True
        self._skipped = overflow is not None and bool(overflow.item())
        if not self._skipped:
            probe = self._probe
            gradients = [
                p.grad if moves else None for p, moves in zip(probe.parameters.values(), probe.moves, strict=True)
            ]
            self._observer.before_update(gradients, getattr(optimizer, "grad_scale", None))
            self.begun += 1
        if _calls_parent(type(optimizer)):
            self._marks = self._now(gradients=True)

    def _now(self, gradients: bool = False) -> list[Mark]:
        parameters = list(self._probe.parameters.values())
        return marks(parameters) + (marks([p.grad for p in parameters]) if gradients else [])

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if self._measured and not self._skipped and not nested_step(optimizer):
            self._observer.updated()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._measured and not self._skipped and not nested_step(optimizer):
            self._probe.step += 1
            self._marks = []
            self._observer.after_update()


def _calls_parent(optimizer: type[Any]) -> bool:
    """Whether a class of optimizers has a ``step`` of its own over one that torch's hooks know too."""
    return sum("step" in vars(each) for each in optimizer.__mro__ if each is not Optimizer) > 1


def _show_parents_steps(optimizer: type[Any]) -> None:
    """Let the steps of the parent classes call hooks too, as torch does where an object of such a class is made."""
    classes: tuple[Any, ...] = optimizer.__mro__
    for each in classes:
        if "step" in vars(each) and each is not Optimizer and not getattr(each.step, "hooked", False):
            each.step = Optimizer.profile_hook_step(each.step)
            each.step.hooked = True
