"""Learning rates, and what hooks around a step do to rates, gradients and weights."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from behavior.zoo.witness import ALL_OF_LOSS, Witness, batches, loader, loop, mlp, sgd


def rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# Schedules


@loop("rates", "LambdaLR, stepped after the optimizer")
def lambda_lr(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scheduler = LambdaLR(optimizer, lambda t: 0.5**t)
    witness.watch(model, optimizer, scheduler=scheduler)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.1 * 0.5**t)
        optimizer.step()
        scheduler.step()


@loop("rates", "LambdaLR, stepped before the optimizer, as torch warns not to")
def lambda_lr_before(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scheduler = LambdaLR(optimizer, lambda t: 0.5**t)
    witness.watch(model, optimizer, attach=False)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.1 * 0.5 ** (t + 1))
        optimizer.step()


@loop("rates", "OneCycleLR, which cycles the momentum too")
def one_cycle(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
    witness.watch(model, optimizer, scheduler=scheduler)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@loop("rates", "CyclicLR between the backward pass and the step")
def cyclic_in_between(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    scheduler = CyclicLR(optimizer, base_lr=0.01, max_lr=0.2, step_size_up=2)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
        witness.truth(lambda: mse_loss(model(x), y), lr=scheduler.get_last_lr()[0])
        optimizer.step()


@loop("rates", "ReduceLROnPlateau, once an epoch")
def plateau(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0, threshold_mode="abs")
    witness.watch(model, optimizer, attach=False)
    data = loader(count=2)
    for epoch in range(3):
        for x, y in data:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch, lr=[0.1, 0.1, 0.05][epoch])
            optimizer.step()
        scheduler.step(loss.item())


@loop("rates", "warm-up by hand before each step, then a schedule by epochs")
def warm_up_by_hand(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    probe = witness.watch(model, optimizer, scheduler=scheduler)
    t = 0
    for epoch in probe.epochs(2):
        for x, y in batches():
            if t < 4:
                set_rate(optimizer, 0.1 * (t + 1) / 4)
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch, lr=0.1 * (t + 1) / 4 if t < 4 else 0.01)
            optimizer.step()
            t += 1
        scheduler.step()


@loop("rates", "the rate is changed by hand right after each step")
def changed_after_each_step(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.1 / (t + 1))
        optimizer.step()
        set_rate(optimizer, 0.1 / (t + 2))


@loop("rates", "the rate is another for the time of the step, and comes back after it")
def borrowed_for_the_step(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        set_rate(optimizer, 0.02 * (t + 1))
        witness.truth(lambda: mse_loss(model(x), y), lr=0.02 * (t + 1))
        optimizer.step()
        set_rate(optimizer, 0.1)


def _tensor_rate(witness: Witness, dtype: torch.dtype, attach: bool) -> None:
    model = mlp()
    lr = torch.tensor(0.125, dtype=dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, foreach=False)
    witness.watch(model, optimizer, attach=attach)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.125 * 0.5**t)
        optimizer.step()
        lr.mul_(0.5)


@loop("rates", "a float64 tensor for a rate, halved in place after each step")
def tensor_rate_float64(witness: Witness) -> None:
    _tensor_rate(witness, torch.float64, attach=True)


@loop("rates", "a float32 tensor for a rate, halved in place after each step")
def tensor_rate_float32(witness: Witness) -> None:
    _tensor_rate(witness, torch.float32, attach=False)


@loop("rates", "a rate by Barzilai and Borwein, from NumPy, found between backward and step")
def rate_from_numpy(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, lr=np.float64(0.1))
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        lr = np.float64(0.1) / np.sqrt(1.0 + sum(p.grad.square().sum().item() for p in model.parameters()))
        set_rate(optimizer, lr)
        witness.truth(lambda: mse_loss(model(x), y), lr=float(lr))
        optimizer.step()


# Optimizers that know their own schedule


class WarmsUp(torch.optim.SGD):
    """Finds its rate, and then steps."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        self.taken += 1
        set_rate(self, 0.03 * self.taken)
        return super().step(closure)


