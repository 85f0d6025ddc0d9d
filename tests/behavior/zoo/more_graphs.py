"""Graphs that hide something: custom functions, estimators, hooks, memory that is used again, losses of higher order.

Hg is of the loss as the script evaluates it. Where the second derivative of the graph is another, it must be absent.
"""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gumbel_softmax, linear, mse_loss, scaled_dot_product_attention, sigmoid
from torch.nn.utils import parametrizations

from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loop, mlp, sgd


class Body(nn.Module):
    """Two linear layers with any function in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 4).double(), nn.Linear(4, 1).double(), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def train(witness: Witness, between: Callable[[Tensor], Tensor], attach: bool = True, hessian: bool = True) -> None:
    """Plain steps of such a model."""
    model = Body(between)
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=attach)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), hessian=hessian)
        optimizer.step()


# Custom functions


class SavedInput(Function):
    """SiLU as torch's notes would write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class InputOnContext(Function):
    """The same, with the input on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x * sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        s = sigmoid(ctx.x)
        return gradient * s * (1 + ctx.x * (1 - s))


class DetachedInputOnContext(Function):
    """The same, with a detached input on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * sigmoid(x)

    backward = InputOnContext.backward


class SavedIntermediate(Function):
    """The same, with the slope kept that the forward pass has found already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = sigmoid(x)
        ctx.save_for_backward(s * (1 + x * (1 - s)))
        return x * s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradient * slope


class IntermediateOnContext(Function):
    """The same, with the sigmoid on ctx, and the input saved as it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.s = sigmoid(x)
        return x * ctx.s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * ctx.s * (1 + x * (1 - ctx.s))


class SavedOutput(Function):
    """A sigmoid from its saved output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = sigmoid(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return gradient * out * (1 - out)


class OutputOnContext(Function):
    """A sigmoid from its output on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.out = sigmoid(x)
        return ctx.out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.out * (1 - ctx.out)


class ConstantOnContext(Function):
    """A mask on ctx, as a constant should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mask = torch.linspace(0.5, 1.5, x.shape[1], dtype=x.dtype)
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.mask


class Once(Function):
    """A tanh without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return gradient * (1 - out**2)


class WithoutGradients(Function):
    """A tanh whose backward turns gradients off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            slope = 1 - torch.tanh(x) ** 2
        return gradient * slope


class InNumPy(Function):
    """A tanh by NumPy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy()).tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(gradient.detach().numpy() * (1 - x.detach().tanh() ** 2).numpy())


