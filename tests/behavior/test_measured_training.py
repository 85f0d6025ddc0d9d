"""Whole trainings, with Hg measured at each step and without: every bit that they leave behind is the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.hessian_cases import Attention, convolutional, gated, gradients, mlp, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geomprobe.measure.curvature.hessian_gradient import Curvature
from geomprobe.reproducibility.isolation import capture_rng


class Trace:
    """Everything a training leaves behind, for bitwise comparison."""

    def __init__(self):
        self.tensors: list[Tensor] = []
        self.route: str | None = None

    def add(self, *tensors):
        self.tensors += [t if t is None else t.detach().clone() for t in tensors]

    def same_as(self, other: Trace) -> bool:
        return len(self.tensors) == len(other.tensors) and all(map(same_bits, self.tensors, other.tensors))


class Measured:
    """A training's backward and step with the measurement around them, or none."""

    def __init__(self, route: str | None, parameters, module):
        self.curvature = Curvature(parameters, module) if route else None
        self.forced = route == "closure"
        self.parameters = parameters
        self.products: list[list[Tensor]] = []

    def backward(self, loss, closure=None, rng=None, scale=None):
        if self.curvature is None:
            loss.backward()
            return
        if self.forced:
            self.curvature.route = "closure"
        self.curvature.backward(loss, closure=closure if self.forced else None, rng=rng, scale=scale)

    def measure(self):
        if self.curvature is not None:
            vectors = gradients(self.parameters)
            before = [None if v is None else v.detach().clone() for v in vectors]
            self.products.append(self.curvature.product(vectors))
            assert all(map(same_bits, before, vectors))
            assert all(p.grad is v for p, v in zip(self.parameters, vectors, strict=True))


def train(route: str | None, build: Callable[[], nn.Module], shape, *, steps=4, prepare=None, **options) -> Trace:
    torch.manual_seed(11)
    random.seed(1)
    np.random.seed(1)
    model = build()
    extra = prepare(model) if prepare is not None else []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimized = parameters[options.get("first", 0) :]
    optimizer = torch.optim.Adam(optimized, lr=0.01)
    measured, trace = Measured(route, optimized, model), Trace()
    data = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x, y = torch.randn(shape, generator=data), torch.randint(3, shape[:1], generator=data)
        x.requires_grad_(options.get("input_grad", False))
        optimizer.zero_grad(set_to_none=options.get("set_to_none", True))
        for _ in range(options.get("accumulate", 1)):
            rng = capture_rng()

            def loss_of(x=x, y=y):
                with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
                    return F.cross_entropy(model(x), y)

            loss = loss_of()
            measured.backward(loss, loss_of, rng)
            trace.add(loss, *gradients(model.parameters()), x.grad)
        if "clip" in options:
            nn.utils.clip_grad_norm_(parameters, options["clip"])
        measured.measure()
        trace.add(*gradients(model.parameters()), x.grad, *extra)
        optimizer.step()
        trace.add(*model.parameters(), *model.buffers(), torch.get_rng_state(), torch.rand(1))
        trace.add(torch.tensor(random.random()), torch.tensor(np.random.rand()))
    assert not any(p.grad is not None and p.grad.requires_grad for p in model.parameters())
    for state in optimizer.state.values():
        trace.add(*[v for v in state.values() if isinstance(v, Tensor)])
    trace.route = measured.curvature.route if measured.curvature else None
    return trace


class Checkpointed(nn.Module):
    """Its forward pass, BatchNorm and dropout included, runs again in each backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Crossed(nn.Module):
    """Two parameters that are handed one and the same gradient tensor, and one that has none."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
        self.bias, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x @ torch.tanh(self.a + self.b).sum(0).expand(5, 3) + self.bias


def dropping():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def channels_last():
    return convolutional().to(memory_format=torch.channels_last)


def noisy_hooks(model) -> list[Tensor]:
    """Hooks whose order shows in the RNG, in the gradients, and in what they counted."""
    seen = torch.zeros(())

    def noise(gradient):
        seen.add_(1)
        assert not gradient.requires_grad
        return gradient + 0.01 * torch.randn(gradient.shape)

    def after(parameter):
        seen.add_(100)
        parameter.grad.mul_(0.5 + torch.rand(()))

    for parameter in model.parameters():
        parameter.register_hook(noise)
        parameter.register_post_accumulate_grad_hook(after)
    return [seen]


def lstm():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    return Last()


TRAININGS = {
    "mlp": (mlp, (6, 5), {}),
    "gated, other bits": (gated, (6, 5), {}),
    "recurrent, other bits": (lstm, (4, 3, 5), {}),
    "dropout": (dropping, (6, 5), {}),
    "batch norm": (convolutional, (6, 2, 6, 6), {}),
    "attention with dropout": (lambda: Attention(0.3), (6, 3, 4), {}),
    "checkpointed": (Checkpointed, (6, 5), {}),
    "accumulation": (convolutional, (6, 2, 6, 6), {"accumulate": 3}),
    "accumulation into zeros": (dropping, (6, 5), {"accumulate": 2, "set_to_none": False}),
    "clipping": (convolutional, (6, 2, 6, 6), {"clip": 0.01, "accumulate": 2}),
    "input with gradient": (mlp, (6, 5), {"input_grad": True, "accumulate": 2}),
    "parameters outside the optimizer": (mlp, (6, 5), {"first": 2}),
    "autocast": (dropping, (6, 5), {"autocast": True}),
    "one gradient for two": (Crossed, (6, 5), {"accumulate": 2}),
    "hooks": (mlp, (6, 5), {"prepare": noisy_hooks, "accumulate": 2}),
    "hooks, other bits": (gated, (6, 5), {"prepare": noisy_hooks}),
    "checkpointed, other bits": (lambda: nn.Sequential(Checkpointed(), nn.SiLU()), (6, 5), {}),
    "channels last": (channels_last, (6, 2, 6, 6), {"accumulate": 2}),
}


@pytest.mark.parametrize("route", ["graph", "closure"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_measured_training_leaves_the_bits_of_the_plain_one(name, route):
    build, shape, options = TRAININGS[name]
    plain, measured = (train(r, build, shape, **options) for r in (None, route))
    assert measured.same_as(plain)
    if route == "graph":
        assert measured.route == ("graph, apart" if "other bits" in name else "graph")
