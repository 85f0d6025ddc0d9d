"""Parameters that are frozen, tied, replaced, moved, shared, or of an unusual kind."""

# ruff: noqa: B023  (the witness evaluates a loss at once)

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, mse_loss
from torch.nn.utils import (
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    vector_to_parameters,
)

from behavior.zoo.more_parts import Opaque, copies, put_back
from behavior.zoo.witness import ALL_OF_LOSS, HG, Witness, batches, loop, mlp, sgd


def step_on(witness: Witness, model: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """A plain step."""
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    witness.truth(lambda: mse_loss(model(x), y))
    optimizer.step()


def train(
    witness: Witness,
    model: Any,
    optimizer: torch.optim.Optimizer,
    attach: bool = True,
    before: Callable[[int], Any] = lambda t: None,
    steps: int = 4,
) -> None:
    """Plain steps, with something before each."""
    witness.watch(model if isinstance(model, nn.Module) else None, optimizer, attach=attach)
    for t, (x, y) in enumerate(batches(steps)):
        before(t)
        step_on(witness, model, optimizer, x, y)


# Frozen


@loop("freezing", "a layer is frozen in the middle, momentum goes on moving it")
def frozen_in_the_middle(witness: Witness) -> None:
    model = mlp()
    train(witness, model, sgd(model, momentum=0.9), before=lambda t: model[0].requires_grad_(t < 2))


@loop("freezing", "a layer is frozen and thawed, no attach")
def frozen_and_thawed(witness: Witness) -> None:
    model = mlp()
    train(witness, model, sgd(model), attach=False, before=lambda t: model[2].requires_grad_(t != 2), steps=5)


@loop("freezing", "gradual unfreezing from the head down")
def gradual_unfreezing(witness: Witness) -> None:
    model = mlp(3, 3, 3, 1)
    model.requires_grad_(False)
    train(
        witness,
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        before=lambda t: model[max(0, 4 - 2 * t)].requires_grad_(True),
    )


@loop("freezing", "a layer goes without a step by p.grad = None after the backward pass", ALL_OF_LOSS)
def gradient_taken_away(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        if t % 2:
            for p in model[0].parameters():
                p.grad = None
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("freezing", "a frozen layer keeps its last gradient, which the optimizer uses on and on", ALL_OF_LOSS)
def stale_gradient_of_frozen(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            model[0].requires_grad_(False)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = None
        mse_loss(model(x), y).backward()
        witness.truth((lambda: mse_loss(model(x), y)) if t < 2 else None)
        optimizer.step()


@loop("freezing", "frozen by requires_grad = False between the forward pass and the backward pass")
def frozen_after_forward(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for t, (x, y) in enumerate(batches()):
        model.requires_grad_(True)
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        if t % 2:
            model[2].bias.requires_grad_(False)
        loss.backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("freezing", "the layer that is trained is another one each step")
def one_layer_in_turn(witness: Witness) -> None:
    model = mlp(3, 3, 3, 1)

    def choose(t: int) -> None:
        for index, layer in enumerate((model[0], model[2], model[4])):
            layer.requires_grad_(index == t % 3)

    train(witness, model, sgd(model), before=choose)


@loop("freezing", "a parameter that no loss uses")
def unused_parameter(witness: Witness) -> None:
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    train(witness, model, sgd(model, weight_decay=0.1), attach=False)


@loop("freezing", "a low-rank update of a frozen layer")
def low_rank_adaptation(witness: Witness) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(3, 4).double().requires_grad_(False)
            self.a = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
            self.b = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
            self.head = nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.base(x) + x @ self.a.T @ self.b.T))

    model = Adapted()
    train(witness, model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05))


# Tied and shared


@loop("shared parameters", "tied weights, in and out")
def tied_weights(witness: Witness) -> None:
    first, last = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    last.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), last, nn.Linear(3, 1).double())
    train(witness, model, sgd(model), attach=False)


@loop(
    "shared parameters",
    "weights are tied after attach, and the optimizer holds the one that is left out",
    refused="another tensor",
)
def tied_after_attach(witness: Witness) -> None:
    first, last = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    model = nn.Sequential(first, nn.Tanh(), last, nn.Linear(3, 1).double())
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    last.weight = first.weight
    for x, y in batches():
        step_on(witness, model, optimizer, x, y)