class Decays(torch.optim.SGD):
    """Steps, and then lowers its rate."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        set_rate(self, 0.5 * rate(self))
        return found


def _own_schedule(witness: Witness, of: type[torch.optim.SGD], rates: list[float], attach: bool) -> None:
    model = mlp()
    optimizer = of(model.parameters(), lr=0.1)
    witness.watch(model, optimizer, attach=attach)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=rates[t])
        optimizer.step()


@loop("rates", "an optimizer that sets its rate in step, before it uses it", absent={"lr"})
def sets_rate_before_use(witness: Witness) -> None:
    _own_schedule(witness, WarmsUp, [0.03, 0.06, 0.09, 0.12], attach=True)


@loop("rates", "an optimizer that lowers its rate in step, after it has used it", absent={"lr"})
def sets_rate_after_use(witness: Witness) -> None:
    _own_schedule(witness, Decays, [0.1, 0.05, 0.025, 0.0125], attach=True)


@loop("rates", "the same without attach", absent={"lr"})
def sets_rate_after_use_no_attach(witness: Witness) -> None:
    _own_schedule(witness, Decays, [0.1, 0.05, 0.025, 0.0125], attach=False)


# Hooks around the step


def _hooked(
    witness: Witness,
    hook: Callable[[Optimizer, int], None],
    first: bool,
    attach: bool = True,
    pre: bool = True,
    rates: list[float] | None = None,
    changed: bool = False,
    momentum: float = 0.0,
) -> None:
    """A plain loop with a hook of the script, before or after the probe's own.

    The truth of a pre-hook's loop is told at the hook's end: there the optimizer takes the gradient.
    """
    model = mlp()
    optimizer = sgd(model, momentum=momentum)
    current: list[Any] = []

    def before(optimizer: Optimizer, *_: Any) -> None:
        if pre:
            hook(optimizer, current[0])
        t, x, y = current
        loss = lambda: mse_loss(model(x), y)  # noqa: E731
        witness.truth(loss, lr=None if rates is None else rates[t], changed=changed)

    def after(optimizer: Optimizer, *_: Any) -> None:
        hook(optimizer, current[0])

    def register() -> None:
        optimizer.register_step_pre_hook(before)
        if not pre:
            optimizer.register_step_post_hook(after)

    if first:
        register()
    witness.watch(model, optimizer, attach=attach)
    if not first:
        register()
    for t, (x, y) in enumerate(batches()):
        current[:] = t, x, y
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


RISING = [0.01, 0.02, 0.03, 0.04]


def raise_rate(optimizer: Optimizer, t: int) -> None:
    set_rate(optimizer, RISING[t])


def raise_next_rate(optimizer: Optimizer, t: int) -> None:
    set_rate(optimizer, 0.01 * (t + 2))


def halve_gradients(optimizer: Optimizer, t: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.5)


def new_gradients(optimizer: Optimizer, t: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.grad.sign()


def clip_gradients(optimizer: Optimizer, t: int) -> None:
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)


@loop("hooks", "a step pre-hook sets the rate, registered before attach")
def rate_pre_hook_first(witness: Witness) -> None:
    _hooked(witness, raise_rate, first=True, rates=RISING)


@loop("hooks", "a step pre-hook sets the rate, registered after attach")
def rate_pre_hook_last(witness: Witness) -> None:
    _hooked(witness, raise_rate, first=False, rates=RISING)


@loop("hooks", "a step post-hook sets the next rate, registered before attach")
def rate_post_hook_first(witness: Witness) -> None:
    _hooked(witness, raise_next_rate, first=True, pre=False, rates=[0.1, 0.02, 0.03, 0.04])


@loop("hooks", "a step post-hook sets the next rate, registered after attach")
def rate_post_hook_last(witness: Witness) -> None:
    _hooked(witness, raise_next_rate, first=False, pre=False, rates=[0.1, 0.02, 0.03, 0.04])


@loop("hooks", "a step post-hook sets the next rate, no attach")
def rate_post_hook_no_attach(witness: Witness) -> None:
    _hooked(witness, raise_next_rate, first=True, attach=False, pre=False, rates=[0.1, 0.02, 0.03, 0.04])


@loop("hooks", "a step pre-hook halves the gradients, registered before attach", ALL_OF_LOSS)
def gradient_pre_hook_first(witness: Witness) -> None:
    _hooked(witness, halve_gradients, first=True, changed=True)


@loop("hooks", "a step pre-hook halves the gradients, registered after attach", ALL_OF_LOSS)
def gradient_pre_hook_last(witness: Witness) -> None:
    _hooked(witness, halve_gradients, first=False, changed=True)


@loop("hooks", "a step pre-hook halves the gradients, no attach", ALL_OF_LOSS)
def gradient_pre_hook_no_attach(witness: Witness) -> None:
    _hooked(witness, halve_gradients, first=True, attach=False, changed=True)


@loop("hooks", "a step pre-hook puts signs in the place of the gradients, registered after attach", ALL_OF_LOSS)
def signs_pre_hook_last(witness: Witness) -> None:
    _hooked(witness, new_gradients, first=False, changed=True, momentum=0.5)


@loop("hooks", "a step pre-hook clips, registered before attach", ALL_OF_LOSS)
def clip_pre_hook_first(witness: Witness) -> None:
    _hooked(witness, clip_gradients, first=True, changed=True)


@loop("hooks", "a step pre-hook clips, registered after attach", ALL_OF_LOSS)
def clip_pre_hook_last(witness: Witness) -> None:
    _hooked(witness, clip_gradients, first=False, changed=True)


@loop("hooks", "a pre-hook of all optimizers halves the gradients, no attach", ALL_OF_LOSS)
def gradient_global_pre_hook(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: halve_gradients(optimizer, 0))
    current: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: witness.truth(lambda: mse_loss(model(current[0]), current[1]), changed=True)
    )
    witness.watch(model, optimizer, attach=False)
    try:
        for x, y in batches():
            current[:] = x, y
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
    finally:
        handle.remove()


@loop("hooks", "a post-hook of all optimizers sets the next rate")
def rate_global_post_hook(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: set_rate(optimizer, 0.5 * rate(optimizer)))
    witness.watch(model, optimizer)
    try:
        for t, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y), lr=0.1 * 0.5**t)
            optimizer.step()
    finally:
        handle.remove()


# Weights that move in a hook: the gradient is of those before, and the row of those that the update starts from.


def _weights(witness: Witness, decay: Callable[[Tensor], Any], first: bool, attach: bool) -> None:
    model = mlp()
    optimizer = sgd(model)
    current: list[Any] = []

    def before(*_: Any) -> None:
        value = mse_loss(model(current[0]), current[1]).detach()
        for p in model.parameters():
            decay(p)
        # The loss is one of other weights, and here no more than a number.
        witness.truth(lambda: value + 0.0 * sum(p.sum() for p in model.parameters()), hessian=False, changed=True)

    if first:
        optimizer.register_step_pre_hook(before)
    witness.watch(model, optimizer, attach=attach)
    if not first:
        optimizer.register_step_pre_hook(before)
    for x, y in batches():
        current[:] = x, y
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


@torch.no_grad()
def decayed(p: Tensor) -> None:
    p.mul_(0.9)


def decayed_by_data(p: Tensor) -> None:
    p.data.mul_(0.9)


@loop("hooks", "weight decay in a step pre-hook, registered before attach", ALL_OF_LOSS)
def weights_pre_hook_first(witness: Witness) -> None:
    _weights(witness, decayed, first=True, attach=True)


@loop("hooks", "weight decay in a step pre-hook, registered after attach", ALL_OF_LOSS)
def weights_pre_hook_last(witness: Witness) -> None:
    _weights(witness, decayed, first=False, attach=True)


@loop("hooks", "weight decay through .data in a step pre-hook, no attach", ALL_OF_LOSS)
def weights_data_pre_hook_no_attach(witness: Witness) -> None:
    _weights(witness, decayed_by_data, first=True, attach=False)


@loop("hooks", "weight decay through .data in a step pre-hook, registered after attach", ALL_OF_LOSS)
def weights_data_pre_hook_last(witness: Witness) -> None:
    _weights(witness, decayed_by_data, first=False, attach=True)


def _clamped(witness: Witness, clamp: Callable[[Tensor], Any], first: bool) -> None:
    model = mlp()
    optimizer = sgd(model)

    def after(*_: Any) -> None:
        for p in model.parameters():
            clamp(p)

    if first:
        optimizer.register_step_post_hook(after)
    witness.watch(model, optimizer)
    if not first:
        optimizer.register_step_post_hook(after)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("hooks", "weights are clamped in a step post-hook, registered before attach")
def clamp_post_hook_first(witness: Witness) -> None:
    _clamped(witness, lambda p: p.detach().clamp_(-0.3, 0.3), first=True)


@loop("hooks", "weights are clamped in a step post-hook, registered after attach")
def clamp_post_hook_last(witness: Witness) -> None:
    _clamped(witness, lambda p: p.detach().clamp_(-0.3, 0.3), first=False)


@loop("hooks", "weights are clamped before each step's forward pass")
def clamped_before_forward(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.05)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        for p in model.parameters():
            p.data.clamp_(-0.3, 0.3)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


def _forever(parts: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from parts


@loop("rates", "a schedule by steps in a generator that never ends, momentum changed by hand too")
def rate_and_momentum_by_hand(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    witness.watch(model, optimizer)
    stream = _forever(batches(2))
    for t in range(5):
        optimizer.param_groups[0].update(lr=0.1 / (1 + t), momentum=0.1 * t)
        x, y = next(stream)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.1 / (1 + t))
        optimizer.step()


class Borrows(torch.optim.SGD):
    """Halves its rate for the parent's step, and puts it back."""

    def step(self, closure: Any = None) -> Any:
        kept = rate(self)
        set_rate(self, 0.5 * kept)
        found = super().step(closure)
        set_rate(self, kept)
        return found


@loop("rates", "an optimizer that halves its rate within step, and puts it back", absent={"lr"})
def borrows_within_step(witness: Witness) -> None:
    _own_schedule(witness, Borrows, [0.05] * 4, attach=True)


@loop("rates", "the same without attach", absent={"lr"})
def borrows_within_step_no_attach(witness: Witness) -> None:
    _own_schedule(witness, Borrows, [0.05] * 4, attach=False)


@loop("hooks", "a pre-hook doubles the rate and a post-hook halves it, registered before attach")
def rate_hooks_in_pairs(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda optimizer, *_: set_rate(optimizer, 2.0 * rate(optimizer)))
    optimizer.register_step_post_hook(lambda optimizer, *_: set_rate(optimizer, 0.5 * rate(optimizer)))
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), lr=0.2)
        optimizer.step()
