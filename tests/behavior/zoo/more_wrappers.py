"""Models in wrappers, scaled and mixed precision, checkpointing, modes of layers, and recurrence."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from behavior.zoo.more_parts import Opaque
from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loop, mlp, sgd


def train(
    witness: Witness,
    model: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    watched: nn.Module | None = None,
    attach: bool = True,
) -> None:
    """Plain steps."""
    witness.watch(model if watched is None else watched, optimizer, attach=attach)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


# Wrappers


class Wrapped(nn.Module):
    """A model as many frameworks hold it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@loop("wrappers", "DataParallel on the CPU, attach to the wrapper")
def data_parallel(witness: Witness) -> None:
    model = nn.DataParallel(mlp())
    train(witness, model, sgd(model))


@loop("wrappers", "DataParallel on the CPU, attach to the model inside")
def data_parallel_inside(witness: Witness) -> None:
    model = mlp()
    train(witness, nn.DataParallel(model), sgd(model), watched=model)


@loop("wrappers", "a module that holds the model as .module, no attach")
def module_in_module(witness: Witness) -> None:
    model = Wrapped(Wrapped(mlp()))
    train(witness, model, sgd(model), attach=False)


@loop("wrappers", "a second optimizer wrapper holds the optimizer as .optimizer, as accelerate does")
def optimizer_in_wrapper(witness: Witness) -> None:
    class Accelerated(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
        state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = mlp()
    train(witness, model, Accelerated(sgd(model, momentum=0.9)))


@loop("wrappers", "functional_call with a dictionary of tensors")
def functional_training(witness: Witness) -> None:
    model = mlp()
    weights = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    optimizer = torch.optim.Adam(weights.values(), lr=0.05)
    train(witness, lambda x: functional_call(model, weights, (x,)), optimizer, watched=model)


@loop("wrappers", "gradients by torch.func.grad, assigned by hand", ALL_OF_LOSS)
def functional_gradients(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        weights = {k: p.detach() for k, p in model.named_parameters()}
        found = grad(lambda w: mse_loss(functional_call(model, w, (x,)), y))(weights)
        for k, p in model.named_parameters():
            p.grad = found[k]
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("wrappers", "an ensemble by vmap over stacked weights")
def ensemble(witness: Witness) -> None:
    members = [mlp(3, 2, 1) for _ in range(3)]
    weights, buffers = stack_module_state(members)
    base = mlp(3, 2, 1)
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)

    def model(x: Tensor) -> Tensor:
        return vmap(lambda w, b: functional_call(base, (w, b), (x,)))(weights, buffers).mean(0)

    witness.watch(None, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


# Precision


@loop("precision", "autocast to bfloat16 on the CPU", HG)
def autocast(witness: Witness) -> None:
    model = mlp().float()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mse_loss(Opaque.apply(model(x.float())).float(), y.float())

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


def _scaled(
    witness: Witness,
    attach: bool,
    fused: bool = False,
    clip: float | None = None,
    overflow_at: int | None = None,
    accumulate: bool = False,
) -> None:
    model = mlp()
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    witness.watch(model, optimizer, attach=attach, **({"scaler": scaler} if attach else {}))
    for t, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        parts = [(x[:3], y[:3]), (x[3:], y[3:])] if accumulate else [(x, y)]
        loss = lambda: sum(mse_loss(model(a), b) for a, b in parts) / len(parts)  # noqa: E731
        for a, b in parts:
            part = mse_loss(model(a), b) / len(parts)
            scaler.scale(part * 1e308 * 10.0 if t == overflow_at else part).backward()
        scale = scaler.get_scale()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), clip)
            scale = 1.0
        witness.truth(loss, scale=scale, changed=clip is not None)
        scaler.step(optimizer)
        scaler.update()


@loop("precision", "a GradScaler on the CPU")
def scaler_plain(witness: Witness) -> None:
    _scaled(witness, attach=True)


@loop("precision", "a GradScaler with a fused optimizer, no attach")
def scaler_fused(witness: Witness) -> None:
    _scaled(witness, attach=False, fused=True)


@loop("precision", "a GradScaler, unscale_ and clipping, with an overflow")
def scaler_clipped_overflow(witness: Witness) -> None:
    _scaled(witness, attach=True, clip=0.5, overflow_at=2)


@loop("precision", "a GradScaler with a fused optimizer, an overflow at the start")
def scaler_fused_overflow(witness: Witness) -> None:
    _scaled(witness, attach=True, fused=True, overflow_at=0)


@loop("precision", "a GradScaler under accumulation, with an overflow, no attach")
def scaler_accumulated_overflow(witness: Witness) -> None:
    _scaled(witness, attach=False, overflow_at=3, accumulate=True)


@loop("precision", "a GradScaler's update is left out for a step, and the script skips a step by itself", ALL_OF_LOSS)
def scaler_without_update(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    witness.watch(model, optimizer, scaler=scaler)
    for t, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(x), y)).backward()
        if t == 2:
            continue
        scaler.unscale_(optimizer)
        witness.truth(lambda: mse_loss(model(x), y))
        scaler.step(optimizer)
        scaler.update()


