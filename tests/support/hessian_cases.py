"""Small models with a loss, and their dense Hessians in float64, for everything that computes products with H."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, replace_all_batch_norm_modules_

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"]
)


def dense_product(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], seed: int, vectors) -> Tensor:
    return dense_hessian(model, loss_of, seed) @ flat(vectors)


def dense_hessian(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], seed: int = 0) -> Tensor:
    """The Hessian by torch.func, forward over reverse: no formula of the double backward is in it.

    It is not torch.func.hessian, forward over vmapped reverse: on train-mode BatchNorm that one is not even
    symmetric in torch 2.15, which forward over plain reverse is.
    """
    model = copy.deepcopy(model).double()
    replace_all_batch_norm_modules_(model)  # train mode normalizes by the batch; without the in-place buffers
    bound = nn.ModuleList([model])
    bound.forward = lambda: (torch.manual_seed(seed), loss_of(model))[1]
    shapes = {f"0.{name}": p.shape for name, p in model.named_parameters()}

    def loss(weights: Tensor) -> Tensor:
        pieces = weights.split([shape.numel() for shape in shapes.values()])
        named = {name: w.view(shape) for (name, shape), w in zip(shapes.items(), pieces, strict=True)}
        return functional_call(bound, named, ())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")  # forward mode compiles its formulas by a deprecated tool
        hessian = jacfwd(grad(loss), randomness="same")(flat(model.parameters()))
    assert relative(hessian, hessian.T) < 1e-12
    return hessian


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.is_sparse:
        return b.is_sparse and same_bits(a.coalesce().values(), b.coalesce().values())
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.stride() == b.stride() and torch.equal(a.view(as_bits), b.view(as_bits))


def gradients(parameters) -> list[Tensor | None]:
    return [p.grad for p in parameters]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.embed(x))).mean(1))


class Attention(nn.Module):
    """Sequence first: torch.func lays out the transposed tensors of batch_first so that dropout draws others."""

    def __init__(self, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=dropout, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1).contiguous()).mean(0))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.GELU(),
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def gated():
    """Its gradients have other bits when they are to be differentiated."""
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.GroupNorm(2, 8), nn.Linear(8, 3))


@dataclass
class Case:
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, model: nn.Module | None = None, part: slice = slice(None), parts: int = 1) -> Tensor:
        model = self.model if model is None else model
        x = self.inputs[part]
        if x.is_floating_point():
            x = x.to(next(model.parameters()).dtype)
        return F.cross_entropy(model(x), self.targets[part]) / parts

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(5)
    models = {
        "mlp": mlp, "convolutional": convolutional, "gated": gated, "tied": Tied,
        "transformer": lambda: Attention(0.3), "flash": lambda: Attention(0.0),
    }  # fmt: skip
    model = models[name]()
    inputs = {
        "tied": torch.randint(7, (6, 3)), "convolutional": torch.randn(6, 2, 6, 6),
        "transformer": torch.randn(6, 3, 4), "flash": torch.randn(6, 3, 4),
    }.get(name, torch.randn(6, 5))  # fmt: skip
    return Case(model.to(dtype), inputs, torch.randint(3, (6,)))


CASES = ["mlp", "convolutional", "transformer", "tied", "gated"]
