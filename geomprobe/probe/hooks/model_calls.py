"""Sees the calls of the model that is trained, also where it is called as what torch.compile has made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from geomprobe.probe.hooks.global_hooks import is_muted


class ModelCalls:
    """Reports the inputs of each call of a model that may lead to a step.

    The model's own hook does, unless the call is compiled: there it would be compiled too, or break the graph in two.
    Then the module that `torch.compile` returned is followed instead. ``model.compile()`` returns none, and its calls
    are not seen.

    Args:
        model: the trained module, or None.
        report: called with the inputs: the positional ones, or a pair of these and the keyword ones.

    >>> model = nn.Linear(2, 1)
    >>> calls = ModelCalls(model, lambda inputs: print(len(inputs)))
    >>> _ = model(torch.ones(1, 2))
    1
    """

    def __init__(self, model: nn.Module | None, report: Callable[[Any], None]) -> None:
        self._model, self._report = model, report
        self._seen = model is None
        self._handles: list[RemovableHandle] = [] if model is None else [self._follow(model)]

    def met(self, module: nn.Module, inputs: Any) -> bool:
        """A module is called from outside any other; gives whether to look at the next one, too."""
        if self._seen:
            return False
        if _compiled_from(module) is not self._model:
            return True
        self._handles.append(self._follow(module))
        self._entered(module, inputs, {})  # of this call, the hooks are gathered already
        return False

    def remove(self) -> None:
        """See no more of them."""
        while self._handles:
            self._handles.pop().remove()

    def _follow(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self._entered, with_kwargs=True)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._seen = True
        if torch.is_grad_enabled() and not is_muted():  # evaluation is not part of the step
            self._report((args, kwargs) if kwargs else args)


def _compiled_from(module: nn.Module) -> nn.Module | None:
    """What a module was compiled from, below the wrappers that call it ``module``."""
    compiled = False
    while isinstance(
        inner := getattr(module, "_orig_mod", None) or getattr(module, "module", None), nn.Module
    ):
        compiled |= hasattr(module, "_orig_mod")
        module = inner
    return module if compiled else None
