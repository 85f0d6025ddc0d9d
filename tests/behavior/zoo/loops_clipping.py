"""Loops that clip the gradient, or change or look at it in hooks."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loader, loop, mlp, parts, sgd, simple


def clipped(witness: Witness, clip: Callable[[nn.Module], object], attach: bool = True, **options: Any) -> None:
    """A loop that clips between backward and step."""
    model, optimizer, _ = simple(witness, attach, **options)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        clip(model)
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("clipping", "clip_grad_norm_, epochs of a loader, no attach")
def clip_norm(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False, momentum=0.9)
    data = loader(2)
    for epoch in range(2):
        for x, y in data:
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            clip_grad_norm_(model.parameters(), 0.1)
            witness.truth(lambda: mse_loss(model(x), y), epoch=epoch, changed=True)
            optimizer.step()


@loop("clipping", "clip_grad_norm_ with foreach=False, in the infinity norm")
def clip_infinity_norm(witness: Witness) -> None:
    clipped(witness, lambda model: clip_grad_norm_(model.parameters(), 0.1, norm_type="inf", foreach=False))


@loop("clipping", "clip_grad_value_")
def clip_value(witness: Witness) -> None:
    clipped(witness, lambda model: clip_grad_value_(model.parameters(), 0.05))


@loop("clipping", "get_total_norm, then clip_grads_with_norm_", ALL_OF_LOSS)
def clip_with_norm(witness: Witness) -> None:
    def clip(model: nn.Module) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)

    clipped(witness, clip)


@loop("clipping", "p.grad.data.clamp_(-1, 1) by hand (DQN)", ALL_OF_LOSS)
def clamped_by_hand(witness: Witness) -> None:
    clipped(witness, lambda model: [p.grad.data.clamp_(-0.05, 0.05) for p in model.parameters()], attach=False)


@loop("clipping", "the norm clipped by hand, p.grad.data.mul_(c)", ALL_OF_LOSS)
def norm_clipped_by_hand(witness: Witness) -> None:
    def clip(model: nn.Module) -> None:
        norm = sum(p.grad.data.norm(2).item() ** 2 for p in model.parameters()) ** 0.5
        if norm > 0.1:
            for p in model.parameters():
                p.grad.data.mul_(0.1 / (norm + 1e-6))

    clipped(witness, clip)


@loop("clipping", "each gradient divided by its own norm", ALL_OF_LOSS)
def normalized_by_hand(witness: Witness) -> None:
    clipped(witness, lambda model: [p.grad.div_(p.grad.norm() + 1e-8) for p in model.parameters()])


@loop("clipping", "adaptive clipping by the norm of each weight (AGC)", ALL_OF_LOSS)
def adaptive_clipping(witness: Witness) -> None:
    def clip(model: nn.Module) -> None:
        for p in model.parameters():
            most = 0.01 * p.detach().norm().clamp(min=1e-3)
            p.grad.detach().copy_(torch.where(p.grad.norm() > most, p.grad * (most / p.grad.norm()), p.grad))

    clipped(witness, clip)


@loop("clipping", "clipped by value, then by norm")
def clipped_twice(witness: Witness) -> None:
    def clip(model: nn.Module) -> None:
        clip_grad_value_(model.parameters(), 0.5)
        clip_grad_norm_(model.parameters(), 0.2)

    clipped(witness, clip)


@loop("clipping", "only the head is clipped")
def clip_of_some(witness: Witness) -> None:
    clipped(witness, lambda model: clip_grad_norm_(model[-1].parameters(), 0.05))


@loop("clipping", "each parameter is clipped by itself")
def clip_one_by_one(witness: Witness) -> None:
    clipped(witness, lambda model: [clip_grad_norm_(p, 0.05) for p in model.parameters()], attach=False)


@loop("clipping", "clip_grad_norm_ that only measures the norm: max_norm=inf")
def norm_measured(witness: Witness) -> None:
    clipped(witness, lambda model: clip_grad_norm_(model.parameters(), float("inf")))


@loop("clipping", "clipped after each micro-batch", ALL_OF_LOSS)
def clipped_between_parts(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        for xs, ys in parts(x, y):
            probe.backward(mse_loss(model(xs), ys) / 2)
            clip_grad_norm_(model.parameters(), 0.2)
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("clipping", "clipped in a hook before the optimizer's step, put on after attach", ALL_OF_LOSS)
def clipped_in_pre_hook(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    now: list[Callable[[], Tensor]] = []

    def clip(*_: object) -> None:
        for p in model.parameters():
            p.grad.mul_(0.5)
        witness.truth(now[0], changed=True)

    optimizer.register_step_pre_hook(clip)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        now[:] = [lambda: mse_loss(model(x), y)]
        optimizer.step()


@loop("clipping", "clipped in a hook before the optimizer's step, put on before the first step, no attach", ALL_OF_LOSS)
def clipped_in_early_pre_hook(witness: Witness) -> None:
    model, optimizer, _ = simple(witness, attach=False)
    now: list[Callable[[], Tensor]] = []

    def clip(*_: object) -> None:
        clip_grad_norm_(model.parameters(), 0.1)
        witness.truth(now[0], changed=True)

    optimizer.register_step_pre_hook(clip)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        now[:] = [lambda: mse_loss(model(x), y)]
        optimizer.step()


@loop("clipping", "an optimizer whose own step clips before it calls the parent's", ALL_OF_LOSS)
def clipping_optimizer(witness: Witness) -> None:
    now: list[Callable[[], Tensor]] = []

    class Clipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            clip_grad_norm_(self.param_groups[0]["params"], 0.1)
            witness.truth(now[0], changed=True)
            super().step()

    model = mlp()
    optimizer = Clipping(model.parameters(), lr=0.1)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        now[:] = [lambda: mse_loss(model(x), y)]
        optimizer.step()


# Hooks


def hooked(
    witness: Witness,
    put_on: Callable[[nn.Module], object],
    changed: bool = False,
    attach: bool = True,
    late: bool = False,
    inputs: bool = False,
) -> None:
    """A loop whose model, or parameters, carry hooks; ``late`` puts them on after attach.

    torch warns of backward hooks on a module whose inputs need no gradient; with ``inputs`` they do.
    """
    model = mlp()
    optimizer = sgd(model)
    if not late:
        put_on(model)
    probe = witness.watch(model, optimizer, attach)
    if late:
        put_on(model)
    for x, y in batches():
        x.requires_grad_(inputs)
        optimizer.zero_grad()
        probe.backward(mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y), changed=changed)
        optimizer.step()


def on_each(hook: Callable[..., Any]) -> Callable[[nn.Module], object]:
    return lambda model: [p.register_hook(hook) for p in model.parameters()]


@loop("clipping", "hooks on the parameters that only log (wandb.watch)")
def logging_hooks(witness: Witness) -> None:
    log: list[Tensor] = []
    hooked(witness, on_each(lambda g: log.append(g.detach().histc(4))))


@loop("clipping", "hooks on the parameters that only log, put on after attach, no probe.backward")
def late_logging_hooks(witness: Witness) -> None:
    log: list[float] = []
    hooked(witness, on_each(lambda g: log.append(g.norm().item())), late=True)


@loop("clipping", "hooks on the parameters that return the gradient as it is")
def identity_hooks(witness: Witness) -> None:
    hooked(witness, on_each(lambda g: g), attach=False)


@loop("clipping", "hooks on the parameters that clamp the gradient", ALL_OF_LOSS)
def clamping_hooks(witness: Witness) -> None:
    hooked(witness, on_each(lambda g: g.clamp(-0.05, 0.05)), changed=True)


@loop("clipping", "hooks on the parameters that clamp the gradient, put on after attach, no attach", ALL_OF_LOSS)
def clamping_hooks_without_attach(witness: Witness) -> None:
    hooked(witness, on_each(lambda g: g.clamp(-0.05, 0.05)), changed=True, attach=False)


@loop("clipping", "a hook that masks one parameter's gradient (pruned weights)", ALL_OF_LOSS)
def masking_hook(witness: Witness) -> None:
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    hooked(witness, lambda model: model[0].weight.register_hook(lambda g: g * mask), changed=True)


@loop("clipping", "a hook that clamps, over two micro-batches", ALL_OF_LOSS)
def clamping_hook_over_parts(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.05, 0.05))
    for x, y in batches():
        optimizer.zero_grad()
        for xs, ys in parts(x, y):
            mse_loss(model(xs), ys).backward()
        witness.truth(lambda: 2 * mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("clipping", "post-accumulate-grad hooks that only log")
def logging_after_accumulation(witness: Witness) -> None:
    log: list[float] = []

    def put_on(model: nn.Module) -> None:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: log.append(p.grad.norm().item()))

    hooked(witness, put_on)


@loop("clipping", "post-accumulate-grad hooks that clamp", ALL_OF_LOSS)
def clamped_after_accumulation(witness: Witness) -> None:
    def clamp(p: Tensor) -> None:
        p.grad.clamp_(-0.05, 0.05)

    def put_on(model: nn.Module) -> None:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(clamp)

    hooked(witness, put_on, changed=True)


@loop("clipping", "post-accumulate-grad hooks that scale, put on after attach", ALL_OF_LOSS)
def scaled_after_accumulation(witness: Witness) -> None:
    def put_on(model: nn.Module) -> None:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * 0.5))

    hooked(witness, put_on, changed=True, late=True)


class Between(nn.Module):
    """Body and head, with something done to what passes between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head = mlp(3, 4), mlp(4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.body(x).tanh()))

    def untouched(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def between(witness: Witness, do: Callable[[Tensor], Tensor], changed: bool = True, attach: bool = True) -> None:
    model = Between(do)
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model.untouched(x), y), changed=changed)
        optimizer.step()


