"""What a trace keeps of each of the optimizer's parameter groups: lr, weight decay and momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geomprobe.reproducibility.columns import Columns
from geomprobe.trace.schema import GROUP_COLUMNS, VALUES, group_column


class ParamGroups:
    """The values of an optimizer's groups, where they are: numbers on the host, and tensors on their device.

    Args:
        optimizer: its first update is about to happen.

    >>> groups = ParamGroups(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    >>> groups.columns[0].columns, groups.values()["groups"]
    (('groups/0/lr', 'groups/0/weight_decay', 'groups/0/momentum'), [0.1, 0.0, 0.0])
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = optimizer.param_groups
        numbered = enumerate(self._groups)
        members = [(i, c.name) for i, group in numbered for c in GROUP_COLUMNS if c.name in group]
        self._host = [(i, name) for i, name in members if not _on_device(self._groups[i][name])]
        self._device = [(i, name) for i, name in members if _on_device(self._groups[i][name])]

    @property
    def columns(self) -> list[Columns]:
        """Of the trace."""
        return [
            Columns("groups", VALUES, tuple(group_column(i, n) for i, n in self._host), "float64", False),
            Columns(
                "device groups", VALUES, tuple(group_column(i, n) for i, n in self._device), "float64", True
            ),
        ]

    def values(self) -> dict[str, Any]:
        """The present ones, by the names of `columns`.

        To be read after the update: an optimizer that finds its own rate, such as CLR, knows it only then.
        """
        found: dict[str, Any] = {"groups": [float(self._groups[i][name]) for i, name in self._host]}
        if self._device:
            on_device = [torch.as_tensor(self._groups[i][name]).detach() for i, name in self._device]
            found["device groups"] = torch.cat([value.double().reshape(1) for value in on_device])
        return found


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
