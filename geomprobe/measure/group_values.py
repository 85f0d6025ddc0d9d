"""The hyperparameters of the optimizers' groups that a row holds, as the update used them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geomprobe.kernels.transfer import moved
from geomprobe.reproducibility.columns import Columns
from geomprobe.trace.schema import GROUP_COLUMNS, MOVING_LR, STEPS, VALUES, group_column


class GroupValues:
    """A row's lr, weight decay and momentum of the optimizers' groups: numbers on the host, tensors on their device.

    Most optimizers use the rate that stands in their group before the step. Some find their rate in the step, and
    leave it there: these have a true attribute ``finds_rate``, as `geomprobe.corridor.clr.CLR` does. Where the rate of
    another one changes within the step, it is not known which one was used.

    The groups of several optimizers are numbered one optimizer after another. Those that the update does not use have
    their present values.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> groups = GroupValues([optimizer]); groups.before_update(); groups.after_update()
    >>> groups.rate, groups.values()["groups"]
    (0.5, [0.5, 0.0, 0.0])
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers, self._moving = optimizers, 0
        self._finds_rate = [getattr(each, "finds_rate", False) or _relative_step(each) for each in optimizers]
        numbered = enumerate(self._groups)
        members = [(i, c.name) for i, group in numbered for c in GROUP_COLUMNS if c.name in group]
        self._host = [(i, name) for i, name in members if not _on_device(self._groups[i][name])]
        self._device = [(i, name) for i, name in members if _on_device(self._groups[i][name])]
        several = len(optimizers) > 1 and any("lr" in group for group in self._groups)
        rates: list[Any] = [group.get("lr") for group in self._groups]
        self._rate_device: torch.device | None = next((rate.device for rate in rates if _on_device(rate)), None)
        self._moving_on_device = several and self._rate_device is not None
        self._moving_on_host = several and not self._moving_on_device
        self._before: list[Any] = []
        self._used: list[Any] = []

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for each in self._optimizers for group in each.param_groups]  # load_state_dict makes new ones

    @property
    def _used_now(self) -> range:
        """The numbers of the groups of the optimizer that moves."""
        first = sum(len(each.param_groups) for each in self._optimizers[: self._moving])
        return range(first, first + len(self._optimizers[self._moving].param_groups))

    @property
    def columns(self) -> list[Columns]:
        host, device = (tuple(group_column(*each) for each in own) for own in (self._host, self._device))
        host, device = host + (MOVING_LR,) * self._moving_on_host, device + (MOVING_LR,) * self._moving_on_device
        return [
            Columns("groups", VALUES, host, "float64", False),
            Columns("device groups", VALUES, device, "float64", True),
        ]

    def before_update(self) -> None:
        """Note the rates that stand in the groups."""
        self._before = [_copied(group.get("lr")) for group in self._groups]

    def parent_stepping(self) -> None:
        """Compare them in the middle of a subclass's step, which may exchange rates and put them back."""
        rates = zip(self._before, self._groups, strict=True)
        self._before = [before if _same(before, group.get("lr")) else None for before, group in rates]

    def after_update(self, moving: int = 0) -> None:
        """Find the rates that the update used, before the script's own hooks on the step may set the next ones.

        Args:
            moving: the number of the optimizer whose update it is.
        """
        self._moving = moving
        self._used = [group.get("lr", float("nan")) for group in self._groups]
        if not self._finds_rate[moving]:
            for i in self._used_now:
                self._used[i] = _unchanged(self._before[i], self._used[i])

    @property
    def rate(self) -> Any:
        """The rate that the update used for its first group, a number or a tensor; NaN where that is not known."""
        return self._used[self._used_now[0]]

    @property
    def rate_column(self) -> Columns:
        """Of `rate_value`: on the device where a group's rate is a tensor there."""
        return Columns("lr", STEPS, ("lr",), "float64", self._rate_device is not None)

    @property
    def rate_value(self) -> Any:
        """The same as `rate`, as a row has it."""
        rate = self.rate
        if self._rate_device is None:
            return [float(rate)]
        return _moved(rate, self._rate_device).detach().double().reshape(1)

    @property
    def unknown_rates(self) -> float | Tensor:
        """How many groups' rates of the last update are not known."""
        groups = self._groups
        rates = [self._used[i] for i in self._used_now if "lr" in groups[i]]
        unknown: float | Tensor = 0.0
        for rate in rates:
            unknown = unknown + (rate.isnan().double().reshape(1) if _on_device(rate) else float(rate != rate))
        return unknown

    def values(self) -> dict[str, Any]:
        """Those of the last update."""
        host, on_device = ([self._value(*each) for each in own] for own in (self._host, self._device))
        host, on_device = host + [self.rate] * self._moving_on_host, on_device + [self.rate] * self._moving_on_device
        found: dict[str, Any] = {"groups": [float(value) for value in host]}
        if on_device:
            device = next(value.device for value in on_device if _on_device(value))
            values = [_moved(v, device).detach().double().reshape(1) for v in on_device]
            found["device groups"] = torch.cat(values)
        return found

    def _value(self, index: int, name: str) -> Any:
        return self._used[index] if name == "lr" else self._groups[index][name]


def _unchanged(before: Any, now: Any) -> Any:
    """A rate that is now what it was before; else NaN."""
    if _on_device(now):
        then = _moved(math.nan if before is None else before, now.device)
        return torch.where(then == now.detach(), now.detach().double(), torch.nan)
    return now if before is not None and float(now) == float(before) else float("nan")


def _moved(value: Any, device: torch.device) -> Tensor:
    return value if _on_device(value) else moved(float(value), device)


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
