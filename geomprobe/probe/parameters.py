"""Which parameters are measured: those of the optimizer, by their names in the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from geomprobe.distributed.layout import fsdp_modules
from geomprobe.errors import UnsupportedTraining
from geomprobe.probe.events import Events

if TYPE_CHECKING:
    from geomprobe.probe.probe import Probe


def measured_parameters(model: nn.Module | None, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the model, each tensor once however often it is tied.

    Modules that `fully_shard` manages are resharded: gathered weights are not what the optimizer holds.

    Raises:
        UnsupportedTraining: for LBFGS, complex parameters, or none at all.

    >>> model = torch.nn.Linear(2, 1)
    >>> list(measured_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    ['weight', 'bias']
    """
    if isinstance(optimizer, LBFGS):
        raise UnsupportedTraining(
            "LBFGS evaluates its closure several times a step, so a step has no one gradient to measure. "
            "Use an optimizer that takes one gradient a step."
        )
    for module in fsdp_modules(model):
        module.reshard()
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = names.get(id(parameter), f"group{index}.parameter{position}")
            if parameter.is_complex():
                raise UnsupportedTraining(
                    f"{name} is complex ({parameter.dtype}), and RSI and EB are defined for real parameters. "
                    "Store it as a real tensor of shape [..., 2] (torch.view_as_real) to measure it."
                )
            found[name] = parameter
    if not found:
        raise UnsupportedTraining(
            f"{type(optimizer).__name__} holds no parameters: there is nothing to measure."
        )
    return found


def described(optimizer: Optimizer) -> str:
    """An optimizer, for a message.

    >>> described(torch.optim.SGD([torch.zeros(2)], lr=0.1))
    'SGD with 1 tensor (2 values)'
    """
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    values = sum(t.numel() for t in tensors)
    return f"{type(optimizer).__name__} with {_count(len(tensors), 'tensor')} ({_count(values, 'value')})"


class UpdateChecks(Events):
    """Refuses an update of which no row could be right, whose parameters or the update before it are not known.

    Args:
        probe: just attached: its optimizer's parameters, and their shapes, are fixed for the time of the pass.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._sizes, self._shapes = self._now()

    def before_update(self, gradients: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        """Refuse the update.

        Raises:
            UnsupportedTraining: parameters were added, removed or resized, or the update before it was not finished.
        """
        self.complete()
        sizes, shapes = self._now()
        if sizes == self._sizes and shapes == self._shapes:
            return
        if sizes != self._sizes:
            what = f"the optimizer's parameter groups held {self._sizes} tensors and now hold {sizes}"
        else:
            pairs = zip(self._probe.parameters, self._shapes, shapes, strict=True)
            name, before, now = next(row for row in pairs if row[1] != row[2])
            what = f"{name} had shape {tuple(before)} and now has {tuple(now)}"
        raise UnsupportedTraining(
            f"The parameters changed before step {self._probe.step}: {what}. The distance to the final weights is "
            "only defined for a fixed set of parameters. Create all of them before the first step (freezing "
            "one by requires_grad_(False) or grad = None is fine), or record the stages as separate runs."
        )

    def complete(self) -> None:
        """Refuse to go on where the optimizer's ``step`` raised, and the script went on.

        Raises:
            UnsupportedTraining: it did.
        """
        probe = self._probe
        if probe.hook.begun != probe.step:
            name = type(probe.optimizer).__name__
            raise UnsupportedTraining(
                f"{name}.step raised in step {probe.step}, and the script went on. What that step did to the "
                "weights is not known, so no later one can be measured. Mend what raised, or let it end the script."
            )

    def _now(self) -> tuple[list[int], list[torch.Size]]:
        sizes = [len(group["params"]) for group in self._probe.optimizer.param_groups]
        return sizes, [p.shape for p in self._probe.parameters.values()]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
