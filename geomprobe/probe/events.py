"""The events of a training: what the probe and the hooks report, and what the parts of a pass listen to.

Every event comes in the main thread, in the order of the training. One step is `fetching`, `fetch_ended`,
`fetched`, `entered`, `losses_seen`, `before_update`, `updated`, `after_update`, and, where the script's loops are
known, `between_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from geomprobe.probe.hooks.step_calls import Args, Kwargs
    from geomprobe.probe.listeners import StepAttempts
    from geomprobe.probe.loops import Position
    from geomprobe.probe.probe import Probe

Closure = Callable[[], Tensor]
Weight = Tensor | float | None  # of a loss in the sum that a backward pass differentiates; None for 1


class Events:
    """What may happen in a pass. A listener overrides the events that it wants; the others are never called on it.

    Attributes:
        name: under which a checkpoint holds the listener's `state_dict`; empty for a listener without state.
    """

    name = ""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this listener: plain containers, numbers, strings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, in a process that resumes the run."""

    # Around the training

    def attached(self, probe: Probe) -> None:
        """A probe was put on the training, by the script's `attach` or at the first step of a script without it."""

    def begin(self) -> None:
        """The probe sees the first event of training: weights, buffers and random streams are the initial ones."""

    def goal_reached(self) -> None:
        """The loops of a resumed script stand where the checkpoint was taken; its state is put back now."""

    def restored(self) -> None:
        """All state of a checkpoint was put back; training continues from here."""

    def between_steps(self, position: Position) -> None:
        """The script's loops stand between two steps: a checkpoint can be taken, or a segment ends."""

    def weights_will_change(self) -> None:
        """Something other than the optimizer may be about to change the weights, such as ``load_state_dict``."""

    def detached(self) -> None:
        """The script has removed the probe."""

    # The batch of a step

    def loader_made(self, loader: DataLoader[Any]) -> None:
        """The script has made a DataLoader."""

    def loader_iterated(self, loader: DataLoader[Any], iterator: Iterator[Any]) -> None:
        """A pass over a DataLoader begins."""

    def fetching(self) -> None:
        """A loader is about to be asked for a batch, or for its iterator, which draws random numbers too."""

    def batch_came(self, iterator: Iterator[Any]) -> None:
        """The iterator of a DataLoader has given a batch."""

    def loader_ended(self, iterator: Iterator[Any]) -> None:
        """The iterator of a DataLoader has no batch any more."""

    def fetch_ended(self, came: bool) -> None:
        """A loader has given a batch, or was at its end."""

    def fetched(self, batch: Any) -> None:
        """``probe.batches`` or ``probe.fetched`` has a batch."""

    # From the batch to the gradients

    def entered(self, inputs: Any) -> None:
        """The trained model is about to run, with gradients, on ``inputs``."""

    def part_entered(self) -> None:
        """A part of the trained model is about to run by itself, with gradients."""

    def loss_scaled(self, factor: Tensor) -> None:
        """A GradScaler has scaled a loss; the next backward pass is of it, or of what was made of it."""

    def losses_seen(self, losses: Sequence[Tensor]) -> None:
        """A backward pass of the training is about to run on ``losses``."""

    def differentiate(self, loss: Tensor, closure: Closure | None, run: Callable[[], None], plain: bool) -> None:
        """Run a backward pass. At most one listener of a pass overrides this, and has to come to the same bits.

        Args:
            loss: what it is called on.
            closure: evaluates the same loss again, if the script gave one.
            run: the backward pass as the script asked for it.
            plain: whether that is ``loss.backward()``, without options.
        """
        run()

    def saved_otherwise(self) -> None:
        """The script has put hooks of its own on the tensors that autograd saves for the backward pass."""

    def gradient_changed(self, tensor: Tensor | None) -> None:
        """A hook has changed a gradient within a backward pass: that of ``tensor``, if that is still there."""

    def gradients_dropped(self) -> None:
        """The gradients so far are thrown away: the script calls ``zero_grad``, or has set them to None."""

    def before_clipping(self, factor: Tensor | None) -> None:
        """The gradients, which a GradScaler has multiplied by ``factor``, are about to be clipped."""

    def rescaling(self, tensors: Sequence[Tensor] | None) -> None:
        """A function of torch is about to clip or unscale gradients.

        Args:
            tensors: whose gradients it multiplies by one number; None for all, and empty where each value is clipped.
        """

    def rescaled(self) -> None:
        """It has done so."""

    def step_skipped(self) -> None:
        """A GradScaler's step left the weights alone, since a gradient has overflowed."""

    # The update

    def first_update(self) -> None:
        """The first update of this process is about to happen, and the manifest is complete: files are opened."""

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        """The optimizer is about to move the weights. Comes without gradients enabled.

        Args:
            gradients: one a parameter, as the optimizer has them.
            grad_scale: what they are multiplied by, under a GradScaler with a fused optimizer.
        """

    def parent_stepping(self) -> None:
        """The step of a subclass of optimizers calls its parent's."""

    def updated(self) -> None:
        """The optimizer has moved the weights; the script's own hooks on the step have not run."""

    def after_update(self) -> None:
        """The update is over, with the script's own hooks on it; ``probe.step`` is the next step already."""

    # What the script asks for

    def reference(self, name: str, if_lower: float | None = None) -> None:
        """``probe.reference``: keep the present weights."""

    def sharpness_of(self, closure: Closure) -> None:
        """``probe.sharpness_of``: the loss whose sharpness is wanted."""

    # The end

    def complete(self) -> None:
        """The script has ended well."""

    def fail(self, failure: BaseException | None) -> None:
        """The script, or the pass, has failed.

        Args:
            failure: what a listener of the pass has raised, if one did.
        """

    def close(self) -> None:
        """The pass was interrupted: what is written stays as it is, for another process to resume."""


