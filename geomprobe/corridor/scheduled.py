"""A stand-in for an optimizer, through which a torch scheduler acts on an option other than ``lr``."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class ScheduledOption(Optimizer):
    """An optimizer, to a torch scheduler: its groups' ``lr`` is ``option`` of another optimizer's groups.

    It is made for optimizers that compute their ``lr``. What else a scheduler writes into a group
    (``initial_lr``, OneCycleLR's ``max_lr``) stays here, so it cannot meet an option of the same name.
    The schedule's state travels, as ever, in the state dicts of the scheduler and of the other optimizer.

    Args:
        optimizer: the one that steps.
        option: a key of its parameter groups, with a float behind it.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.8)
    >>> view = ScheduledOption(sgd, "momentum")
    >>> view.param_groups[0]["lr"] *= 0.5
    >>> sgd.param_groups[0]["momentum"]
    0.4
    """

    def __init__(self, optimizer: Optimizer, option: str) -> None:
        self.defaults = optimizer.defaults
        self.param_groups = [_Group(optimizer, index, option) for index in range(len(optimizer.param_groups))]
        optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move nothing: called after the other optimizer's step, to show a scheduler that one was made."""


class _Group(dict[str, Any]):
    """A group whose ``lr`` lies elsewhere, looked up each time: loading a state replaces the groups."""

    def __init__(self, optimizer: Optimizer, index: int, option: str) -> None:
        super().__init__()
        self._place = optimizer, index, option

    def __getitem__(self, key: str) -> Any:
        optimizer, index, option = self._place
        return optimizer.param_groups[index][option] if key == "lr" else super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        optimizer, index, option = self._place
        if key == "lr":
            optimizer.param_groups[index][option] = value
        else:
            super().__setitem__(key, value)
