"""Which backward passes the gradients at an update are made of, and the loss that they are the gradient of.

A script may zero, scale, replace and add up gradients as it likes. Autograd's own accumulation, a GradScaler's
division and torch's functions for clipping are known writers; whatever else writes to a gradient is seen, and the row
of that step then has no loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geomprobe.distributed.dtensor import is_dtensor
from geomprobe.kernels.fused_read import FusedRead, Reading
from geomprobe.kernels.transfer import moved
from geomprobe.probe.events import Events, Weight
from geomprobe.probe.evidence import Mark, marks
from geomprobe.probe.graph import leaves_of
from geomprobe.probe.hooks.global_hooks import unscaled
from geomprobe.probe.hooks.gradient_hooks import watching_hooks
from geomprobe.probe.listeners import LossTracker
from geomprobe.probe.parameters import holds
from geomprobe.probe.probe import Probe
from geomprobe.trace.absence import ABSENCES, CARRIED, NO_SCALAR, UNSEEN, WRITTEN, Absence


@dataclass(eq=False)
class BackwardPass:
    """One backward pass of the script.

    Attributes:
        loss: the scalar that it differentiates, unscaled, float64, copied; None where that is not known.
        unknown: why it is not.
        factor: what a GradScaler has multiplied the loss by; None without one.
        hooked: whether a hook on something between loss and parameters changed gradients.
        reaches: for each parameter, whether the pass added to its gradient.
        share: with what factor its gradient is part of the gradients at the update: 1, or 0 where these were zeroed
            since, or NaN where something else was done to them; known once the update is due.
        earlier: whether another optimizer has moved the weights since.
    """

    loss: Tensor | None
    unknown: Absence | None = None
    reaches: list[bool] = field(default_factory=list)
    factor: Tensor | None = None
    hooked: bool = False
    earlier: bool = False
    _share: Tensor | None = None
    _found: tuple[Tensor, Tensor] | None = None  # whether it is 1, and whether it is 0

    @property
    def share(self) -> Tensor | None:
        if self._share is None and self._found is not None:
            whole, none = (each.double() for each in self._found)
            self._share = whole / (whole + none)  # 1, 0, or 0 / 0
        return self._share

    @share.setter
    def share(self, share: Tensor | None) -> None:
        self._share, self._found = share, None

    def found(self, whole: Tensor, none: Tensor) -> None:
        """Let the share be 1 where it is ``whole``, 0 where there is ``none`` left of it, and else NaN."""
        self._share, self._found = None, (whole, none)


class _Numbers:
    """Constants on the device: to make them there at each step would take a kernel each, or a wait."""

    def __init__(self, device: torch.device) -> None:
        self.zero, self.one, self.nan = moved([0.0, 1.0, torch.nan], device, torch.float64).unbind()
        reasons = GradientSources.REASONS
        only = [[float(of is the_one) for of in reasons] for the_one in (None, UNSEEN, WRITTEN)]
        self.no_reason, self.unseen, self.written = moved(only, device, torch.float64).unbind()


class GradientSources(Events):
    """Follows the gradients of the measured parameters from each backward pass to the update.

    A listener of the pass, from before the probe is attached: until then it follows every leaf of the losses.

    Where several optimizers step the model, an update uses up the gradients of the parameters that it moves. Those of
    the others stay, with the backward passes that made them, until their own optimizer steps.

    Args:
        losses: the losses of the backward passes, as they were before scaling; it sees them first.
        none_left: whether no gradient is left of any earlier backward pass, for parameters that are DTensors, whose
            gradients FSDP2 may hold back.

    Attributes:
        running: the backward pass that is running, or the last one.
    """

    REASONS = (WRITTEN, CARRIED, UNSEEN, NO_SCALAR)
    LONGEST = 64  # how many backward passes may wait for an update by another optimizer
    name = "sources"

    def __init__(self, losses: LossTracker, none_left: Callable[[], bool] = lambda: True) -> None:
        self._losses = losses
        self.running: BackwardPass | None = None
        self._together: list[set[int]] = []  # whose gradients were multiplied by one number, not all of them
        self._none_left = none_left
        self._parameters: list[Tensor] = []
        self._probe: Probe | None = None
        self._kept: tuple[list[BackwardPass], list[Tensor]] = [], []  # of a checkpoint, until it is put back
        self._attached = self._unfollowed = self._several = False
        self._roots: Sequence[Tensor] = ()  # the losses whose backward pass is running
        self._passes: list[BackwardPass] = []
        # After each of these passes, what is left of each gradient before the next one: 1, 0 or NaN. [parameters]
        self._left: list[Tensor] = []
        self._marks: list[Mark] = []
        # Of each gradient, its digest and its squared norm. [parameters]
        self._evidence = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._read: FusedRead | None = None  # for the parameters so far
        self._shapes: list[torch.Size] = []
        self._known_numbers: _Numbers | None = None

    # Events

    def attached(self, probe: Probe) -> None:
        if not self._attached and self._passes:
            self._note_what_is_left()
        self._probe, self._several = probe, len(probe.optimizers) > 1
        measured: list[Tensor] = list(probe.parameters.values())
        places = {id(p): i for i, p in enumerate(self._parameters)}
        order = [places.get(id(p), -1) for p in measured]
        self._parameters, self._attached, self._read = measured, True, None
        self._unfollowed = any(map(is_dtensor, measured))
        for each in self._passes:
            # A measured parameter may be hidden from the walk over the graph, as reentrant checkpointing does.
            reaches = each.reaches
            each.reaches = [p.grad is not None if i < 0 else reaches[i] for p, i in zip(measured, order, strict=True)]
        device = measured[0].device
        if self._left:
            known, places_there = moved([i >= 0 for i in order], device), moved(order, device)
            one = self._numbers.one
            self._left = [torch.where(known, left.to(device, one.dtype)[places_there], one) for left in self._left]
        self._look()

    def gradients_dropped(self) -> None:
        if self._unfollowed:
            self._passes.clear()

    def gradient_changed(self, tensor: Tensor | None) -> None:
        if self.running is not None and self._roots:
            if any(tensor is root for root in self._roots):
                self.running.loss, self.running.unknown = None, WRITTEN
            self.running.hooked = True

    def rescaling(self, tensors: Sequence[Tensor] | None) -> None:
        if tensors is not None:
            self._together.append({id(tensor) for tensor in tensors})
        if self._passes:
            self._note_what_is_left()

    def rescaled(self) -> None:
        self._look()

    def restored(self) -> None:
        self._passes, self._left = self._kept
        self._kept = [], []
        if self._passes:
            self._look()

    def state_dict(self) -> dict[str, Any]:
        if not self._several:
            return {}
        passes = [
            {
                "loss": each.loss,
                "unknown": None if each.unknown is None else each.unknown.number,
                "reaches": list(each.reaches),
                "factor": each.factor,
                "earlier": each.earlier,
            }
            for each in self._passes
        ]
        return {"passes": passes, "left": list(self._left)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self._several:
            return
        known = {absence.number: absence for absence in ABSENCES}
        device = self._parameters[0].device
        passes = [
            BackwardPass(
                None if each["loss"] is None else each["loss"].to(device),
                None if each["unknown"] is None else known[each["unknown"]],
                list(each["reaches"]),
                factor=None if each["factor"] is None else each["factor"].to(device),
                earlier=each["earlier"],
            )
            for each in state["passes"]
        ]
        left = [each.to(device) for each in state["left"]]
        lengths = {len(self._parameters), *map(len, left), *(len(each.reaches) for each in passes)}
        if len(lengths) > 1 or len(left) not in (len(passes), 0):
            raise ValueError("the backward passes in the checkpoint are of another number of parameters")
        self._kept = passes, left

    def after_update(self) -> None:
        self._together.clear()
        # What is in the gradients that the update used belongs to no later step.
        moves = self._moves
        reaches = [moved and p.grad is not None for moved, p in zip(moves, self._parameters, strict=True)]
        used = [BackwardPass(None, CARRIED, reaches)] if any(reaches) else []
        passes, left = self._waiting(moves) if self._several else ([], [])
        self._passes = used + passes
        self._left = [torch.ones_like(left[0])] * len(used) + left if left else []

    @property
    def bent(self) -> bool:
        """Whether a known writer has changed the direction of the gradients that the present update uses."""
        own = {id(p) for p, moved in zip(self._parameters, self._moves, strict=True) if moved}
        beside = self._several
        return any(not own <= each for each in self._together if not (beside and each and own.isdisjoint(each)))

    def of_moving(self, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Vectors, one a parameter, without those of parameters that the present update leaves to other optimizers."""
        return [each if moved else None for each, moved in zip(vectors, self._moves, strict=True)]

    @property
    def found(self) -> bool:
        """Whether a backward pass since the last update has left gradients for the one that is due."""
        return any(not each.earlier and self._reached(each) for each in self._passes)

    @property
    def earlier(self) -> list[Tensor]:
        """The shares, in the gradients of the update that is due, of backward passes from before the last update."""
        passes = (each for each in self._passes if each.earlier and self._reached(each))
        return [each.share for each in passes if each.share is not None]

    def none_beside(self, optimizer: Optimizer) -> bool:
        """Whether no backward pass has left gradients for the parameters that an optimizer does not hold."""
        if not self._several:
            return True
        left = [p.grad is not None for p in self._parameters]
        beside = [there and not own for there, own in zip(left, holds(optimizer, self._parameters), strict=True)]
        return not any(a and b for each in self._passes for a, b in zip(each.reaches, beside, strict=True))

    # Called by the pass around each backward pass of the script, and at the update

    @contextlib.contextmanager
    def backward_pass(self, losses: Sequence[Tensor], weights: Sequence[Weight]) -> Iterator[None]:
        """Around a backward pass of ``losses`` with ``weights``.

        Where it raises, what it left in the gradients is of no known loss.
        """
        self.running = running = self._pass_of(losses, weights)
        if not self._attached:
            self._add_leaves(losses)
        self._begin()
        self._roots = losses
        try:
            with watching_hooks(self._parameters) as changed:
                yield
        except BaseException:
            running.loss, running.unknown = None, WRITTEN
            raise
        finally:
            self._roots = ()
            before, self._marks = self._marks, marks([p.grad for p in self._parameters])
            running.reaches = [a != b for a, b in zip(before, self._marks, strict=True)]
            if self._unfollowed:
                running.reaches = [True] * len(self._parameters)
            if any(running.reaches):
                self._passes.append(running)
                self._evidence = self._looked()
                if changed:
                    running.loss, running.unknown = None, WRITTEN
            else:
                running.share = torch.zeros((), device=losses[0].device)

    def settle(self, reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """The loss that the present gradients are the gradient of, and the reasons for which it may be unknown.

        Called at the update, before it happens.

        Args:
            reading: of the gradients that the update uses, where they were read.

        Returns:
            float64 [1], NaN where it is not known; and float64 [len(REASONS)], 1 where that reason holds.
        """
        device, numbers = self._parameters[0].device, self._numbers
        own = [p for p, used in zip(self._parameters, self._moves, strict=True) if used]
        if not self._passes or (all(p.grad is None for p in own) and not self._unfollowed):
            for each in self._passes:
                each.share = numbers.zero
            return numbers.nan.reshape(1), numbers.unseen
        seen = None if reading is None or self._several else (reading.gradients, reading.norms)
        first = self._passes[0]
        if len(self._passes) == 1 and first.loss is not None and all(first.reaches) and self._alone and not self._left:
            return self._settle_one(first, seen)
        shares, written = self._shares(device, seen)
        last = next((each for each in reversed(self._passes) if self._reached(each)), self._passes[-1])
        for i, each in enumerate(self._passes):
            alike = self._scaled_alike(each, last)
            if alike is not True:
                shares[i] = torch.where(alike | (shares[i] == 0), shares[i], numbers.nan)
        of_all = torch.stack(shares)
        written = written | of_all.isnan().any()
        zero = numbers.zero
        none, holds = of_all.eq(0).all(), dict.fromkeys(self.REASONS, zero)
        total = zero
        for each, share in zip(self._passes, shares, strict=True):
            each.share = share
            if each.loss is not None:
                total = total + torch.where(share == 0, zero, share * each.loss.to(device))
            else:
                assert each.unknown is not None
                total = total + torch.where(share == 0, zero, numbers.nan)
                holds[each.unknown] = torch.maximum(holds[each.unknown], (share != 0).double())
        holds[WRITTEN] = torch.maximum(holds[WRITTEN], written.double())
        holds[UNSEEN] = none.double()
        total = torch.where(none | (holds[WRITTEN] > 0), numbers.nan, total)
        return total.reshape(1), torch.stack([holds[of] for of in self.REASONS])

    # Parts of the above

    def _settle_one(self, alone: BackwardPass, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`settle` where one backward pass made all gradients, and nothing has been noted of it since: in few kernels.

        That is how it is in most trainings.
        """
        numbers, (same, gone) = self._numbers, self._same_and_gone(seen)
        whole, none = same.all(), (gone > same).all()
        assert alone.loss is not None
        alone.found(whole, none)
        loss = torch.where(whole, alone.loss.to(whole.device), numbers.nan)
        return loss.reshape(1), torch.where(
            whole, numbers.no_reason, torch.where(none, numbers.unseen, numbers.written)
        )

    @property
    def _alone(self) -> bool:
        """Whether an update uses all gradients, and all of them can be looked at."""
        return not self._several and not self._unfollowed

    @property
    def _numbers(self) -> _Numbers:
        device = self._parameters[0].device
        if self._known_numbers is None or self._known_numbers.zero.device != device:
            self._known_numbers = _Numbers(device)
        return self._known_numbers

    @property
    def _moves(self) -> list[bool]:
        """For each parameter, whether the present update moves it."""
        return self._probe.moves if self._probe is not None and self._several else [True] * len(self._parameters)

    def _reached(self, each: BackwardPass) -> bool:
        """Whether a backward pass has added to a gradient that the present update uses."""
        if not self._several:
            return any(each.reaches)
        return any(reached and moved for reached, moved in zip(each.reaches, self._moves, strict=True))

    def _waiting(self, moves: Sequence[bool]) -> tuple[list[BackwardPass], list[Tensor]]:
        """The backward passes whose gradients wait for another optimizer's update, and what is left after each."""
        if not self._passes:
            return [], []
        self._note_what_is_left()
        there = [not moved and p.grad is not None for moved, p in zip(moves, self._parameters, strict=True)]
        of_moved, numbers = moved(moves, self._parameters[0].device), self._numbers
        passes: list[BackwardPass] = []
        lefts: list[Tensor] = []
        for each, left in zip(self._passes, self._left, strict=True):
            each.reaches = [a and b for a, b in zip(each.reaches, there, strict=True)]
            each.earlier, each.share = True, None
            left = torch.where(of_moved, numbers.one, left)
            if any(each.reaches):
                passes.append(each)
                lefts.append(left)
            elif passes:  # what came after it holds for those before it, too
                lefts[-1] = torch.where(left == 0, numbers.zero, lefts[-1] * left)
        over = len(passes) - self.LONGEST
        if over > 0:
            reaches = [any(each) for each in zip(*(p.reaches for p in passes[: over + 1]), strict=True)]
            passes = [BackwardPass(None, CARRIED, reaches, earlier=True), *passes[over + 1 :]]
            lefts = lefts[over:]
        return passes, lefts

    def _pass_of(self, losses: Sequence[Tensor], weights: Sequence[Weight]) -> BackwardPass:
        reach = [True]
        if len(losses) > 1:  # those that do not reach the measured parameters are no part of what is differentiated
            own = {id(p) for p in self._parameters}
            reach = [not self._attached or any(id(leaf) in own for leaf in leaves_of(loss)) for loss in losses]
        found = BackwardPass(None)
        found.factor = unscaled(losses[0])[1]
        parts: list[Tensor] = []
        for value, weight, counts in zip(self._losses.values[-len(losses) :], weights, reach, strict=True):
            if counts and (value.numel() != 1 or (isinstance(weight, Tensor) and weight.numel() != 1)):
                found.unknown = NO_SCALAR
            elif counts:
                part = value.reshape(()).double()
                parts.append(part if weight is None else part * torch.as_tensor(weight).reshape(()))
        if found.unknown is None:
            found.loss = sum(parts[1:], parts[0]) if parts else losses[0].new_zeros((), dtype=torch.float64)
        return found

    def _add_leaves(self, losses: Sequence[Tensor]) -> None:
        known = {id(p) for p in self._parameters}
        new = list({id(leaf): leaf for loss in losses for leaf in leaves_of(loss) if id(leaf) not in known}.values())
        if not new:
            return
        if self._passes:
            self._note_what_is_left()
        self._parameters, self._read = self._parameters + new, None
        for each in self._passes:
            each.reaches += [False] * len(new)
        self._left = [torch.cat([each, each.new_ones(len(new))]) for each in self._left]
        self._look()

    def _begin(self) -> None:
        """A backward pass is about to run: what is left of the passes before it?"""
        if self._unfollowed:
            if self._none_left():
                self._passes, self._left = [], []
            self._marks = marks([p.grad for p in self._parameters])
            return
        if all(p.grad is None for p in self._parameters):
            self._passes, self._left = [], []
            self._marks = [None] * len(self._parameters)
        elif self._passes:
            self._note_what_is_left()
        else:  # gradients that no pass has made
            self._passes = [BackwardPass(None, CARRIED, [p.grad is not None for p in self._parameters])]
            self._look()
            numbers = self._numbers  # the script may have made them, of zeros
            self._left = [torch.where(self._evidence[1] == 0, numbers.zero, numbers.one)]

    def _note_what_is_left(self, seen: tuple[Tensor, Tensor] | None = None) -> None:
        if self._unfollowed:
            return
        numbers, (same, gone) = self._numbers, self._same_and_gone(seen)
        left = torch.where(same, numbers.one, torch.where(gone, numbers.zero, numbers.nan))
        if len(self._left) < len(self._passes):
            self._left.append(left)
        else:
            self._left[-1] = torch.where(left == 0, numbers.zero, self._left[-1] * left)

    def _same_and_gone(self, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Of each gradient, whether it is what it was when it was last looked at, and whether it is zero."""
        before, (then, _) = self._marks, self._evidence
        self._look(seen)
        now, norms = self._evidence
        same = now == then
        if before != self._marks:
            same &= moved([a == b for a, b in zip(before, self._marks, strict=True)], now.device)
        return same, norms == 0

    def _shares(self, device: torch.device, seen: tuple[Tensor, Tensor] | None) -> tuple[list[Tensor], Tensor]:
        """Of each pass, its share of the present gradients; and whether something else is part of them."""
        numbers = self._numbers
        if self._unfollowed:  # of one optimizer: see `Session.attached`
            return [numbers.one] * len(self._passes), numbers.zero > 0
        self._note_what_is_left(seen)
        moves = self._moves
        shares: list[Tensor] = []
        after, zeroed = torch.ones_like(self._left[-1]), torch.zeros_like(self._left[-1], dtype=torch.bool)
        for each, left in zip(reversed(self._passes), reversed(self._left), strict=True):
            after = torch.where(zeroed, after, left * after)
            zeroed = zeroed | (left == 0)
            reaches = [reached and used for reached, used in zip(each.reaches, moves, strict=True)]
            if not any(reaches):
                shares.append(numbers.zero)
                continue
            whole, none = ((after == share) for share in (1, 0))
            if not all(reaches):
                beside = self._not(reaches, device)
                whole, none = whole | beside, none | beside
            shares.append(torch.where(whole.all(), numbers.one, torch.where(none.all(), numbers.zero, numbers.nan)))
        written = after.isnan() if all(moves) else after.isnan() & ~self._not(moves, device)
        return shares[::-1], written.any()

    @staticmethod
    def _not(chosen: Sequence[bool], device: torch.device) -> Tensor:
        """A mask of the parameters that are not chosen; to index by one would wait for the device."""
        return moved([not each for each in chosen], device)

    @staticmethod
    def _scaled_alike(one: BackwardPass, other: BackwardPass) -> Tensor | bool:
        """Whether two passes' losses were multiplied by the same number: one division makes up for both."""
        if one.factor is None or other.factor is None or one.factor is other.factor:
            return one.factor is other.factor
        return one.factor == other.factor

    def _look(self, seen: tuple[Tensor, Tensor] | None = None) -> None:
        self._marks = marks([p.grad for p in self._parameters])
        self._evidence = self._looked() if seen is None else seen

    def _looked(self) -> tuple[Tensor, Tensor]:
        """The digests and the squared norms of the present gradients; a digest sees every change of a bit."""
        if not self._parameters or self._unfollowed:
            return self._evidence
        parameters, shapes = self._parameters, [p.shape for p in self._parameters]
        if self._read is None or shapes != self._shapes:  # the update of other shapes is refused elsewhere
            self._read, self._shapes = FusedRead([p.detach() for p in parameters]), shapes
        gradients = [None if (g := p.grad) is None or g.shape != p.shape else g.detach() for p in parameters]
        return self._read.look(gradients)
