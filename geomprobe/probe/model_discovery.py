"""The models that a script without `attach` calls, and what of them its optimizer trains."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from geomprobe.errors import UnsupportedTraining
from geomprobe.probe.parameters import described
from geomprobe.probe.probe import Probe


class ModelDiscovery:
    """Modules that were called from outside any other, before it was known what is trained.

    Attributes:
        several: the modules that are trained, where they are more than one.

    >>> called, model = ModelDiscovery(), nn.Linear(2, 1)
    >>> called.add(model)
    >>> import torch
    >>> called.trained_by(torch.optim.SGD(model.parameters(), lr=0.1)) is model
    True
    """

    def __init__(self) -> None:
        self.several: list[nn.Module] = []
        self._called: dict[int, nn.Module] = {}

    def add(self, module: nn.Module) -> None:
        """It is called."""
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
