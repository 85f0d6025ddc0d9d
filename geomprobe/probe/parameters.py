"""What is trained: the optimizer's parameters by their names, and the model of a script without `attach`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from geomprobe.distributed.layout import fsdp_modules
from geomprobe.errors import UnsupportedTraining

if TYPE_CHECKING:
    from geomprobe.probe.probe import Probe


def measured_parameters(model: nn.Module | None, *optimizers: Optimizer) -> dict[str, nn.Parameter]:
    """The optimizers' parameters by their names in the model, each tensor once however often it is tied.

    Modules that `fully_shard` manages are resharded: gathered weights are not what the optimizer holds.

    Raises:
        UnsupportedTraining: for LBFGS, complex parameters, or none at all.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> list(measured_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    ['weight', 'bias']
    """
    if any(isinstance(each, LBFGS) for each in optimizers):
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
    for index, group in enumerate(group for each in optimizers for group in each.param_groups):
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
        names_of = ", ".join(type(each).__name__ for each in optimizers) or "An empty list of optimizers"
        raise UnsupportedTraining(f"{names_of} holds no parameters: there is nothing to measure.")
    return found


def raw(optimizer: Any) -> Any:
    """The optimizer in a wrapper that holds it as ``.optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def holds(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[bool]:
    """For each of some parameters, whether an optimizer holds it.

    >>> import torch
    >>> a, b = torch.zeros(1), torch.zeros(1)
    >>> holds(torch.optim.SGD([b], lr=0.1), [a, b])
    [False, True]
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [id(p) in own for p in parameters]


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
        return [module for module in self._called.values() if any(holds(optimizer, module.parameters()))]

    def trained_by(self, optimizers: Iterable[Optimizer]) -> nn.Module | None:
        """The model that optimizers train, or None where no module was called; all others are forgotten."""
        found = list({id(module): module for each in optimizers for module in self.of(each)}.values())
        self._called.clear()
        if len(found) < 2:
            return found[0] if found else None
        self.several = found
        return nn.ModuleList(found)


def refuse_another(probe: Probe, optimizer: Optimizer, chosen: bool, listed: str) -> None:
    """Hold a run to the optimizers that are measured, but for those that train something else.

    Args:
        probe: has the optimizers that are measured.
        optimizer: another one, which steps too.
        chosen: whether the user has said which ones to measure, by `attach` or by ``--optimizer``.
        listed: the optimizers that the script has made, for the message.

    Raises:
        UnsupportedTraining: its update would be part of no row, or it is not clear what to measure.
    """
    model = () if probe.model is None else probe.model.parameters()
    shared = any(holds(optimizer, [*probe.parameters.values(), *model]))
    if chosen and not shared:
        return
    measured = " and ".join(map(described, probe.optimizers))
    both = f"Two optimizers step in this run: {measured} and {described(optimizer)} (at step {probe.step})."
    if shared:
        raise UnsupportedTraining(
            f"{both} They train the same model, and the rows were laid out without the second. Make all optimizers "
            "before the first step and call geomprobe.attach(model, [first, second]), put all parameters into one "
            "optimizer's groups, or record the stages as separate runs."
        )
    raise UnsupportedTraining(
        f"{both} They train different models, and a trace is of one path. Call geomprobe.attach(model, optimizer) on "
        f"the one to measure, or name it: geomprobe record --optimizer NAME, by its class, its model's class or its "
        f"number.{listed} Where they train parts of one model, call geomprobe.attach(model, [first, second])."
    )