# Modes of layers


def _random(witness: Witness, attach: bool) -> None:
    """The truth draws the masks of the training's own forward pass once more."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=attach)
    for x, y in batches():
        optimizer.zero_grad()
        state = torch.get_rng_state()
        mse_loss(model(x), y).backward()

        def again() -> Tensor:
            torch.set_rng_state(state)
            return mse_loss(model(x), y)

        witness.truth(again)
        optimizer.step()


@loop("modes", "dropout")
def dropout(witness: Witness) -> None:
    _random(witness, attach=True)


@loop("modes", "dropout, no attach")
def dropout_no_attach(witness: Witness) -> None:
    _random(witness, attach=False)


@loop("modes", "BatchNorm in training, evaluation in between")
def batch_norm(witness: Witness) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = sgd(model, momentum=0.9)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("modes", "BatchNorm frozen in eval mode after two steps")
def batch_norm_frozen(witness: Witness) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for t, (x, y) in enumerate(batches()):
        model.train(t < 2)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("modes", "every kind of normalization")
def normalizations(witness: Witness) -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 4), nn.GroupNorm(1, 4), nn.Mish(), nn.Linear(4, 1)
    ).double()
    train(witness, model, sgd(model, lr=0.02))


@loop("modes", "an evaluation with gradients, and a backward pass on the inputs only")
def saliency_in_between(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        seen = x.clone().requires_grad_()
        torch.autograd.grad(model(seen).sum(), seen)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


# Recurrence


class Recurrent(nn.Module):
    """A recurrence written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.read = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.cell(torch.cat([x, h], 1)))
        return self.read(h), h[:, :2]


@loop("recurrence", "truncated back-propagation through time: the state is detached between steps")
def truncated_state(witness: Witness) -> None:
    model = Recurrent()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    h = torch.zeros(6, 2, dtype=torch.float64)
    for x, y in batches():
        optimizer.zero_grad()
        out, after = model(x, h)
        mse_loss(out, y).backward()
        witness.truth(lambda: mse_loss(model(x, h)[0], y))
        optimizer.step()
        h = after.detach()


@loop("recurrence", "a loss and a backward pass each time, over one graph that is retained", ALL_OF_LOSS)
def retained_over_time(witness: Witness) -> None:
    model = Recurrent()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    parts = batches()

    def unrolled(start: int) -> list[Tensor]:
        h, losses = torch.zeros(6, 2, dtype=torch.float64), []
        for x, y in parts[start : start + 2]:
            out, h = model(x, h)
            losses.append(mse_loss(out, y))
        return losses

    for start in (0, 2, 1):
        optimizer.zero_grad()
        for loss in unrolled(start):
            loss.backward(retain_graph=True)
        witness.truth(lambda: sum(unrolled(start)))
        optimizer.step()


