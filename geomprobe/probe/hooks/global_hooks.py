"""What a pass sees without the script's help: the loss, the loaders, the optimizer and the model.

Everything here is put in place for the time of a pass and taken away after it. It serves the script that
has no `attach` in it, and the calls around a probe that a script makes in its own way.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from geomprobe.probe.events import Observer, observe
from geomprobe.probe.hooks import grad_scaler as gradient_calls
from geomprobe.probe.hooks.mute import is_muted, unless_muted

# What torch.compile says of hooks on all modules; their being called for the compiled one is what they are for.
_TWICE = r"Using `torch.compile\(module\)` when there are global hooks"


@contextlib.contextmanager
def listening(observer: Observer) -> Iterator[None]:
    """Report to ``observer``, and to it alone, while inside."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    with contextlib.ExitStack() as stack:
        stack.callback(observe, observe(observer))
        for owner, name, wrap in (
            (torch.autograd, "backward", _backward),
            (Optimizer, "zero_grad", _zero_grad),
            (DataLoader, "__init__", _make),
            (DataLoader, "__iter__", _iterate),
            (_BaseDataLoaderIter, "__next__", _next),
        ):
            original = getattr(owner, name)
            setattr(owner, name, torch.compiler.disable(unless_muted(original, wrap(original, observer))))
            stack.callback(setattr, owner, name, original)
        hook = register_optimizer_step_pre_hook(torch.compiler.disable(observer.optimizer_stepping))
        stack.callback(hook.remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=_TWICE)
        modules = _OutermostModules(observer.module_entered)
        stack.callback(modules.stop)
        stack.enter_context(gradient_calls.listening_to_gradients(observer))
        yield


def _backward(original: Callable[..., None], observer: Observer) -> Callable[..., None]:
    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        plain = all(option is None or option is False for option in (*args, *kwargs.values()))
        observer.backward(losses, functools.partial(original, tensors, *args, **kwargs), plain)

    return backward


def _zero_grad(original: Callable[..., None], observer: Observer) -> Callable[..., None]:
    @functools.wraps(original)
    def zero_grad(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        observer.gradients_dropped()
        original(self, *args, **kwargs)

    return zero_grad


def _make(original: Callable[..., None], observer: Observer) -> Callable[..., None]:
    @functools.wraps(original)
    def make(self: DataLoader[Any], *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        observer.loader_made(self)

    return make


def _iterate(original: Callable[..., Any], observer: Observer) -> Callable[..., Any]:
    @functools.wraps(original)
    def iterate(self: DataLoader[Any]) -> Any:
        observer.fetching()  # making the iterator draws from the RNG already
        iterator = original(self)
        observer.loader_iterated(self, iterator)
        return iterator

    return iterate


def _next(original: Callable[..., Any], observer: Observer) -> Callable[..., Any]:
    @functools.wraps(original)
    def next_batch(self: Any) -> Any:
        observer.fetching()
        came = False
        try:
            batch = original(self)
            came = True
            observer.batch_came(self)
        finally:
            observer.fetch_ended(came)
        return batch

    return next_batch


class _OutermostModules:
    """Reports each call of a module that is not made inside another module's call.

    Args:
        report: called with the module and its positional inputs; False ends the watch.
    """

    def __init__(self, report: Callable[[nn.Module, Any], bool]) -> None:
        self._report = report
        self._depth = 0
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Take the hooks off; more than once does no harm."""
        while self._hooks:
            self._hooks.pop().remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        evaluating = not torch.is_grad_enabled()  # which is not part of a step
        if self._depth == 0 and not evaluating and not is_muted() and not self._report(module, inputs):
            self.stop()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth -= 1