@loop("shared parameters", "two parameters are halves of one memory, and so are their gradients")
def one_flat_memory(witness: Witness) -> None:
    model = mlp()
    members = list(model.parameters())
    memory = torch.cat([p.detach().reshape(-1) for p in members])
    slopes = torch.zeros_like(memory)
    begin = 0
    for p in members:
        p.data = memory[begin : begin + p.numel()].view_as(p)
        p.grad = slopes[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        slopes.zero_()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("shared parameters", "the name of a parameter outside the model is one of the model's own")
def colliding_name(witness: Witness) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4).double()
            self.group0 = nn.Module()
            self.group0.parameter3 = nn.Parameter(torch.randn(4, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.first(x)) @ self.group0.parameter3

    model = Odd()
    temperature = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)  # it is the fourth of group 0
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x) * temperature, y).backward()
        witness.truth(lambda: mse_loss(model(x) * temperature, y))
        optimizer.step()


@loop("shared parameters", "the parameters of two modules in one optimizer, attach to the first")
def two_modules_attach(witness: Witness) -> None:
    body, head = mlp(3, 4), mlp(4, 1)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    witness.watch(body, optimizer)
    for x, y in batches():
        step_on(witness, lambda x: head(torch.tanh(body(x))), optimizer, x, y)


@loop("shared parameters", "two modules with equal names in one optimizer, no attach")
def two_modules_no_attach(witness: Witness) -> None:
    body, head = mlp(3, 3), mlp(3, 1)
    optimizer = torch.optim.Adam([{"params": body.parameters()}, {"params": head.parameters(), "lr": 0.01}], lr=0.05)
    witness.watch(None, optimizer, attach=False)
    for x, y in batches():
        step_on(witness, lambda x: head(torch.tanh(body(x))), optimizer, x, y)


@loop("shared parameters", "an optimizer over plain tensors, no module, attach(None)")
def plain_tensors(witness: Witness) -> None:
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    train(witness, lambda x: torch.tanh(x @ w) @ v, torch.optim.SGD([w, v], lr=0.1))


@loop("shared parameters", "an optimizer over plain tensors, no module, no attach")
def plain_tensors_no_attach(witness: Witness) -> None:
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    train(witness, lambda x: torch.tanh(x @ w) @ v, torch.optim.Adam([w, v], lr=0.1), attach=False)


# Replaced


@loop(
    "replaced parameters",
    "load_state_dict(assign=True) before the first step, the optimizer holds the old tensors",
    refused="The parameters changed before step",
)
def assigned_before_training(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, weight_decay=0.1)
    witness.watch(model, optimizer)
    model.load_state_dict({k: v.clone() for k, v in mlp().state_dict().items()}, assign=True)
    for x, y in batches():
        optimizer.zero_grad()
        model.zero_grad()
        mse_loss(model(x), y).backward()
        # Nothing that the optimizer moves is in the loss.
        zero = sum(p.sum() for p in optimizer.param_groups[0]["params"])
        witness.truth(lambda: mse_loss(model(x), y) + 0.0 * zero)
        optimizer.step()