@loop("clipping", "a hook on an activation that only logs, and retain_grad")
def activation_logged(witness: Witness) -> None:
    log: list[float] = []

    def do(h: Tensor) -> Tensor:
        h.register_hook(lambda g: log.append(g.norm().item()))
        h.retain_grad()
        return h

    between(witness, do, changed=False)


@loop("clipping", "a hook on an activation halves its gradient", ALL_OF_LOSS)
def activation_gradient_scaled(witness: Witness) -> None:
    def do(h: Tensor) -> Tensor:
        h.register_hook(lambda g: 0.5 * g)
        return h

    between(witness, do)


@loop("clipping", "a hook on an activation clamps its gradient, no attach", ALL_OF_LOSS)
def activation_gradient_clamped(witness: Witness) -> None:
    def do(h: Tensor) -> Tensor:
        h.register_hook(lambda g: g.clamp(-0.02, 0.02))
        return h

    between(witness, do, attach=False)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


@loop("clipping", "gradient reversal layer between body and head (DANN)", ALL_OF_LOSS)
def gradient_reversal(witness: Witness) -> None:
    between(witness, Reversed.apply)


@loop("clipping", "gradient scaled by h * s + (h * (1 - s)).detach()", HG)
def gradient_scaled_by_detach(witness: Witness) -> None:
    model = Between(lambda h: h * 0.5 + (h * 0.5).detach())
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        constant = 0.5 * model.body(x).tanh().detach()
        witness.truth(lambda: mse_loss(model.head(0.5 * model.body(x).tanh() + constant), y))
        optimizer.step()


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.02, 0.02)