class Observer(Events):
    """What the probe and the hooks report to: the events, and what they ask a pass for. See `Session`.

    Attributes:
        goal: where a resumed script's loops have to get to before training continues; None once they are there.
        updates: sees the steps that a GradScaler attempts, and the clipping of gradients.
    """

    goal: Position | None = None
    updates: StepAttempts

    def iterating(self, loader: Any, position: Position | None) -> int:
        """A loop of the script over a loader begins; gives how many of its batches to skip."""
        return 0

    def backward(
        self,
        losses: Sequence[Tensor],
        run: Callable[[], None],
        plain: bool,
        closure: Closure | None = None,
        weights: Sequence[Weight] | None = None,
    ) -> None:
        """Run a backward pass of the script.

        Args:
            losses: what it is called on.
            run: does it, as the script asked for it.
            plain: whether without options.
            closure: evaluates the same loss again, if the script gave one.
            weights: of the losses in the sum that is differentiated; each is 1 where they are not given.
        """
        run()

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """The script has made an optimizer."""

    def zeroed(self, optimizer: Optimizer) -> None:
        """The script has called ``zero_grad`` of an optimizer."""

    def step_hook_registered(self, optimizer: Optimizer) -> None:
        """The script has put a hook of its own on an optimizer's step."""

    def optimizer_stepping(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Any optimizer is about to step; may return the call to make instead, as torch's own hooks do."""
        return None

    def module_entered(self, module: nn.Module, inputs: Any) -> bool:
        """A module is called from outside any other; returns whether to report the next one."""
        return False


_current: Observer | None = None  # the running pass; a pass sets it for its time, by `observe`


def observe(observer: Observer | None) -> Observer | None:
    """Make ``observer`` the one that `attach` reports to; returns the one before it."""
    global _current
    before, _current = _current, observer
    return before


def observing() -> Observer | None:
    """The running pass, if there is one.

    >>> observing() is None
    True
    """
    return _current
