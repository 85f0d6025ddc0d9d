"""What each pass keeps of a training besides its rows: the losses, the loaders' passes, attempted steps, and progress.

Each class here is a listener of `geomprobe.passes.session.Session`; all are called in the thread that trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from geomprobe.distributed.dtensor import is_dtensor
from geomprobe.distributed.progress import ProgressMarker
from geomprobe.errors import UnsupportedTraining
from geomprobe.probe.events import Events
from geomprobe.probe.hooks.global_hooks import tag_scaled, unscaled
from geomprobe.probe.parameters import raw

if TYPE_CHECKING:
    from geomprobe.probe.loops import Position
    from geomprobe.probe.probe import Probe


class LossTracker(Events):
    """Collects the losses that backward passes are called on since the last update, as they were before scaling.

    Attributes:
        values: these losses, copied: several under gradient accumulation.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self._factor: Tensor | None = None

    def loss_scaled(self, factor: Tensor) -> None:
        self._factor = factor

    def losses_seen(self, losses: Sequence[Tensor]) -> None:
        for loss in losses:
            if self._factor is not None:
                tag_scaled(loss, self._factor)
                self._factor = None
            self.values.append(unscaled(loss)[0].detach().clone())  # the script may write to it later

    def gradients_dropped(self) -> None:
        self.values.clear()

    after_update = restored = gradients_dropped


class LoaderPasses(Events):
    """Follows the script's loaders and the passes over them, from before the probe is attached.

    Attributes:
        made: the loaders made before training began, in an order that every process of the run shares.
        loader: the one that gave the last batch, None where none did.
        not_resumable: why no other process could begin in the middle of this training; None where it could.
    """

    def __init__(self) -> None:
        self.made: list[DataLoader[Any]] = []
        self.loader: DataLoader[Any] | None = None
        self.not_resumable: str | None = None
        self._passes: WeakKeyDictionary[Iterator[Any], tuple[int, DataLoader[Any]]] = WeakKeyDictionary()
        self._count = 0
        self._number: int | None = None
        self._trained_on: dict[int, float] = {}  # the passes that led to steps, and their epochs
        self._recent: dict[int, tuple[DataLoader[Any], int]] = {}  # those that gave batches since the last update
        self._iterators: dict[int, ReferenceType[Iterator[Any]]] = {}
        self._given: dict[int, int] = {}  # how many, in all
        self._ended: set[int] = set()
        self._data: Any = None  # the data set whose passes are counted
        self._losses = 0  # backward passes so far
        self._unclear = False
        self._probe: Probe | None = None
        self._begun = False

    @property
    def epoch(self) -> float:
        """As the script names it; else how many passes led to steps, counted from 0; NaN before the first, and where
        it is not clear which loader's passes are the epochs: where steps use several, or leave passes after a batch."""
        named = None if self._probe is None else self._probe.epoch
        if named is not None:
            return named
        if self._unclear:
            return float("nan")
        return len(self._trained_on) - 1 if self._trained_on else float("nan")

    def attached(self, probe: Probe) -> None:
        self._probe = probe

    def begin(self) -> None:
        self._begun = True

    def loader_made(self, loader: DataLoader[Any]) -> None:
        if not self._begun:
            self.made.append(loader)

    def loader_iterated(self, loader: DataLoader[Any], iterator: Iterator[Any]) -> None:
        self._count += 1
        self._passes[iterator] = self._count, loader  # with persistent workers it may have been another pass

    def batch_came(self, iterator: Iterator[Any]) -> None:
        if torch.is_grad_enabled():  # evaluation is not part of the step
            self._number, self.loader = self._passes.get(iterator, (None, None))
            if self._number is not None and self.loader is not None:
                self._recent[self._number] = self.loader, 1 + self._recent.get(self._number, (None, 0))[1]
                self._given[self._number] = 1 + self._given.get(self._number, 0)
                self._iterators[self._number] = ref(iterator)

    def losses_seen(self, losses: Sequence[Tensor]) -> None:
        self._losses += 1

    def loader_ended(self, iterator: Iterator[Any]) -> None:
        number, _ = self._passes.get(iterator, (None, None))
        if number is not None:
            self._ended.add(number)

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        self._unclear = self._unclear or self._is_unclear()
        recent, self._recent = self._recent, {}
        if active := [number for number in recent if not self._is_over(number)]:
            self._number, self.loader = active[0], recent[active[0]][0]  # not an evaluation that came after the batch
        self._iterators = {}
        if self._number is None or self.loader is None:
            return
        epoch = None if self._probe is None else self._probe.epoch
        first = self._trained_on.setdefault(self._number, -1 if epoch is None else epoch)
        if epoch not in (None, first):
            self.not_resumable = "one pass over its loader lasts for several epochs"
        elif self.loader.persistent_workers and self.loader.num_workers:
            self.not_resumable = (
                "its loader keeps its workers, and their random streams, from epoch to epoch (persistent_workers=True)"
            )

    def _is_over(self, number: int) -> bool:
        """Whether a pass gives no batch any more: it is at its end, or the script has dropped its iterator."""
        return number in self._ended or self._iterators[number]() is None

    def _is_unclear(self) -> bool:
        """Whether the batches since the last update are of no one loader that the script passes over in epochs."""
        if self._number is None or self.loader is None:
            return False
        if not self._recent:
            return self._number in self._ended  # steps are taken, and no loader gives batches any more
        # A pass that is over was an evaluation or a look at one batch, or ends an epoch.
        first, *_ = self._recent
        active = [number for number in self._recent if not self._is_over(number)] or [next(reversed(self._recent))]
        loader, count = self._recent[active[0]]
        self._data = loader.dataset if self._data is None else self._data
        if len(active) > 1 or (loader.dataset is not self._data and any(loader is each for each in self.made)):
            return True
        self._data = loader.dataset  # the script may make one for each epoch
        if (
            first != active[0]
            and first in self._ended
            and first not in self._trained_on
            and self._recent[first][0] is loader
        ):
            return True  # gradients of a whole pass go into a step of the next one
        if not self._trained_on and count > self._losses:
            return True  # the loop is a batch ahead: the last step of a pass looks like the first of the next one
        if active[0] in self._trained_on or not self._trained_on:
            return False
        before = next(reversed(self._trained_on))
        return self._given.get(before) == 1 and before not in self._ended  # the script asks each time for a first batch


