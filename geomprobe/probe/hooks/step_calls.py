"""Calls of ``Optimizer.step``: the closure in one, and one inside another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_STEP = Optimizer.profile_hook_step(lambda: None).__code__  # of what torch wraps around every `step`


def nested_step(optimizer: Optimizer) -> bool:
    """Whether the running step of ``optimizer``, whose hook asks, is a part of another step of it.

    torch calls the hooks of a subclass's ``step`` and once more those of the parent's that it calls.

    >>> import torch
    >>> nested_step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    False
    """
    calls = 0
    frame = inspect.currentframe()
    while frame is not None:
        calls += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return calls > 1


def given_closure(args: Args, kwargs: Kwargs) -> Callable[[], Any] | None:
    """The closure in a call of ``Optimizer.step``, whose first argument is the optimizer.

    >>> given_closure((None, abs), {}) is given_closure((None,), {"closure": abs}) is abs
    True
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def replace_closure(args: Args, kwargs: Kwargs, closure: Callable[[], Any]) -> tuple[Args, Kwargs]:
    """The same call with another closure.

    >>> replace_closure((None, abs), {}, min)
    ((None, <built-in function min>), {})
    """
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
