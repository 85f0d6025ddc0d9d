"""The hyperparameters of the optimizer's groups that a row holds, as the update used them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geomprobe.reproducibility.columns import Columns
from geomprobe.trace.schema import GROUP_COLUMNS, VALUES, group_column


class GroupValues:
    """A row's lr, weight decay and momentum of the optimizer's groups: numbers on the host, tensors on their device.

    Most optimizers use the rate that stands in their group before the step. Some find their rate in the step, and
    leave it there: these have a true attribute ``finds_rate``, as `geomprobe.corridor.clr.CLR` does. Where the rate of
    another one changes within the step, it is not known which one was used.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> groups = GroupValues(optimizer); groups.before_update(); groups.after_update()
    >>> groups.rate(), groups.values()["groups"]
    (0.5, [0.5, 0.0, 0.0])
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._finds_rate = getattr(optimizer, "finds_rate", False) or _relative_step(optimizer)
        numbered = enumerate(self._groups)
        members = [(i, c.name) for i, group in numbered for c in GROUP_COLUMNS if c.name in group]
        self._host = [(i, name) for i, name in members if not _on_device(self._groups[i][name])]
        self._device = [(i, name) for i, name in members if _on_device(self._groups[i][name])]
        self._before: list[Any] = []
        self._used: list[Any] = []

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups  # load_state_dict makes new ones

    @property
    def columns(self) -> list[Columns]:
        host, device = (tuple(group_column(*each) for each in own) for own in (self._host, self._device))
        return [
            Columns("groups", VALUES, host, "float64", False),
            Columns("device groups", VALUES, device, "float64", True),
        ]

    def before_update(self) -> None:
        """Note the rates that stand in the groups."""
        if not self._finds_rate:
            self._before = [_copied(group.get("lr")) for group in self._groups]

    def parent_stepping(self) -> None:
        """Compare them in the middle of a subclass's step, which may exchange rates and put them back."""
        if not self._finds_rate:
            rates = zip(self._before, self._groups, strict=True)
            self._before = [before if _same(before, group.get("lr")) else None for before, group in rates]

    def after_update(self) -> None:
        """Find the rates that the update used, before the script's own hooks on the step may set the next ones."""
        now = [group.get("lr", float("nan")) for group in self._groups]
        if self._finds_rate:
            self._used = now
        else:
            self._used = [_unchanged(*pair) for pair in zip(self._before, now, strict=True)]

    def rate(self, index: int = 0) -> Any:
        """The rate that the update used for a group, a number or a tensor; NaN where that is not known."""
        return self._used[index]

    @property
    def unknown_rates(self) -> float | Tensor:
        """How many groups' rates of the last update are not known."""
        rates = [self.rate(i) for i, group in enumerate(self._groups) if "lr" in group]
        unknown: float | Tensor = 0.0
        for rate in rates:
            unknown = unknown + (rate.isnan().double().reshape(1) if _on_device(rate) else float(rate != rate))
        return unknown

    def values(self) -> dict[str, Any]:
        """Those of the last update."""
        host, on_device = ([self._value(*each) for each in own] for own in (self._host, self._device))
        found: dict[str, Any] = {"groups": [float(value) for value in host]}
        if on_device:
            found["device groups"] = torch.cat([torch.as_tensor(v).detach().double().reshape(1) for v in on_device])
        return found

    def _value(self, index: int, name: str) -> Any:
        return self.rate(index) if name == "lr" else self._groups[index][name]


def _unchanged(before: Any, now: Any) -> Any:
    """A rate that is now what it was before; else NaN."""
    if _on_device(now):
        then = torch.as_tensor(math.nan if before is None else before, device=now.device)
        return torch.where(then == now.detach(), now.detach().double(), torch.nan)
    return now if before is not None and float(now) == float(before) else float("nan")


def _same(before: Any, now: Any) -> bool:
    return _on_device(now) or (before is not None and now is not None and float(before) == float(now))


def _copied(rate: Any) -> Any:
    if isinstance(rate, Tensor):
        return rate.detach().clone() if _on_device(rate) else float(rate)
    return rate


def _relative_step(optimizer: Optimizer) -> bool:
    """Whether it is the Adafactor of transformers, which writes its own rate into the group before it uses it."""
    return any(group.get("relative_step") is True for group in optimizer.param_groups)


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