class StepAttempts(Events):
    """Counts the steps that were attempted, and sees which gradients were scaled and clipped before them.

    An attempt is a call of the optimizer's ``step``, or a GradScaler's for it, which leaves the weights alone where a
    gradient has overflowed. Each attempt that is applied is a step, and a row of the trace.

    Args:
        report: where clipped gradients and skipped steps are reported, once there is a probe.

    Attributes:
        skipped: attempts that were not applied.
        scaled: whether a GradScaler was at work in any of them.
        clipped_by: torch's functions that clipped gradients before an attempt.
    """

    name = "updates"

    def __init__(self, report: Events) -> None:
        self.skipped = 0
        self.scaled = False
        self.clipped_by: list[str] = []
        self._report = report
        self._probe: Probe | None = None
        self._early_skips: dict[Any, int] = {}  # before there is a probe, by optimizer
        self._early_clips: dict[str, set[int]] = {}  # and the ids of what was clipped
        self._factor: Tensor | None = None
        self._attempting = False

    def attached(self, probe: Probe) -> None:
        self._probe = probe  # only its optimizers and parameters count, of what was seen before it too
        self.skipped = sum(self._early_skips.get(each, 0) for each in probe.optimizers)
        self.scaled = self.skipped > 0
        own = {id(parameter) for parameter in probe.parameters.values()}
        self.clipped_by = [name for name, ids in self._early_clips.items() if ids & own]
        self._early_skips, self._early_clips = {}, {}

    def described(self, applied: int) -> dict[str, Any]:
        """For the manifest, once all of ``applied`` steps are over."""
        return {
            "attempted": applied + self.skipped,
            "applied": applied,
            "scaled": self.scaled,
            "gradient": "as the optimizer takes it",
            "clipped_by": self.clipped_by,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scaled": self.scaled, "clipped_by": list(self.clipped_by)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.scaled = state["skipped"], state["scaled"]
        self.clipped_by = list(state["clipped_by"])

    def loss_scaled(self, factor: Tensor) -> None:
        self._factor = factor

    # What the hooks on scalers and clipping call

    def unscaled(self, optimizer: Optimizer) -> None:
        """A GradScaler has divided an optimizer's gradients."""
        if self._probe is None or self._is_measured(optimizer):
            self._factor = None

    @contextlib.contextmanager
    def attempting(self, optimizer: Optimizer) -> Iterator[None]:
        """Around a GradScaler's step of an optimizer."""
        if self._attempting:  # from a scaler's own step, which calls torch's
            yield
            return
        before, self._attempting = self._applied, True
        try:
            yield
        finally:
            self._attempting = False
        self._factor = None
        if self._probe is None:
            self._early_skips[raw(optimizer)] = 1 + self._early_skips.get(raw(optimizer), 0)
        elif self._is_measured(optimizer):
            self.scaled = True
            if self._applied == before:
                self.skipped += 1
                self._report.step_skipped()

    def clipping(self, name: str, parameters: Sequence[Tensor]) -> None:
        """The function ``name`` of torch is about to clip the gradients of ``parameters``."""
        ids = {id(parameter) for parameter in parameters}
        if self._probe is None:
            self._early_clips.setdefault(name, set()).update(ids)
            return
        if not any(id(parameter) in ids for parameter in self._probe.parameters.values()):
            return
        if name not in self.clipped_by:
            self.clipped_by.append(name)
        self._report.before_clipping(self._factor)

    @property
    def _applied(self) -> int:
        return 0 if self._probe is None else self._probe.step

    def _is_measured(self, optimizer: Any) -> bool:
        return self._probe is not None and any(raw(optimizer) is each for each in self._probe.optimizers)


class UpdateChecks(Events):
    """Refuses an update of which no row could be right, whose parameters or the update before it are not known.

    Args:
        probe: just attached: its optimizers' parameters, and their shapes, are fixed for the time of the pass.

    Raises:
        UnsupportedTraining: parameters were added, removed, replaced or resized, or the optimizer's ``step`` raised,
            and the script did not stop.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._held = self._holding()
        self._stepped = probe.optimizer
        self._shapes = [p.shape for p in probe.parameters.values()]
        self._places = self._in_model()

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        self.complete()
        self._stepped, parameters = self._probe.optimizer, self._probe.parameters
        if any(owner.get(key) is not parameters[name] for name, (owner, key) in self._places.items()):
            self._require_in_model()
        held = self._holding()
        if held == self._held and [p.shape for p in parameters.values()] == self._shapes:
            return
        sizes, before = ([len(group) for group in each] for each in (held, self._held))
        if sizes != before:
            what = f"the optimizer's parameter groups held {before} tensors and now hold {sizes}"
        elif held != self._held:
            what = "the optimizer's parameter groups hold another tensor than before"
        else:
            rows = zip(parameters, self._shapes, parameters.values(), strict=True)
            name, shape, now = next(row for row in rows if row[1] != row[2].shape)
            what = f"{name} had shape {tuple(shape)} and now has {tuple(now.shape)}"
        self._refuse(what)

    def complete(self) -> None:
        probe = self._probe
        if probe.hook.begun != probe.step:
            name = type(self._stepped).__name__
            raise UnsupportedTraining(
                f"{name}.step raised in step {probe.step}, and the script went on. What that step did to the "
                "weights is not known, so no later one can be measured. Mend what raised, or let it end the script."
            )

    def _holding(self) -> list[list[int]]:
        groups = (group for optimizer in self._probe.optimizers for group in optimizer.param_groups)
        return [[id(p) for p in group["params"]] for group in groups]

    def _in_model(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Where the model has each of the optimizer's parameters; FSDP2 exchanges its own at each step."""
        owners = [] if self._probe.model is None else [m._parameters for m in self._probe.model.modules()]
        found: dict[int, tuple[dict[str, Any], str]] = {}
        for owner in owners:
            for key, parameter in owner.items():
                found.setdefault(id(parameter), (owner, key))
        own = self._probe.parameters.items()
        return {name: found[id(p)] for name, p in own if id(p) in found and not is_dtensor(p)}

    def _require_in_model(self) -> None:
        before, self._places = self._places, self._in_model()  # a module may have it under another name now
        if lost := [name for name in before if name not in self._places]:
            self._refuse(f"the model has another tensor as {lost[0]} than the one that is measured")

    def _refuse(self, what: str) -> None:
        raise UnsupportedTraining(
            f"The parameters changed before step {self._probe.step}: {what}. The distance to the final weights is "
            "only defined for a fixed set of parameters. Create all of them before the first step (freezing "
            "one by requires_grad_(False) or grad = None is fine; load_state_dict copies into them, and "
            "load_state_dict(assign=True) replaces them), or record the stages as separate runs."
        )


class StepProgress(Events):
    """Notes the stage of the step at each event; the watchdog's thread reads the marker.

    Args:
        marker: where it is noted; see `STAGES` of `geomprobe.distributed.progress` for the numbers.
    """

    def __init__(self, marker: ProgressMarker) -> None:
        self._marker = marker
        self._probe: Probe | None = None

    def attached(self, probe: Probe) -> None:
        self._probe = probe

    def fetching(self) -> None:
        self._at(1)

    def fetch_ended(self, came: bool) -> None:
        self._at(2)

    def fetched(self, batch: Any) -> None:
        self._at(2)

    def entered(self, inputs: Any) -> None:
        self._at(3)

    def losses_seen(self, losses: Sequence[Tensor]) -> None:
        self._at(4)

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        self._at(5)

    def between_steps(self, position: Position) -> None:
        self._at(0)

    def after_update(self) -> None:
        self._at(0)

    def _at(self, stage: int) -> None:
        self._marker.at(0 if self._probe is None else self._probe.step, stage)