@loop("clipping", "a Function that clamps the gradient of an activation", ALL_OF_LOSS)
def gradient_clamped_by_function(witness: Witness) -> None:
    between(witness, Clamped.apply)


@loop("clipping", "a forward hook of a module and a full backward hook that only log")
def module_hooks_log(witness: Witness) -> None:
    log: list[Any] = []

    def put_on(model: nn.Module) -> None:
        for module in model:
            module.register_forward_hook(lambda m, i, o: log.append(o.detach().mean().item()))
            module.register_full_backward_hook(lambda m, i, o: log.append(o[0].norm().item()))

    hooked(witness, put_on, inputs=True)


@loop("clipping", "full backward hooks and pre-hooks that only log, no attach")
def module_backward_hooks_log(witness: Witness) -> None:
    log: list[float] = []

    def put_on(model: nn.Module) -> None:
        for module in model:
            module.register_full_backward_pre_hook(lambda m, o: log.append(o[0].norm().item()))
            module.register_full_backward_hook(lambda m, i, o: log.append(o[0].norm().item()))

    hooked(witness, put_on, attach=False, inputs=True)


@loop("clipping", "a full backward hook that halves what goes into a module (Grad-CAM style surgery)", ALL_OF_LOSS)
def module_hook_scales(witness: Witness) -> None:
    model = Between(lambda h: h)
    model.head.register_full_backward_hook(lambda m, i, o: tuple(None if g is None else 0.5 * g for g in i))
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def plainly(x: Tensor) -> Tensor:
        layer = model.head[0]
        return model.body(x).tanh() @ layer.weight.T + layer.bias

    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(plainly(x), y), changed=True)
        optimizer.step()