@loop("recurrence", "the whole unrolled sequence in one backward pass")
def unrolled_in_one(witness: Witness) -> None:
    model = Recurrent()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def loss(shift: int) -> Tensor:
        h, total = torch.zeros(6, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for x, y in batches():
            out, h = model(x + shift, h)
            total = total + mse_loss(out, y)
        return total

    for t in range(3):
        optimizer.zero_grad()
        loss(t).backward()
        witness.truth(lambda: loss(t))
        optimizer.step()


@loop("recurrence", "torch's GRU and LSTM")
def gru_and_lstm(witness: Witness) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.lstm = nn.GRU(3, 2).double(), nn.LSTM(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.gru(x[None].expand(2, -1, -1))[0])[0].sum((0, 2))[:, None]

    model = Both()
    train(witness, model, sgd(model))


@loop("recurrence", "a fixed point, unrolled")
def fixed_point_unrolled(witness: Witness) -> None:
    model = Recurrent()

    def run(x: Tensor) -> Tensor:
        h = torch.zeros(6, 2, dtype=torch.float64)
        for _ in range(8):
            out, h = model(x, h)
        return out

    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(run(x), y).backward()
        witness.truth(lambda: mse_loss(run(x), y))
        optimizer.step()


def _equilibrium(model: Recurrent, x: Tensor) -> Tensor:
    h = torch.zeros(6, 2, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(40):
            _, h = model(x, h)
    return h


@loop("recurrence", "a deep equilibrium whose gradient takes one step from the fixed point, which is a constant", HG)
def equilibrium_one_step(witness: Witness) -> None:
    model = Recurrent()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        at = _equilibrium(model, x)
        mse_loss(model(x, at)[0], y).backward()
        witness.truth(lambda: mse_loss(model(x, at)[0], y))
        optimizer.step()


@loop("recurrence", "a deep equilibrium whose gradient is solved for in a hook", HG)
def equilibrium_by_hook(witness: Witness) -> None:
    model = Recurrent()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def run(x: Tensor) -> Tensor:
        at = _equilibrium(model, x)
        h = model(x, at)[1]
        if h.requires_grad:
            start = at.detach().requires_grad_()
            again = model(x, start)[1]

            def solve(gradient: Tensor) -> Tensor:
                found = gradient
                for _ in range(20):
                    found = gradient + torch.autograd.grad(again, start, found, retain_graph=True)[0]
                return found

            h.register_hook(solve)
        return h.sum(1, keepdim=True)

    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(run(x), y).backward()
        witness.truth(lambda: mse_loss(run(x), y))
        optimizer.step()


@loop("recurrence", "the state is kept with its graph over steps of an optimizer that moves p.data", ALL_OF_LOSS)
def state_not_detached(witness: Witness) -> None:
    class ByData(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)

    model = Recurrent()
    optimizer = ByData(model.parameters())
    witness.watch(model, optimizer)
    h = torch.zeros(6, 2, dtype=torch.float64)
    for x, y in batches():
        optimizer.zero_grad()
        before = h.detach()
        out, h = model(x, h)
        mse_loss(out, y).backward(retain_graph=True)
        witness.truth(lambda: mse_loss(model(x, before)[0], y), changed=True, hessian=False)
        optimizer.step()


@loop("checkpointing", "checkpoint(use_reentrant=False) around dropout and BatchNorm")
def checkpoint_of_noise(witness: Witness) -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh())
    model = nn.Sequential(block, nn.Linear(4, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches(5)):
        model.train(t < 4)  # at last the running statistics count
        optimizer.zero_grad()
        state = torch.get_rng_state()
        mse_loss(model[1](checkpoint(block, x, use_reentrant=False)), y).backward()

        def again() -> Tensor:
            torch.set_rng_state(state)
            return mse_loss(model(x), y)

        witness.truth(again)
        optimizer.step()


@loop("modes", "evaluation under inference_mode between the forward pass and the backward pass")
def inference_in_between(witness: Witness) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        with torch.inference_mode():
            model.eval()
            model(x)
            model.train()
        loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("modes", "two forward passes through BatchNorm, and the loss of the second")
def two_forward_passes(witness: Witness) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        hard = (model(x) - y).detach().abs().argsort(0)[2:, 0]
        optimizer.zero_grad()
        mse_loss(model(x[hard]), y[hard]).backward()
        witness.truth(lambda: mse_loss(model(x[hard]), y[hard]))
        optimizer.step()


@loop("wrappers", "the model is called by parts, never as a whole, no attach")
def called_by_parts(witness: Witness) -> None:
    model = mlp(3, 3, 3, 1)
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        h = x
        for layer in model:
            h = layer(h)
        mse_loss(h, y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("wrappers", "the loss module holds the model and returns a dictionary, as in transformers")
def loss_in_the_model(witness: Witness) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, *, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            out = self.body(inputs)
            return {"out": out} if labels is None else {"out": out, "loss": mse_loss(out, labels)}

    model = WithLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    witness.watch(model, optimizer)
    for x, y in batches():
        model(inputs=x, labels=y)["loss"].backward()
        witness.truth(lambda: model(inputs=x, labels=y)["loss"])
        optimizer.step()
        optimizer.zero_grad()


@loop("precision", "a GradScaler whose scale is large enough to overflow at each second step", ALL_OF_LOSS)
def scaler_of_every_second(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, growth_factor=4.0, backoff_factor=0.5)
    witness.watch(model, optimizer, scaler=scaler)
    for t, (x, y) in enumerate(batches(6)):
        optimizer.zero_grad(set_to_none=False)
        loss = mse_loss(model(x), y)
        scaler.scale(loss * float("inf") if t % 2 else loss).backward()
        witness.truth(lambda: mse_loss(model(x), y), scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()


@loop("precision", "a GradScaler that is not enabled, no attach")
def scaler_not_enabled(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        witness.truth(lambda: mse_loss(model(x), y))
        scaler.step(optimizer)
        scaler.update()


@loop("precision", "a scaled loss beside one that is not", ALL_OF_LOSS)
def scaled_and_unscaled(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    witness.watch(model, optimizer, scaler=scaler)
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(x), y)).backward()
        (0.1 * model[0].weight.square().sum()).backward()
        scaler.unscale_(optimizer)
        witness.truth(lambda: mse_loss(model(x), y) + 0.1 * model[0].weight.square().sum() / 2.0**3)
        scaler.step(optimizer)
        scaler.update()


@loop(
    "precision",
    "the gradients are divided by the scaler's scale by hand, and the optimizer steps by itself",
    ALL_OF_LOSS,
)
def unscaled_by_hand(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(x), y)).backward()
        for p in model.parameters():
            p.grad /= scaler.get_scale()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("precision", "a GradScaler's scale changes between two micro-batches of a step", ALL_OF_LOSS)
def scale_changed_within_step(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    witness.watch(model, optimizer, scaler=scaler)
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(mse_loss(model(x[:3]), y[:3])).backward()
        scaler.update(new_scale=16.0)
        scaler.scale(mse_loss(model(x[3:]), y[3:])).backward()
        scaler.unscale_(optimizer)
        witness.truth(lambda: 0.25 * mse_loss(model(x[:3]), y[:3]) + mse_loss(model(x[3:]), y[3:]))
        scaler.step(optimizer)
        scaler.update(new_scale=4.0)