class Recomputed(Function):
    """Checkpointing as it was written before torch had it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = torch.sin(x)
        return torch.autograd.grad(out, x, gradient)[0]


class StraightThrough(Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@loop("functions", "a function that saves its input for backward", HG)
def function_saves_input(witness: Witness) -> None:
    train(witness, SavedInput.apply)


@loop("functions", "a function with its input on ctx", HG)
def function_input_on_ctx(witness: Witness) -> None:
    train(witness, InputOnContext.apply)


@loop("functions", "a function with its detached input on ctx", HG)
def function_detached_input_on_ctx(witness: Witness) -> None:
    train(witness, DetachedInputOnContext.apply)


@loop("functions", "a function that saves its slope for backward", HG)
def function_saves_slope(witness: Witness) -> None:
    train(witness, SavedIntermediate.apply)


@loop("functions", "a function with an intermediate on ctx", HG)
def function_intermediate_on_ctx(witness: Witness) -> None:
    train(witness, IntermediateOnContext.apply)


@loop("functions", "the same without attach", HG)
def function_intermediate_no_attach(witness: Witness) -> None:
    train(witness, IntermediateOnContext.apply, attach=False)


@loop("functions", "a function that saves its output for backward", HG)
def function_saves_output(witness: Witness) -> None:
    train(witness, SavedOutput.apply)


@loop("functions", "a function with its output on ctx", HG)
def function_output_on_ctx(witness: Witness) -> None:
    train(witness, OutputOnContext.apply)


@loop("functions", "a function with a constant on ctx", HG)
def function_constant_on_ctx(witness: Witness) -> None:
    train(witness, lambda x: torch.tanh(ConstantOnContext.apply(x)))


@loop("functions", "a once_differentiable function", HG)
def function_once(witness: Witness) -> None:
    train(witness, Once.apply)


@loop("functions", "a function whose backward is under no_grad", HG)
def function_without_gradients(witness: Witness) -> None:
    train(witness, WithoutGradients.apply)


@loop("functions", "a function by NumPy", HG)
def function_in_numpy(witness: Witness) -> None:
    train(witness, InNumPy.apply)


@loop("functions", "a function that runs forward again in its backward", HG)
def function_recomputed(witness: Witness) -> None:
    train(witness, Recomputed.apply)


@loop("functions", "a function with a hidden intermediate is used in the second step only", HG)
def function_used_late(witness: Witness) -> None:
    calls = []

    def between(x: Tensor) -> Tensor:
        return SavedIntermediate.apply(x) if len(calls) else torch.tanh(x)

    model = Body(between)
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()
        calls.append(1)


# Estimators: the gradient is that of a surrogate, in which what is detached is a constant


@loop("estimators", "a straight-through estimator as a function", HG)
def rounding_function(witness: Witness) -> None:
    model = Body(StraightThrough.apply)
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        h = model.first(x).detach()
        rest = StraightThrough.apply(h) - h
        witness.truth(lambda: mse_loss(model.second(model.first(x) + rest), y))
        optimizer.step()


@loop("estimators", "quantized weights with straight-through gradients", HG)
def quantization_aware(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor, quantized: Callable[[str, Tensor], Tensor]) -> Tensor:
        weights = {name: quantized(name, p) for name, p in model.named_parameters()}
        return mse_loss(functional_call(model, weights, (x,)), y)

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y, lambda name, p: StraightThrough.apply(p)).backward()
        rest = {name: (StraightThrough.apply(p) - p).detach() for name, p in model.named_parameters()}
        witness.truth(lambda: loss(x, y, lambda name, p: p + rest[name]))
        optimizer.step()


@loop("estimators", "labels that the model itself gave before, under no_grad, are data")
def pseudo_labels(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        with torch.no_grad():
            labels = 0.5 * model(x + 0.1) + 0.5 * y
        optimizer.zero_grad()
        mse_loss(model(x), labels).backward()
        witness.truth(lambda: mse_loss(model(x), labels))
        optimizer.step()


# Hooks that change what the model gives


@loop("model hooks", "a forward hook that changes a layer's output")
def forward_hook(witness: Witness) -> None:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: 0.5 * out + 0.1 * out**2)
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("model hooks", "a forward pre-hook that changes the model's input, put on after attach")
def forward_pre_hook(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 0.3,))
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


# Memory that is used again


@loop("memory", "activations in place")
def inplace_activation(witness: Witness) -> None:
    train(witness, lambda x: torch.sin_(x.clone().mul_(1.5)))


@loop("memory", "ReLU in place, no attach")
def inplace_relu(witness: Witness) -> None:
    train(witness, nn.ReLU(inplace=True), attach=False)


Fill = Callable[[Tensor, Tensor], Any]


def _one_buffer(witness: Witness, fill: Fill, before_step: bool, attach: bool = True) -> None:
    """Each batch is written into the same memory, either before its step or right after its backward pass."""
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=attach)
    parts = batches()
    inputs = parts[0][0].clone()
    for t, (x, y) in enumerate(parts):
        if not before_step:
            fill(inputs, x)
        optimizer.zero_grad()
        mse_loss(model(inputs), y).backward()
        if before_step:
            fill(inputs, parts[(t + 1) % len(parts)][0])
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("memory", "each batch is copied into one buffer")
def one_input_buffer(witness: Witness) -> None:
    _one_buffer(witness, lambda to, x: to.copy_(x), before_step=False)


@loop("memory", "the next batch is copied into the buffer before the step", HG)
def next_batch_before_step(witness: Witness) -> None:
    _one_buffer(witness, lambda to, x: to.copy_(x), before_step=True)


@loop("memory", "the next batch is copied into the buffer's .data before the step", HG)
def next_batch_by_data(witness: Witness) -> None:
    _one_buffer(witness, lambda to, x: to.data.copy_(x), before_step=True)


def _through_numpy(to: Tensor, x: Tensor) -> None:
    to.numpy()[:] = x.numpy()


@loop("memory", "the next batch is written into the buffer by NumPy before the step, no attach", HG)
def next_batch_by_numpy(witness: Witness) -> None:
    _one_buffer(witness, _through_numpy, before_step=True, attach=False)


@loop("memory", "the inputs are zeroed through .data before the step", HG)
def inputs_zeroed_by_data(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        inputs = x.clone()
        optimizer.zero_grad()
        mse_loss(model(inputs), y).backward()
        inputs.data.zero_()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("memory", "targets are written over between backward pass and step", HG)
def targets_written_over(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        labels = y.clone()
        mse_loss(model(x) ** 2, labels).backward()
        labels.data.fill_(5.0)
        witness.truth(lambda: mse_loss(model(x) ** 2, y))
        optimizer.step()


@loop("memory", "MoCo: a queue of keys is a buffer, and is written through .data in the forward pass", HG)
def queue_of_keys(witness: Witness) -> None:
    model = mlp(3, 4, 2)
    model.register_buffer("queue", torch.randn(8, 2, dtype=torch.float64))
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def logits(x: Tensor, queue: Tensor) -> Tensor:
        return torch.tanh(model(x) @ queue.T)

    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        queue = model.queue.clone()
        mse_loss(logits(x, model.queue), y.expand(-1, 8)).backward()
        model.queue.data[2 * t % 8 : 2 * t % 8 + 2] = model(x)[:2].detach()
        witness.truth(lambda: mse_loss(logits(x, queue), y.expand(-1, 8)))
        optimizer.step()


# Losses of higher order


@loop("higher order", "a gradient penalty on the inputs, inside the loss")
def input_gradient_penalty(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.05)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = model(x)
        slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
        return mse_loss(out, y) + 0.1 * (slope.norm(dim=1) - 1).square().mean()

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("higher order", "a penalty on the gradient by the weights, inside the loss, no attach")
def weight_gradient_penalty(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.05)
    witness.watch(model, optimizer, attach=False)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = mse_loss(model(x), y)
        slopes = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value + 0.05 * sum(slope.square().sum() for slope in slopes)

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("higher order", "a physical model: the loss is of derivatives of the output")
def physics_informed(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    witness.watch(model, optimizer)

    def loss(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = model(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0][:, 0]
        return (second + u[:, 0]).square().mean() + u.square().mean()

    for x, _ in batches():
        optimizer.zero_grad()
        loss(x).backward()
        witness.truth(lambda: loss(x))
        optimizer.step()


@loop("higher order", "the gradient of a learned rate through an inner step")
def learned_inner_rate(witness: Witness) -> None:
    model = mlp()
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), rate], lr=0.05)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        slopes = torch.autograd.grad(mse_loss(model(x), y), list(weights.values()), create_graph=True)
        after = {k: p - rate * g for (k, p), g in zip(weights.items(), slopes, strict=True)}
        return mse_loss(functional_call(model, after, (x.flip(0),)), y.flip(0))

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("higher order", "an adversarial example inside the step, found by autograd.grad")
def adversarial_by_grad(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        seen = x.clone().requires_grad_()
        bad = x + 0.1 * torch.autograd.grad(mse_loss(model(seen), y), seen)[0].sign()
        optimizer.zero_grad()
        mse_loss(model(bad), y).backward()
        witness.truth(lambda: mse_loss(model(bad), y))
        optimizer.step()


@loop("higher order", "a penalty on the Jacobian by torch.func.jacrev of the model")
def jacobian_by_func(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.05)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        slopes = torch.func.vmap(torch.func.jacrev(lambda one: model(one)))(x)
        return mse_loss(model(x), y) + 0.1 * slopes.square().mean()

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("higher order", "a penalty on a directional derivative by forward-mode differentiation", HG)
def directional_derivative(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.05)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with warnings.catch_warnings(), forward_ad.dual_level():
            warnings.simplefilter("ignore")  # torch's, of its own
            out, slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
            return mse_loss(out, y) + 0.1 * slope.square().mean()

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("higher order", "a Hessian-vector product inside the loss")
def curvature_penalty(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, lr=0.02)
    witness.watch(model, optimizer, attach=False)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value, weights = mse_loss(model(x), y), list(model.parameters())
        slopes = torch.autograd.grad(value, weights, create_graph=True)
        turned = torch.autograd.grad(sum(s.sum() for s in slopes), weights, create_graph=True)
        return value + 0.01 * sum(t.square().sum() for t in turned)

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("estimators", "a variational autoencoder's own noise")
def variational(witness: Witness) -> None:
    encoder, decoder = mlp(3, 4), mlp(2, 3)
    model = nn.ModuleList([encoder, decoder])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    witness.watch(model, optimizer)

    def loss(x: Tensor) -> Tensor:
        mean, log = encoder(x).chunk(2, 1)
        out = decoder(mean + (0.5 * log).exp() * torch.randn_like(mean))
        return mse_loss(out, x) + 0.1 * (mean**2 + log.exp() - log - 1).mean()

    for x, _ in batches():
        optimizer.zero_grad()
        state = torch.get_rng_state()
        loss(x).backward()

        def again() -> Tensor:
            torch.set_rng_state(state)
            return loss(x)

        witness.truth(again)
        optimizer.step()


@loop("estimators", "hard Gumbel samples with the gradient of soft ones", HG)
def gumbel_hard(witness: Witness) -> None:
    model = mlp(3, 4, 3)
    table = torch.linspace(-1.0, 1.0, 3).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def samples(x: Tensor, state: Tensor, hard: bool) -> Tensor:
        torch.set_rng_state(state)
        return gumbel_softmax(model(x), tau=0.7, hard=hard)

    for x, y in batches():
        optimizer.zero_grad()
        state = torch.get_rng_state()
        mse_loss(samples(x, state, hard=True) @ table, y[:, 0]).backward()
        rest = (samples(x, state, hard=True) - samples(x, state, hard=False)).detach()
        witness.truth(lambda: mse_loss((samples(x, state, hard=False) + rest) @ table, y[:, 0]))
        optimizer.step()


@loop("estimators", "each loss is divided by its own detached value")
def balanced_losses(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        return torch.stack([mse_loss(out, y), (out - y.roll(1, 0)).abs().sqrt().mean()])

    for x, y in batches():
        optimizer.zero_grad()
        found = losses(x, y)
        sizes = found.detach().clone()
        (found / found.detach()).sum().backward()
        witness.truth(lambda: (losses(x, y) / sizes).sum())
        optimizer.step()


@loop("estimators", "spectral normalization by hand, whose norm is detached", HG)
def detached_norm(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)

    def run(x: Tensor, norm: Tensor) -> Tensor:
        return model[1:](linear(x, model[0].weight / norm, model[0].bias))

    for x, y in batches():
        norm = torch.linalg.matrix_norm(model[0].weight, 2).detach()
        optimizer.zero_grad()
        mse_loss(run(x, norm), y).backward()
        witness.truth(lambda: mse_loss(run(x, norm), y))
        optimizer.step()


@loop("memory", "hidden values are written into one buffer at each step, and read from it by the loss", HG)
def hidden_in_one_buffer(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    table = torch.zeros(6, 5, dtype=torch.float64)
    for x, y in batches():
        optimizer.zero_grad()
        table = table.detach()
        table[:] = torch.tanh(model[0](x))
        mse_loss(model[2](table), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("memory", "a class weight that lives in a buffer is updated through .data before the step", HG)
def class_weights_in_buffer(witness: Witness) -> None:
    model = mlp(3, 4, 3)
    model.register_buffer("weights", torch.ones(3, dtype=torch.float64))
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        labels = (y[:, 0] > 0).long() + (y[:, 0] > 1).long()
        optimizer.zero_grad()
        weights = model.weights.clone()
        cross_entropy(model(x), labels, weight=model.weights).backward()
        model.weights.data.add_(torch.bincount(labels, minlength=3))
        witness.truth(lambda: cross_entropy(model(x), labels, weight=weights))
        optimizer.step()


@loop("memory", "the loss's own weight is a tensor that is written over before the step", HG)
def loss_weight_written_over(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    weight = torch.tensor(1.0, dtype=torch.float64)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        (weight * mse_loss(model(x), y)).backward()
        weight.data.fill_(1.0 / (t + 2))
        witness.truth(lambda: mse_loss(model(x), y) / (t + 1))
        optimizer.step()


@loop("functions", "two functions with hidden intermediates in one graph", HG)
def functions_in_a_row(witness: Witness) -> None:
    train(witness, lambda x: SavedIntermediate.apply(IntermediateOnContext.apply(x)))


@loop("functions", "a hidden term that is 0 at the first step, and not later", HG)
def function_with_late_error(witness: Witness) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate = mlp(3, 4, 1), nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.gate.square() * SavedIntermediate.apply(self.body[0](x)).sum(1, keepdim=True)

    model = Late()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        if t == 1:
            with torch.no_grad():
                model.gate.fill_(1.0)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("functions", "torch's own weight_norm of a convolution, no attach", HG)
def weight_norm_of_convolution(witness: Witness) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(1, 2, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
    model = model.double()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x[:, None]), y).backward()
        witness.truth(lambda: mse_loss(model(x[:, None]), y))
        optimizer.step()


@loop("functions", "attention by the kernel that torch chooses", HG)
def fused_attention(witness: Witness) -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(3, 6), "out": nn.Linear(2, 1)}).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)

    def run(x: Tensor) -> Tensor:
        q, k, v = model["qkv"](x)[None].chunk(3, 2)
        return model["out"](scaled_dot_product_attention(q, k, v))[0]

    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(run(x), y).backward()
        witness.truth(lambda: mse_loss(run(x), y))
        optimizer.step()


@loop(
    "estimators", "feedback alignment: other weights are in p.data for the backward pass, and only there", ALL_OF_LOSS
)
def feedback_alignment(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    fixed = torch.linspace(-0.5, 0.7, model[2].weight.numel()).double().view_as(model[2].weight)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        kept = model[2].weight.detach().clone()
        model[2].weight.data.copy_(fixed)
        loss.backward()
        model[2].weight.data.copy_(kept)
        witness.truth(lambda: mse_loss(model(x), y), changed=True, hessian=False)
        optimizer.step()


@loop("estimators", "gradients are reversed through .data; those of the first token are 0", ALL_OF_LOSS)
def reversed_with_zero_first(witness: Witness) -> None:
    model = nn.Embedding(5, 2).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for _, y in batches():
        tokens = torch.arange(6) % 4 + 1  # 0 is for padding
        loss = lambda: mse_loss(model(tokens).prod(1, keepdim=True), y)  # noqa: E731
        optimizer.zero_grad()
        loss().backward()
        model.weight.grad.data.neg_()
        witness.truth(lambda: -loss())
        optimizer.step()


@loop("functions", "a function after one linear layer: what its second derivative lacks is symmetric", HG)
def function_at_the_end(witness: Witness) -> None:
    model = nn.Linear(3, 1).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(SavedIntermediate.apply(model(x)), y).backward()
        witness.truth(lambda: mse_loss(SavedIntermediate.apply(model(x)), y))
        optimizer.step()


@loop("functions", "torch's weight_norm in a second head, which is used at each second step", HG)
def weight_norm_at_each_second_step(witness: Witness) -> None:
    model = nn.ModuleList([mlp(3, 4, 1), nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))])
    model = model.double()
    optimizer = sgd(model, lr=0.02)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches(10)):
        head = model[t % 2]
        optimizer.zero_grad()
        mse_loss(head(x).tanh(), y).backward()
        witness.truth(lambda: mse_loss(head(x).tanh(), y))
        optimizer.step()


@loop(
    "memory", "a target network's soft update through .data between backward pass and step, which the loss has used", HG
)
def target_network_moved(witness: Witness) -> None:
    model, target = mlp(), mlp().requires_grad_(False)
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        kept = {name: p.detach().clone() for name, p in target.named_parameters()}
        loss = lambda weights: mse_loss(functional_call(target, weights, (model(x) * x,)), y)  # noqa: E731
        optimizer.zero_grad()
        mse_loss(target(model(x) * x), y).backward()
        for p, q in zip(target.parameters(), model.parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)
        witness.truth(lambda: loss(kept))
        optimizer.step()


def _clamp_data(gradient: Tensor) -> None:
    gradient.data.clamp_(-0.02, 0.02)


@loop("model hooks", "a parameter's hook clamps gradient.data", ALL_OF_LOSS)
def hook_clamps_data(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for p in model.parameters():
        p.register_hook(_clamp_data)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("model hooks", "a hook after accumulation clamps p.grad.data, no attach", ALL_OF_LOSS)
def accumulated_hook_clamps_data(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: _clamp_data(p.grad))
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("model hooks", "a hook on a hidden tensor clamps gradient.data", HG)
def hidden_hook_clamps_data(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        hidden = model[:2](x)
        hidden.register_hook(_clamp_data)
        mse_loss(model[2](hidden), y).backward()
        witness.truth(lambda: mse_loss(model(x), y), changed=True, hessian=False)
        optimizer.step()


def _noise_in_forward(witness: Witness, module: bool, back_before_backward: bool) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model if module else None, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        kept = [p.detach().clone() for p in model.parameters()]
        if back_before_backward:
            for p in model.parameters():
                p.data.mul_(1.2)
        h = x
        for layer in model:  # by parts
            h = layer(h)
        loss = mse_loss(h, y)
        if back_before_backward:
            for p, value in zip(model.parameters(), kept, strict=True):
                p.data.copy_(value)
        else:
            for p in model.parameters():
                p.data.mul_(1.2)
        loss.backward()
        value = loss.detach()
        witness.truth(lambda: value + 0.0 * sum(p.sum() for p in model.parameters()), changed=True, hessian=False)
        optimizer.step()


@loop("memory", "layers are called with noise in p.data, which is gone before the backward pass", ALL_OF_LOSS)
def noise_in_forward_by_parts(witness: Witness) -> None:
    _noise_in_forward(witness, module=True, back_before_backward=True)


@loop("memory", "the same with attach(None)", ALL_OF_LOSS)
def noise_in_forward_no_module(witness: Witness) -> None:
    _noise_in_forward(witness, module=False, back_before_backward=True)


@loop("memory", "p.data moves between the calls of the layers and the backward pass", ALL_OF_LOSS)
def moved_after_forward_by_parts(witness: Witness) -> None:
    _noise_in_forward(witness, module=True, back_before_backward=False)