@loop("clipping", "a global module backward hook that only logs")
def global_hook_logs(witness: Witness) -> None:
    log: list[float] = []
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, i, o: log.append(o[0].norm().item()))
    try:
        hooked(witness, lambda model: None, inputs=True)
    finally:
        handle.remove()


@loop("clipping", "a hook on the loss doubles the gradient", ALL_OF_LOSS)
def hook_on_loss(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.register_hook(lambda g: 2 * g)
        loss.backward()
        witness.truth(lambda: 2 * mse_loss(model(x), y))
        optimizer.step()


@loop("clipping", "detect_anomaly around the backward pass")
def under_detect_anomaly(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            probe.backward(mse_loss(model(x), y))
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("clipping", "nan gradients replaced by nan_to_num_", ALL_OF_LOSS)
def nan_to_num(witness: Witness) -> None:
    clipped(witness, lambda model: [p.grad.nan_to_num_(0.0) for p in model.parameters()])


@loop("clipping", "gradients of the second order: a hook that logs under retain_graph", HG)
def retained_for_a_log(witness: Witness) -> None:
    model, optimizer, _ = simple(witness)
    log = []
    for x, y in batches():
        optimizer.zero_grad()
        out = model(x)
        loss = mse_loss(out, y)
        loss.backward(retain_graph=True)
        log.append(torch.autograd.grad(loss, out)[0].norm().item())
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


def hooked_and_frozen(witness: Witness, hook: Callable[..., Any], changed: bool, thaw: bool) -> None:
    """A loop whose first layer, whose gradients have hooks, is frozen in the middle."""
    model, optimizer, _ = simple(witness)
    on_each(hook)(model)
    for step, (x, y) in enumerate(batches(5)):
        if step == 2:
            model[0].requires_grad_(False)
        if step == 4 and thaw:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), changed=changed)
        optimizer.step()


@loop("clipping", "hooks that log, on parameters of which some are frozen later")
def logging_hooks_then_frozen(witness: Witness) -> None:
    log: list[float] = []
    hooked_and_frozen(witness, lambda g: log.append(g.norm().item()), changed=False, thaw=False)


@loop("clipping", "hooks that clamp, on parameters of which some are frozen for two steps", ALL_OF_LOSS)
def clamping_hooks_while_frozen(witness: Witness) -> None:
    hooked_and_frozen(witness, lambda g: g.clamp(-0.05, 0.05), changed=True, thaw=True)


@loop("clipping", "hooks put on for each step and taken off after it (gradient norms of some steps)")
def hooks_of_one_step(witness: Witness) -> None:
    model, optimizer, probe = simple(witness)
    log: list[float] = []
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        handles = []
        if step % 2:
            handles = [p.register_hook(lambda g: log.append(g.norm().item())) for p in model.parameters()]
        probe.backward(mse_loss(model(x), y))
        for handle in handles:
            handle.remove()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
