"""Reports what a script does with losses and gradients around a backward pass: it scales, unscales and clips them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import CellType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from geomprobe.probe.hooks.mute import unless_muted
from geomprobe.probe.step_attempts import StepAttempts

_SCALE = "_geomprobe_scale"  # on a scaled loss: (the loss, the scale)


class Listener(Protocol):
    """What a pass does at these events, in the thread that trains."""

    updates: StepAttempts

    def loss_scaled(self, factor: Tensor) -> None: ...


@contextlib.contextmanager
def listening_to_gradients(listener: Listener) -> Iterator[None]:
    """Report to ``listener`` while inside."""
    from torch.amp.grad_scaler import GradScaler

    with contextlib.ExitStack() as stack:
        wrapped: set[type] = set()

        def follow(scaler: type) -> None:
            # A subclass, such as FSDP's, may have a `scale` of its own, and the script may import it at any time. So
            # each class that defines one of these methods is wrapped when the first scaler of it is made.
            for owner in scaler.__mro__[: scaler.__mro__.index(GradScaler) + 1]:
                for name, wrap in _OF_SCALER.items() if owner not in wrapped else ():
                    if (original := vars(owner).get(name)) is not None:
                        setattr(
                            owner,
                            name,
                            torch.compiler.disable(unless_muted(original, wrap(original, listener))),
                        )
                        stack.callback(setattr, owner, name, original)
                wrapped.add(owner)

        original_init = GradScaler.__init__

        @functools.wraps(original_init)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            follow(type(self))
            original_init(self, *args, **kwargs)

        follow(GradScaler)
        GradScaler.__init__ = init  # type: ignore[method-assign]
        stack.callback(setattr, GradScaler, "__init__", original_init)
        for function, name in _CLIPPING:
            for cell in _inner(function):
                clip = cell.cell_contents
                stack.callback(setattr, cell, "cell_contents", clip)
                cell.cell_contents = torch.compiler.disable(unless_muted(clip, _clip(clip, name, listener)))
        yield


def unscaled(loss: Tensor) -> tuple[Tensor, Tensor | None]:
    """A loss as the model gave it, and the factor a GradScaler put on it (None without one).

    >>> unscaled(torch.tensor(2.0))
    (tensor(2.), None)
    """
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


def _scale(original: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    @functools.wraps(original)
    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        if isinstance(outputs, Tensor) and scaled is not outputs:
            factor = original(self, torch.ones((), device=outputs.device))
            setattr(scaled, _SCALE, (outputs.detach(), factor))
            listener.loss_scaled(factor)
        return scaled

    return scale


def _unscale(original: Callable[..., None], listener: Listener) -> Callable[..., None]:
    @functools.wraps(original)
    def unscale(self: Any, optimizer: Any) -> None:
        original(self, optimizer)
        listener.updates.unscaled(optimizer)

    return unscale


def _step(original: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_enabled():
            return original(self, optimizer, *args, **kwargs)
        with listener.updates.attempting(optimizer):
            return original(self, optimizer, *args, **kwargs)

    return step


_OF_SCALER = {"scale": _scale, "unscale_": _unscale, "step": _step}

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


def _clip(original: Callable[..., Any], name: str, listener: Listener) -> Callable[..., Any]:
    @functools.wraps(original)
    def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        members = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        listener.updates.clipping(name, members)
        return original(members, *args, **kwargs)

    return clip
