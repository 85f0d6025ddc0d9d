"""What is trained: the optimizer's parameters by their names, and the model of a script without `attach`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from geomprobe.distributed.layout import fsdp_modules
from geomprobe.errors import UnsupportedTraining

if TYPE_CHECKING:
    from geomprobe.probe.probe import Probe


def measured_parameters(model: nn.Module | None, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the model, each tensor once however often it is tied.

    Modules that `fully_shard` manages are resharded: gathered weights are not what the optimizer holds.

    Raises:
        UnsupportedTraining: for LBFGS, complex parameters, or none at all.

    >>> import torch
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
    taken = set(names.values())
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = names.get(id(parameter), f"group{index}.parameter{position}")
            while name in found or (id(parameter) not in names and name in taken):
                name += "'"  # a module may have that name too
            if is_lazy(parameter):
                raise UnsupportedTraining(
                    f"{name} does not know its shape yet: it is of a lazy layer. Run the model once on a batch before "
                    "geomprobe.attach."
                )
            if parameter.is_complex():
                raise UnsupportedTraining(
                    f"{name} is complex ({parameter.dtype}), and RSI and EB are defined for real parameters. "
                    "Store it as a real tensor of shape [..., 2] (torch.view_as_real) to measure it."
                )
            found[name] = parameter
    if not found:
        raise UnsupportedTraining(f"{type(optimizer).__name__} holds no parameters: there is nothing to measure.")
    return found


def described(optimizer: Optimizer) -> str:
    """An optimizer, for a message.

    >>> import torch
    >>> described(torch.optim.SGD([torch.zeros(2)], lr=0.1))
    'SGD with 1 tensor (2 values)'
    """
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    values = sum(t.numel() for t in tensors)
    return f"{type(optimizer).__name__} with {_count(len(tensors), 'tensor')} ({_count(values, 'value')})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class ModelDiscovery:
    """Modules that were called from outside any other, before it was known what is trained.

    Attributes:
        several: the modules that are trained, where they are more than one.
    """

    def __init__(self) -> None:
        self.several: list[nn.Module] = []
        self._called: dict[int, nn.Module] = {}

    def add(self, module: nn.Module) -> None:
        """A module is called."""
        self._called[id(module)] = module

    def of(self, optimizer: Optimizer) -> list[nn.Module]:
        """Those that hold any of an optimizer's parameters."""
        wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [m for m in self._called.values() if any(id(p) in wanted for p in m.parameters())]

    def trained_by(self, optimizer: Optimizer) -> nn.Module | None:
        """The model that an optimizer trains, or None where no module was called; all others are forgotten."""
        found = self.of(optimizer)
        self._called.clear()
        if len(found) < 2:
            return found[0] if found else None
        self.several = found
        return nn.ModuleList(found)


def refuse_another(probe: Probe, optimizer: Optimizer) -> None:
    """Hold a run to one optimizer, but for those that train something else beside what the script asked to measure.

    Raises:
        UnsupportedTraining: ``optimizer``, which is not the probe's, steps too.
    """
    own = {id(p) for p in probe.parameters.values()}
    if probe.model is not None:
        own |= {id(p) for p in probe.model.parameters()}
    if probe.explicit and not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        return
    raise UnsupportedTraining(
        f"Two optimizers step in this run: {described(probe.optimizer)} and {described(optimizer)} "
        f"(at step {probe.step}). A trace is of one optimizer's path. Put all parameters into one "
        "optimizer's groups, or, where the second trains another model, call geomprobe.attach(model, "
        "optimizer) on the one to measure."
    )
