"""What several files of loops are built from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Opaque(torch.autograd.Function):
    """The identity, with a backward that has no derivative: Hg is left out, where finite differences are too rough."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def copies(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def put_back(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Copy ``values`` into ``parameters``, with a new version of each."""
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
