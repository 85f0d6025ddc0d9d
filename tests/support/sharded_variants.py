"""Models of several kinds under FSDP2, each with its Hg and that of its twin in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from geomprobe.distributed.dtensor import local
from geomprobe.distributed.layout import Layout
from geomprobe.measure.curvature.double_backward import graph_of, hessian_vector_product
from geomprobe.measure.curvature.hessian_gradient import Curvature
from support.refused_layouts import WORLD, named
from support.shared_training import flat, full, optimizer_of


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=False))


class Unused(nn.Module):
    """Has weights that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


def fsdp_variants() -> dict[str, tuple[bool, float]]:
    """Whether the weights stay bitwise the same, and how far Hg is from that of the plain twin."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "checkpointed": _variant(Checkpointed),
        "mixed": _variant(_layers, mp_policy=policy),
        "tied": _variant(_tied),
        "frozen": _variant(_frozen),
        "unused": _variant(Unused),
    }


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def _tied() -> nn.Module:
    layers = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    layers[2].weight = layers[0].weight
    return layers


def _frozen() -> nn.Module:
    layers = _layers()
    layers[0].weight.requires_grad_(False)
    return layers


def _variant(make: Callable[[], nn.Module], **options: Any) -> tuple[bool, float]:
    finals, distance = [], 0.0
    for measured in (False, True):
        torch.manual_seed(4)
        twin = make()
        torch.manual_seed(4)
        wrapped = fully_shard(make(), **options)
        optimizer = optimizer_of("momentum", wrapped.parameters())
        parameters = list(wrapped.parameters())
        curvature = Curvature(parameters, wrapped, Layout.of(*named(wrapped))) if measured else None
        generator = torch.Generator().manual_seed(9)
        for step in range(3):
            batch = torch.randn(WORLD * 4, 5, generator=generator)
            optimizer.zero_grad()
            loss = wrapped(batch.chunk(WORLD)[dist.get_rank()]).float().square().mean()
            if curvature is None:
                loss.backward()
            else:
                curvature.backward(loss)
                hg = curvature.product([None if p.grad is None else local(p.grad) for p in parameters])
                if step == 0:
                    distance = _distance(twin, batch, hg, parameters)
            optimizer.step()
        finals.append(flat(map(full, parameters)))
    return torch.equal(*finals), distance


def _distance(twin: nn.Module, batch: Tensor, hg: list[Tensor], parameters: list[Any]) -> float:
    graph = graph_of(twin(batch).square().mean(), list(twin.parameters()))
    twin(batch).square().mean().backward()
    g = [p.grad for p in twin.parameters()]
    expected = flat(hessian_vector_product([graph], list(twin.parameters()), g))
    rows = zip(hg, parameters, strict=True)
    found = flat(
        DTensor.from_local(h, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
        for h, p in rows
    )
    return float((found - expected).norm() / expected.norm())
