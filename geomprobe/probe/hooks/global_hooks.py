"""What a pass sees without the script's help: losses, loaders, scalers, clipping, optimizers and module calls.

`listening` puts hooks and wrappers in place for the time of a pass. They serve the script that has no `attach` in it,
and the calls around a probe that a script makes in its own way. `ModelCalls` follows the model of a probe.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from torch.utils.hooks import BackwardHook, RemovableHandle

from geomprobe.probe.events import Observer, observe
from geomprobe.probe.inert import LocalHook

# What torch.compile says of hooks on all modules; their being called for the compiled one is what they are for.
_TWICE = r"Using `torch.compile\(module\)` when there are global hooks"

_SCALE = "_geomprobe_scale"  # on a scaled loss: (the loss, the scale)

# How many `muted` are entered, in the whole process: hooks run in the threads of autograd and of loaders too.
# Only `muted` writes it.
_entered = 0


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Inside, models run, gradients are taken and loaders are iterated without an event of the run."""
    global _entered
    _entered += 1
    try:
        yield
    finally:
        _entered -= 1


@contextlib.contextmanager
def listening(observer: Observer) -> Iterator[None]:
    """Report to ``observer``, and to it alone, while inside."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    with contextlib.ExitStack() as stack:
        stack.callback(observe, observe(observer))
        for owner, name, report in (
            (torch.autograd, "backward", _backward),
            (Optimizer, "__init__", _make_optimizer),
            (Optimizer, "zero_grad", _zero_grad),
            (Optimizer, "register_step_pre_hook", _register_step_hook),
            (Optimizer, "register_step_post_hook", _register_step_hook),
            (Tensor, "register_hook", _register_hook),
            (BackwardHook, "__init__", _follow_module),
            (saved_tensors_hooks, "__enter__", _save_otherwise),
            (DataLoader, "__init__", _make),
            (DataLoader, "__iter__", _iterate),
            (_BaseDataLoaderIter, "__next__", _next),
        ):
            _replace(stack, owner, name, report, observer)
        for function, name in _CLIPPING:
            for cell in _inner(function):
                _replace(stack, cell, "cell_contents", functools.partial(_clip, name), observer)
        hook = register_optimizer_step_pre_hook(torch.compiler.disable(observer.optimizer_stepping))
        stack.callback(hook.remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=_TWICE)
        modules = _OutermostModules(observer.module_entered)
        stack.callback(modules.stop)
        _follow_scalers(stack, observer)
        yield


def _replace(
    stack: contextlib.ExitStack, owner: Any, name: str, report: Callable[..., Any], observer: Observer
) -> None:
    """Let ``report`` stand in for a function of torch, which it is given to call; inside `muted` only that one runs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if _entered else report(original, observer, *args, **kwargs)

    setattr(owner, name, torch.compiler.disable(either))
    stack.callback(setattr, owner, name, original)


def _follow_scalers(stack: contextlib.ExitStack, observer: Observer) -> None:
    from torch.amp.grad_scaler import GradScaler

    wrapped: set[type] = set()

    def follow(scaler: type) -> None:
        # A subclass, such as FSDP's, may have a `scale` of its own, and the script may import it at any time. So
        # each class that defines one of these methods is wrapped when the first scaler of it is made.
        for owner in scaler.__mro__[: scaler.__mro__.index(GradScaler) + 1]:
            for name, report in _OF_SCALER.items() if owner not in wrapped else ():
                if name in vars(owner):
                    _replace(stack, owner, name, report, observer)
            wrapped.add(owner)

    original_init = GradScaler.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        follow(type(self))
        original_init(self, *args, **kwargs)

    follow(GradScaler)
    GradScaler.__init__ = init  # type: ignore[method-assign]
    stack.callback(setattr, GradScaler, "__init__", original_init)


def unscaled(loss: Tensor) -> tuple[Tensor, Tensor | None]:
    """A loss as the model gave it, and the factor a GradScaler put on it (None without one)."""
    original: tuple[Tensor, Tensor | None] = getattr(loss, _SCALE, (loss, None))
    return original


def tag_scaled(loss: Tensor, factor: Tensor) -> None:
    """Mark a loss that was computed from a scaled one, such as its part under accumulation.

    >>> loss = torch.tensor(8.0)
    >>> tag_scaled(loss, torch.tensor(4.0)); unscaled(loss)
    (tensor(2.), tensor(4.))
    """
    if not hasattr(loss, _SCALE):
        setattr(loss, _SCALE, (loss.detach() / factor, factor))


# Each of the following is called instead of a function of torch, ``original``, with the arguments of the call.


def _backward(original: Callable[..., None], observer: Observer, /, tensors: Any, *args: Any, **kwargs: Any) -> None:
    losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    plain = all(option is None or option is False for option in (*args, *kwargs.values()))
    weights = args[0] if args else kwargs.get("grad_tensors")
    if weights is not None:
        weights = [weights] if isinstance(weights, Tensor) else list(weights)
    observer.backward(losses, functools.partial(original, tensors, *args, **kwargs), plain, weights=weights)


def _make_optimizer(
    original: Callable[..., None], observer: Observer, optimizer: Optimizer, /, *args: Any, **kwargs: Any
) -> None:
    original(optimizer, *args, **kwargs)
    observer.optimizer_made(optimizer)


def _zero_grad(
    original: Callable[..., None], observer: Observer, optimizer: Optimizer, /, *args: Any, **kwargs: Any
) -> None:
    original(optimizer, *args, **kwargs)
    observer.zeroed(optimizer)


