"""Layouts that geomprobe refuses, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from geomprobe.distributed.layout import Layout
from geomprobe.errors import GeomprobeError

WORLD = 3


def refusals() -> dict[str, str]:
    """What is said of each layout that is not supported."""
    found = {}
    for name, build in REFUSED.items():
        torch.manual_seed(0)
        module, parameters = build()
        try:
            Layout.of(module, parameters)
        except GeomprobeError as error:
            found[name] = str(error)
    return found


def named(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    return module, dict(module.named_parameters())


def tensor_parallel() -> tuple[nn.Module, dict[str, Tensor]]:
    return named(parallelize_module(nn.Linear(6, 6), init_device_mesh("cpu", (WORLD,)), ColwiseParallel()))


def tensor_parallel_under_fsdp() -> tuple[nn.Module, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "tp"))
    module = parallelize_module(nn.Linear(6, 6), mesh["tp"], ColwiseParallel())
    return named(fully_shard(module, mesh=mesh["dp"]))


def own_process_only() -> tuple[nn.Module, dict[str, Tensor]]:
    """As a pipeline's stages lie, each in a mesh of its own."""
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("pp", "dp"))
    return named(fully_shard(nn.Linear(2, 2), mesh=mesh["dp"]))


def partly_sharded() -> tuple[nn.Module, dict[str, Tensor]]:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(module[0])
    return named(module)


def outside_ddp() -> tuple[nn.Module, dict[str, Tensor]]:
    module = nn.ModuleDict({"inside": DistributedDataParallel(nn.Linear(2, 2)), "outside": nn.Linear(2, 1)})
    return named(module)


def ddp_over_some() -> tuple[nn.Module, dict[str, Tensor]]:
    alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
    return named(DistributedDataParallel(nn.Linear(2, 2), process_group=alone))


def stepping_in_backward() -> tuple[nn.Module, dict[str, Tensor]]:
    module = nn.Linear(2, 2)
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    return named(DistributedDataParallel(module))


REFUSED: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "unwrapped": lambda: named(nn.Linear(2, 2)),
    "FSDP1": lambda: named(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))),
    "tensor parallel": tensor_parallel,
    "tensor parallel under FSDP2": tensor_parallel_under_fsdp,
    "pipeline": own_process_only,
    "partly sharded": partly_sharded,
    "outside DDP": outside_ddp,
    "DDP over some": ddp_over_some,
    "stepping in backward": stepping_in_backward,
}
