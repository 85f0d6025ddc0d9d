"""An adapter through which a torch scheduler acts on an option of an optimizer other than ``lr``."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class ScheduledOption(Optimizer):
    """What a torch scheduler gets instead of the optimizer: the ``lr`` of its groups is ``option`` of the optimizer's.

    It is for optimizers that compute their ``lr``. Everything else that a scheduler writes into a group
    (``initial_lr``, OneCycleLR's ``max_lr``) stays in this object, so it overwrites no option of the same name.
    The schedule's state is, as usual, in the state dicts of the scheduler and of the optimizer.

    Args:
        optimizer: the optimizer that makes the steps.
        option: a key of its parameter groups, whose value is a float.

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
        """Do nothing. The optimizer calls it after each of its steps, because a scheduler watches for such calls."""


class _Group(dict[str, Any]):
    """A group whose ``lr`` is in the optimizer, and is looked up at each access: loading a state replaces groups."""

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