def _register_step_hook(
    original: Callable[..., Any], observer: Observer, optimizer: Optimizer, /, *args: Any, **kwargs: Any
) -> Any:
    handle = original(optimizer, *args, **kwargs)
    observer.step_hook_registered(optimizer)
    return handle


def _register_hook(
    original: Callable[..., Any], observer: Observer, tensor: Tensor, /, hook: Callable[[Tensor], Tensor | None]
) -> Any:
    if tensor.is_leaf:  # see `watching_hooks`
        return original(tensor, hook)
    owner = weakref.ref(tensor)

    def reported(gradient: Tensor) -> Tensor | None:
        version = gradient._version
        result = hook(gradient)
        if (result is not None and result is not gradient) or gradient._version != version:
            observer.gradient_changed(owner())
        return result

    return original(tensor, reported)


def _save_otherwise(original: Callable[..., None], observer: Observer, hooks: Any) -> None:
    original(hooks)
    if not getattr(hooks.pack_hook, "__module__", "").startswith("torch."):  # those of torch give back what they got
        observer.saved_otherwise()


def _follow_module(
    original: Callable[..., None], observer: Observer, called: Any, module: Any, hooks: Any, pre_hooks: Any
) -> None:
    """The hooks of one call of a module on the gradients of its outputs and inputs."""

    def reporting(hook: Callable[..., Any]) -> Callable[..., Any]:
        def reported(*args: Any) -> Any:
            result = hook(*args)
            if result is not None:
                observer.gradient_changed(None)
            return result

        return reported

    original(called, module, [reporting(hook) for hook in hooks], [reporting(hook) for hook in pre_hooks])


def _make(
    original: Callable[..., None], observer: Observer, loader: DataLoader[Any], /, *args: Any, **kwargs: Any
) -> None:
    original(loader, *args, **kwargs)
    observer.loader_made(loader)


def _iterate(original: Callable[..., Any], observer: Observer, loader: DataLoader[Any]) -> Any:
    observer.fetching()  # making the iterator draws from the RNG already
    iterator = original(loader)
    observer.loader_iterated(loader, iterator)
    return iterator


def _next(original: Callable[..., Any], observer: Observer, iterator: Any) -> Any:
    observer.fetching()
    came = False
    try:
        batch = original(iterator)
        came = True
        observer.batch_came(iterator)
    except StopIteration:
        observer.loader_ended(iterator)
        raise
    finally:
        observer.fetch_ended(came)
    return batch


def _scale(original: Callable[..., Any], observer: Observer, scaler: Any, /, outputs: Any) -> Any:
    scaled = original(scaler, outputs)
    if isinstance(outputs, Tensor) and scaled is not outputs:
        factor = original(scaler, torch.ones((), device=outputs.device))
        setattr(scaled, _SCALE, (outputs.detach(), factor))
        observer.loss_scaled(factor)
    return scaled


def _unscale(original: Callable[..., None], observer: Observer, scaler: Any, /, optimizer: Any) -> None:
    observer.rescaling(None)
    original(scaler, optimizer)
    observer.rescaled()
    observer.updates.unscaled(optimizer)


def _step(
    original: Callable[..., Any],
    observer: Observer,
    scaler: Any,
    /,
    optimizer: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    with observer.updates.attempting(optimizer) if scaler.is_enabled() else contextlib.nullcontext():
        return original(scaler, optimizer, *args, **kwargs)


def _clip(
    name: str, original: Callable[..., Any], observer: Observer, /, parameters: Any, *args: Any, **kwargs: Any
) -> Any:
    members = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    observer.updates.clipping(name, members)
    observer.rescaling(members if name == "clip_grad_norm_" else [])
    norm = original(members, *args, **kwargs)
    observer.rescaled()
    return norm


_OF_SCALER: dict[str, Callable[..., Any]] = {"scale": _scale, "unscale_": _unscale, "step": _step}

# clip_grad_norm_ calls the first of these too, and a script may know any of them by a name of its own.
_CLIPPING = (
    (clip_grad._clip_grads_with_norm_, "clip_grad_norm_"),
    (clip_grad.clip_grad_value_, "clip_grad_value_"),
)


def _inner(function: Callable[..., Any]) -> list[CellType]:
    """Where a function that runs another without gradients, as these two do, keeps that other one.

    A script that imported the function by name has the function itself: only what is inside it can be replaced.
    """
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return [cell for name, cell in zip(names, cells, strict=True) if name == "func"]


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
        if self._depth == 0 and not evaluating and not _entered and not self._report(module, inputs):
            self.stop()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth -= 1


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
        self._seen = False
        self._parts = None if model is None else {id(part) for part in model.modules()}
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

    def is_part(self, module: nn.Module) -> bool:
        """Whether a module is a part of the model, or may be, where the model is not known."""
        return self._parts is None or id(module) in self._parts

    def remove(self) -> None:
        """See no more of them."""
        while self._handles:
            self._handles.pop().remove()

    def _follow(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(LocalHook(self._entered), with_kwargs=True)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return  # torch.func calls the model with tensors of its own in the parameters' place
        self._seen = True
        if torch.is_grad_enabled() and not _entered:  # evaluation is not part of the step
            self._report((args, kwargs) if kwargs else args)


def _compiled_from(module: nn.Module) -> nn.Module | None:
    """What a module was compiled from, below the wrappers that call it ``module``."""
    compiled = False
    while isinstance(inner := getattr(module, "_orig_mod", None) or getattr(module, "module", None), nn.Module):
        compiled |= hasattr(module, "_orig_mod")
        module = inner
    return module if compiled else None