@loop(
    "replaced parameters",
    "load_state_dict(assign=True) of a layer between steps, its old gradients stay",
    refused="The parameters changed before step",
)
def assigned_between_steps(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            model[0].load_state_dict(copy.deepcopy(model[0].state_dict()), assign=True)
        model.zero_grad()  # which does not reach the old tensors
        mse_loss(model(x), y).backward()
        witness.truth((lambda: mse_loss(model(x), y)) if t < 2 else None)
        optimizer.step()


def _replace_first(model: nn.Sequential) -> nn.Parameter:
    model[0].weight = nn.Parameter(0.5 * model[0].weight.detach())
    return model[0].weight


@loop(
    "replaced parameters",
    "module.weight = Parameter(...) between steps, the optimizer holds the old one",
    refused="another tensor",
)
def parameter_replaced(witness: Witness) -> None:
    model = mlp()
    train(witness, model, sgd(model), before=lambda t: _replace_first(model) if t == 2 else None)


@loop(
    "replaced parameters",
    "module.weight = Parameter(...) between steps, and the optimizer is given the new one",
    refused="The parameters changed before step",
)
def parameter_replaced_in_both(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)

    def replace(t: int) -> None:
        if t == 2:
            optimizer.param_groups[0]["params"][0] = _replace_first(model)

    train(witness, model, optimizer, before=replace)


@loop("replaced parameters", "the same before the first step", refused="The parameters changed before step")
def parameter_replaced_before_training(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)

    def replace(t: int) -> None:
        if t == 0:
            optimizer.param_groups[0]["params"][0] = _replace_first(model)

    train(witness, model, optimizer, before=replace)


@loop("replaced parameters", "the same without attach", refused="The parameters changed before step")
def parameter_replaced_in_both_no_attach(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def replace(t: int) -> None:
        if t == 2:
            optimizer.param_groups[0]["params"][0] = _replace_first(model)

    train(witness, model, optimizer, before=replace, attach=False)


@loop(
    "replaced parameters",
    "load_state_dict(assign=True), and the optimizer is given the new tensors",
    refused="The parameters changed before step",
)
def assigned_in_both(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model, momentum=0.5)
    witness.watch(model, optimizer)
    kept = copy.deepcopy(model.state_dict())
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            model.load_state_dict(kept, assign=True)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        step_on(witness, model, optimizer, x, y)


class Quantized(nn.Module):
    """VQ-VAE as it is commonly written: averages of the codes are a new Parameter in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
        self.codebook = nn.Embedding(4, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        nearest = torch.cdist(z, self.codebook.weight).argmin(1)
        code = self.codebook.weight[nearest].detach()
        with torch.no_grad():
            moved = self.codebook.weight.index_add(0, nearest, 0.01 * (z - code))
        self.codebook.weight = nn.Parameter(moved)
        return self.decoder(z + (code - z).detach()), mse_loss(code, z)


@loop("replaced parameters", "VQ-VAE: the codebook is a new Parameter in each forward pass", refused="another tensor")
def codebook_replaced_in_forward(witness: Witness) -> None:
    model = Quantized()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    witness.watch(model, optimizer)
    for x, y in batches():
        with torch.no_grad():
            z = model.encoder(x)
            code = model.codebook.weight[torch.cdist(z, model.codebook.weight).argmin(1)]
        optimizer.zero_grad()
        out, commitment = model(x)
        (mse_loss(out, y) + 0.25 * commitment).backward()
        # What is detached is a constant.
        loss = lambda: mse_loss(model.decoder(model.encoder(x) + (code - z)), y)  # noqa: E731
        witness.truth(lambda: loss() + 0.25 * mse_loss(code, model.encoder(x)))
        optimizer.step()


# Moved


@loop("moved parameters", "p.data = other memory between steps, the same object")
def data_exchanged(witness: Witness) -> None:
    model = mlp()

    def exchange(t: int) -> None:
        for p in model.parameters():
            p.data = 0.9 * p.data

    train(witness, model, sgd(model, momentum=0.5), before=exchange)


@loop("moved parameters", "p.data = other memory between the backward pass and the step", ALL_OF_LOSS)
def data_exchanged_before_step(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        for p in model.parameters():
            p.data = 0.9 * p.data
        value = loss.detach()
        witness.truth(lambda: value + 0.0 * sum(p.sum() for p in model.parameters()), hessian=False, changed=True)
        optimizer.step()


@loop("moved parameters", "noise on the weights through .data between the forward and the backward pass", ALL_OF_LOSS)
def data_between_forward_and_backward(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        for p in model.parameters():
            p.data.mul_(1.1)
        loss.backward()
        value = loss.detach()
        witness.truth(lambda: value + 0.0 * sum(p.sum() for p in model.parameters()), hessian=False, changed=True)
        optimizer.step()


@loop("moved parameters", "load_state_dict of the best weights between steps")
def best_weights_restored(witness: Witness) -> None:
    model = mlp()
    best = copy.deepcopy(model.state_dict())
    train(witness, model, sgd(model), before=lambda t: t == 2 and model.load_state_dict(best))


@loop("moved parameters", "an average of the weights is copied into the model every other step, no attach")
def average_copied_in(witness: Witness) -> None:
    model = mlp()
    average = copies(model.parameters())

    def swap(t: int) -> None:
        for mean, p in zip(average, model.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.5)
        if t % 2:
            put_back(model.parameters(), average)

    train(witness, model, sgd(model), before=swap, attach=False)


@loop("moved parameters", "the model and all becomes float32 in the middle", HG, refused="w_T|float32")
def precision_lowered(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            model.float()
        x, y = x.to(model[0].weight.dtype), y.to(model[0].weight.dtype)
        optimizer.zero_grad()
        mse_loss(Opaque.apply(model(x)), y).backward()
        witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("moved parameters", "a parameter is given more rows", refused="had shape")
def parameter_resized(witness: Witness) -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (_, y) in enumerate(batches()):
        if t == 2:
            model[0].weight.data = torch.cat([model[0].weight.data, torch.zeros(1, 2).double()])
            model[0].weight.grad = None
        step_on(witness, lambda x: model(x), optimizer, torch.arange(6) % (4 + t // 2), y)


@loop("moved parameters", "the whole model is saved by torch.save at each step")
def whole_model_saved(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        step_on(witness, model, optimizer, x, y)
        torch.save(model, io.BytesIO())


# Unusual kinds


@loop("kinds of parameters", "weight_norm, whose second derivative torch has wrong", HG)
def weight_norm(witness: Witness) -> None:
    model = mlp()
    parametrizations.weight_norm(model[0])
    train(witness, model, sgd(model))


@loop("kinds of parameters", "spectral_norm, whose buffers move in each forward pass")
def spectral_norm(witness: Witness) -> None:
    model = mlp()
    parametrizations.spectral_norm(model[0])
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        model.eval()  # the power iteration of this forward pass is over
        witness.truth(lambda: mse_loss(model(x), y))
        model.train()
        optimizer.step()


@loop("kinds of parameters", "an orthogonal parametrization")
def orthogonal(witness: Witness) -> None:
    model = mlp(3, 3, 1)
    parametrizations.orthogonal(model[0])
    train(witness, model, sgd(model))


@loop("kinds of parameters", "a ParameterList, a ParameterDict with a slash, a scalar and an empty parameter")
def containers(witness: Witness) -> None:
    class Contained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList([torch.randn(3, 3).double(), torch.randn(3, 1).double()])
            self.named = nn.ParameterDict({"a/b": torch.tensor(0.7).double(), "none": torch.empty(0, 2).double()})

        def forward(self, x: Tensor) -> Tensor:
            return self.named["a/b"] * torch.tanh(x @ self.layers[0]) @ self.layers[1] + self.named["none"].sum()

    model = Contained()
    train(witness, model, sgd(model))


@loop("kinds of parameters", "transposed and channels-last parameters")
def strided_parameters(witness: Witness) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.Parameter(torch.randn(2, 3, 2, 2).double().to(memory_format=torch.channels_last))
            self.read = nn.Parameter(torch.randn(2, 1).double().T)

        def forward(self, x: Tensor) -> Tensor:
            planes = x[:, :, None, None] * torch.linspace(0.5, 1.5, 4).double().reshape(1, 1, 2, 2)
            return linear(torch.tanh(nn.functional.conv2d(planes, self.filters)).flatten(1), self.read)

    model = Strided()
    train(witness, model, torch.optim.Adam(model.parameters(), lr=0.05))


@loop("kinds of parameters", "float64, float32 and bfloat16 parameters in one optimizer", HG)
def mixed_types(witness: Witness) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).float()
            self.third = nn.Linear(3, 1).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.second(torch.tanh(self.first(x)).float()))
            return Opaque.apply(self.third(x.bfloat16()).double())

    model = Mixed()
    train(witness, model, sgd(model, momentum=0.5))


@loop("kinds of parameters", "sparse gradients of an embedding, SGD")
def sparse_sgd(witness: Witness) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Linear(3, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for t, (_, y) in enumerate(batches()):
        step_on(witness, model, optimizer, (torch.arange(6) * (t + 1)) % 5, y)


@loop("kinds of parameters", "sparse gradients of an embedding, SparseAdam, no attach")
def sparse_adam(witness: Witness) -> None:
    model = nn.Embedding(5, 1, sparse=True).double()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.05)
    witness.watch(model, optimizer, attach=False)
    for t, (_, y) in enumerate(batches()):
        step_on(witness, lambda x: model(x).exp(), optimizer, (torch.arange(6) * (t + 1)) % 5, y)


@loop("kinds of parameters", "an embedding that the forward pass itself renormalizes", HG)
def renormalized_embedding(witness: Witness) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Tanh(), nn.Linear(3, 1)).double()
    optimizer = sgd(model, lr=0.5)
    witness.watch(model, optimizer)
    for _, y in batches():
        tokens = torch.arange(6) % 5
        optimizer.zero_grad()
        mse_loss(model(tokens), y).backward()
        witness.truth(lambda: mse_loss(model[2](torch.tanh(model[0].weight[tokens])), y))
        optimizer.step()


@loop("kinds of parameters", "complex parameters", refused="complex")
def complex_parameters(witness: Witness) -> None:
    w = nn.Parameter(torch.randn(3, 1, dtype=torch.complex128))
    optimizer = torch.optim.SGD([w], lr=0.1)
    witness.watch(None, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss((x.to(torch.complex128) @ w).abs(), y).backward()
        optimizer.step()


@loop("kinds of parameters", "a real parameter that passes through an FFT")
def through_an_fft(witness: Witness) -> None:
    w = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def model(x: Tensor) -> Tensor:
        return (torch.fft.rfft(x, n=4) * torch.fft.rfft(w)).abs().square().sum(1, keepdim=True)

    train(witness, model, torch.optim.SGD([w], lr=0.001))


@loop("kinds of parameters", "a buffer that the script trains by hand beside the optimizer")
def buffer_trained_by_hand(witness: Witness) -> None:
    model = mlp()
    model.register_buffer("center", torch.zeros(1, dtype=torch.float64))
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x) + model.center, y).backward()
        witness.truth(lambda: mse_loss(model(x) + model.center, y))
        optimizer.step()
        with torch.no_grad():
            model.center += 0.1 * (y - model(x)).mean()


@loop("kinds of parameters", "a hypernetwork's output is the model's weights")
def hypernetwork(witness: Witness) -> None:
    model, code = mlp(3, 2, 1), nn.Parameter(torch.randn(3, dtype=torch.float64))
    model.requires_grad_(False)
    make = nn.Linear(3, sum(p.numel() for p in model.parameters())).double()
    optimizer = torch.optim.SGD([code, *make.parameters()], lr=0.05)
    sizes = [p.numel() for p in model.parameters()]

    def run(x: Tensor) -> Tensor:
        parts = make(torch.tanh(code)).split(sizes)
        weights = {k: part.view_as(p) for (k, p), part in zip(model.named_parameters(), parts, strict=True)}
        return functional_call(model, weights, (x,))

    witness.watch(make, optimizer)
    for x, y in batches():
        step_on(witness, run, optimizer, x, y)


@loop("kinds of parameters", "a new leaf each step, whose gradient is handed to the optimizer's tensor", ALL_OF_LOSS)
def new_leaf_each_step(witness: Witness) -> None:
    master = [p.detach().clone().requires_grad_() for p in mlp().parameters()]
    optimizer = torch.optim.SGD(master, lr=0.1)
    witness.watch(None, optimizer)

    def run(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(linear(torch.tanh(linear(x, *weights[:2])), *weights[2:]), y)

    for x, y in batches():
        leaves = [p.detach().clone().requires_grad_() for p in master]
        run(leaves, x, y).backward()
        for p, leaf in zip(master, leaves, strict=True):
            p.grad = leaf.grad
        witness.truth(lambda: run(master, x, y))
        optimizer.step()


@loop(
    "kinds of parameters",
    "a lazy layer, which the first forward pass after attach gives its shape",
    refused="does not know its shape yet",
)
def lazy_layer(witness: Witness) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(4, dtype=torch.float64), nn.Tanh(), nn.LazyLinear(1, dtype=torch.float64))
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    model(batches()[0][0])
    for x, y in batches():
        step_on(witness, model, optimizer, x, y)


@loop("kinds of parameters", "a lazy layer, no attach")
def lazy_layer_no_attach(witness: Witness) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(4, dtype=torch.float64), nn.Tanh(), nn.LazyLinear(1, dtype=torch.float64))
    train(witness, model, sgd(model), attach=False)


@loop(
    "kinds of parameters",
    "torch's pruning in the middle: the parameter has another name from then on",
    refused="buffers changed",
)
def pruned_by_torch(witness: Witness) -> None:
    model = mlp()

    def before(t: int) -> None:
        if t == 2:
            prune.l1_unstructured(model[0], "weight", amount=0.5)
        if t == 4:
            prune.remove(model[0], "weight")

    optimizer = sgd(model, momentum=0.5)
    witness.watch(model, optimizer)
    for t in range(6):
        x, y = batches()[t % 4]
        before(t)
        step_on(witness, model, optimizer, x, y)


@loop("kinds of parameters", "a parametrization is put on between steps: the parameter moves elsewhere in the model")
def parametrized_in_the_middle(witness: Witness) -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2.0 * w

        def right_inverse(self, w: Tensor) -> Tensor:
            return 0.5 * w

    model = mlp()

    def before(t: int) -> None:
        if t == 2:
            parametrize.register_parametrization(model[0], "weight", Doubled())

    train(witness, model, sgd(model), before=before)


@loop("kinds of parameters", "weights of losses that are learned, outside the model")
def learned_loss_weights(witness: Witness) -> None:
    model = mlp()
    logs = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": model.parameters()}, {"params": [logs], "lr": 0.1}], lr=0.05)
    witness.watch(model, optimizer)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        first, second = mse_loss(out, y), mse_loss(out, y.roll(1, 0))
        return (-logs).exp() @ torch.stack([first, second]) + logs.sum()

    for x, y in batches():
        optimizer.zero_grad()
        loss(x, y).backward()
        witness.truth(lambda: loss(x, y))
        optimizer.step()


@loop("kinds of parameters", "a learned prompt, put before the inputs of a frozen model")
def learned_prompt(witness: Witness) -> None:
    model = mlp().requires_grad_(False)
    prompt = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([prompt], lr=0.5)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        step_on(witness, lambda x: model(x + prompt), optimizer, x, y)


@loop("moved parameters", "vector_to_parameters makes all parameters views of one vector, between steps")
def views_of_a_vector(witness: Witness) -> None:
    model = mlp()

    def before(t: int) -> None:
        vector_to_parameters(0.9 * parameters_to_vector(model.parameters()).detach(), model.parameters())

    train(witness, model, sgd(model, momentum=0.9), before=before)


@loop("moved parameters", "weights are initialized once more after attach, before the first step")
def initialized_after_attach(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    for x, y in batches():
        step_on(witness, model, optimizer, x, y)


@loop("moved parameters", "a forward pass that normalizes its weights through .data", HG)
def normalized_in_forward(witness: Witness) -> None:
    class Normalized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data / self.weight.data.norm(dim=1, keepdim=True)
            return super().forward(x)

    model = nn.Sequential(Normalized(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        witness.truth(lambda: mse_loss(model[1:](linear(x, model[0].weight, model[0].bias)), y))
        optimizer.step()


@loop("moved parameters", "the model's memory format is changed in the middle")
def memory_format_changed(witness: Witness) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 1)).double()
    planes = torch.linspace(0.5, 1.5, 4).double().reshape(1, 1, 2, 2)
    optimizer = sgd(model, momentum=0.5)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            model.to(memory_format=torch.channels_last)
        step_on(witness, lambda x: model(x[:, :, None, None] * planes), optimizer, x, y)


@loop("freezing", "backward(inputs=...) for the last layer only", ALL_OF_LOSS)
def backward_into_some(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward(inputs=list(model[2].parameters()))
        witness.truth(lambda: mse_loss(model[2](model[:2](x).detach()), y), hessian=False)
        optimizer.step()


@loop("freezing", "stochastic depth: a layer is left out at random, and has no gradient then")
def stochastic_depth(witness: Witness) -> None:
    model = mlp(3, 3, 3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        kept = bool(torch.rand(()) < 0.5)

        def run(x: Tensor) -> Tensor:
            h = torch.tanh(model[0](x))
            return model[4](torch.tanh(model[2](h)) + h if kept else h)

        step_on(witness, run, optimizer, x, y)


@loop("freezing", "the whole model is frozen for a step, whose loss is of a free input")
def frozen_for_an_attack(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        bad = x.clone().requires_grad_()
        model.requires_grad_(False)
        mse_loss(model(bad), y).backward()
        model.requires_grad_(True)
        bad = (bad + 0.1 * bad.grad.sign()).detach()
        optimizer.zero_grad()
        mse_loss(model(bad), y).backward()
        witness.truth(lambda: mse_loss(model(bad), y))
        optimizer.step()


@loop("freezing", "the same, and zero_grad comes before the attack", ALL_OF_LOSS)
def frozen_for_an_attack_after_zero_grad(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer, attach=False)
    for x, y in batches():
        optimizer.zero_grad()
        bad = x.clone().requires_grad_()
        model.requires_grad_(False)
        mse_loss(model(bad), y).backward()
        model.requires_grad_(True)
        bad = (bad + 0.1 * bad.grad.sign()).detach()
        mse_loss(model(bad), y).backward()
        witness.truth(lambda: mse_loss(model(bad), y))
        optimizer.step()


@loop("kinds of parameters", "real parameters that the model reads as complex ones")
def complex_by_real_parameters(witness: Witness) -> None:
    w = nn.Parameter(torch.randn(3, 1, 2, dtype=torch.float64))

    def model(x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ torch.view_as_complex(w)).abs().square()

    train(witness, model, torch.optim.SGD([w], lr=0.01))


@loop(
    "kinds of parameters",
    "an integer parameter without gradients, which the optimizer is given too",
    refused="only dense real parameters",
)
def integer_parameter(witness: Witness) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x[:, self.order])

    model = Indexed()
    train(witness, model, torch.optim.SGD(model.parameters(), lr=0.1))


@loop("kinds of parameters", "a subclass of Parameter")
def parameter_subclass(witness: Witness) -> None:
    class Decayed(nn.Parameter):
        decay = 0.1

    model = mlp()
    model[0].weight = Decayed(model[0].weight.detach().clone())
    train(witness, model, sgd(model), attach=False)


@loop("kinds of parameters", "gradients that are expanded from one number, set by hand", ALL_OF_LOSS)
def expanded_gradients(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        for p in model.parameters():
            p.grad = p.grad.mean().expand_as(p)
        witness.truth(lambda: mse_loss(model(x), y), changed=True)
        optimizer.step()


@loop("kinds of parameters", "attach to a model that the optimizer does not train")
def attached_to_another_model(witness: Witness) -> None:
    model, other = mlp(), mlp()
    optimizer = sgd(model)
    witness.watch(other, optimizer)
    for x, y in batches():
        step_on(witness, lambda x: model(x) + other(x), optimizer, x, y)


@loop("kinds of parameters", "the weight of a penalty is a plain number, read off the weights")
def penalty_by_item(witness: Witness) -> None:
    model = mlp()
    optimizer = sgd(model)
    witness.watch(model, optimizer)
    for x, y in batches():
        size = model[0].weight.norm().item()
        optimizer.zero_grad()
        (mse_loss(model(x), y) + 0.1 * size * model[2].weight.square().sum()).backward()
        witness.truth(lambda: mse_loss(model(x), y) + 0.1 * size * model[2].weight.square().sum())
        optimizer.step()


@loop("freezing", "every second step is without a gradient: momentum moves on")
def every_second_without_gradient(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        optimizer.zero_grad(set_to_none=False)
        if t % 2:
            witness.truth(None)
        else:
            mse_loss(model(x), y).backward()
            witness.truth(lambda: mse_loss(model(x), y))
        optimizer.step()


@loop("freezing", "a parameter goes over to another group in the middle", refused="parameter groups held")
def moved_to_another_group(witness: Witness) -> None:
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    witness.watch(model, optimizer)
    for t, (x, y) in enumerate(batches()):
        if t == 2:
            first, second = optimizer.param_groups
            second["params"].append(first["params"].pop())
        step_on(witness, model, optimizer, x, y)
