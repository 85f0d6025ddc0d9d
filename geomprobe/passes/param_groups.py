"""What is said of an optimizer, and what a trace keeps of each of its parameter groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from geomprobe.trace.schema import GROUP_COLUMNS, group_column


def described(optimizer: Optimizer) -> str:
    """An optimizer, for a message.

    >>> import torch
    >>> described(torch.optim.SGD([torch.zeros(2)], lr=0.1))
    'SGD with 1 tensor (2 values)'
    """
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    values = sum(t.numel() for t in tensors)
    return f"{type(optimizer).__name__} with {_count(len(tensors), 'tensor')} ({_count(values, 'value')})"


def group_columns(optimizer: Optimizer) -> tuple[list[str], list[str]]:
    """Names of the columns of `group_values`: those known on the host, then those on the device.

    >>> import torch
    >>> group_columns(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    (['groups/0/lr', 'groups/0/weight_decay', 'groups/0/momentum'], [])
    """
    entries = _entries(optimizer)
    names = [[group_column(i, name) for i, name, v in entries if _on_device(v) == where] for where in (0, 1)]
    return names[0], names[1]


def group_values(optimizer: Optimizer) -> tuple[list[float], list[Tensor]]:
    """lr, weight decay and momentum of each parameter group; a tensor on a device stays there.

    To be read after the update: an optimizer that finds its own rate, such as CLR, knows it only then.
    """
    entries = _entries(optimizer)
    on_device = [value.detach().double().reshape(1) for _, _, value in entries if _on_device(value)]
    return [float(value) for _, _, value in entries if not _on_device(value)], on_device


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _entries(optimizer: Optimizer) -> list[tuple[int, str, Any]]:
    groups = enumerate(optimizer.param_groups)
    return [(i, c.name, group[c.name]) for i, group in groups for c in GROUP_COLUMNS if c.name in group]


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
