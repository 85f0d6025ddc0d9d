"""What of a training across processes moves bits, for the manifest: devices, exchanges, buckets and shards."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from geomprobe.distributed.dtensor import is_dtensor, local
from geomprobe.distributed.layout import Layout, fsdp_modules
from geomprobe.distributed.ranks import Ranks


def across_ranks(
    model: nn.Module | None, parameters: Mapping[str, Tensor], layout: Layout, ranks: Ranks
) -> dict[str, Any]:
    """The manifest's section ``ranks``, and ``hosts`` for the reader only; nothing where there is one process.

    A pass calls it at its first update, on every process, since each waits for what the others publish.
    """
    if ranks.alone:
        return {}
    device = _device(next(iter(parameters.values())).device)
    values_here = sum(local(p).numel() for p in parameters.values())
    placed = ranks.all_gather("placed", [device, values_here, socket.gethostname()])
    devices, values, hosts = zip(*placed, strict=True)
    section: dict[str, Any] = ranks.described()["ranks"] | layout.described() | _exchanges()
    section |= {"devices": list(devices), "values": list(values)}
    if layout.replicas:
        section["ddp"] = [_buckets(replica) for replica in layout.replicas]
    meshes = {p.device_mesh: None for p in parameters.values() if is_dtensor(p)}  # type: ignore[attr-defined]
    if meshes:
        section["meshes"] = [[list(mesh.shape), list(mesh.mesh_dim_names or ())] for mesh in meshes]
        section["fsdp"] = [_group(module) for module in fsdp_modules(model)]
    return {"ranks": section, "hosts": list(hosts)}


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _exchanges() -> dict[str, Any]:
    """The library that makes the sums over the processes."""
    if not dist.is_initialized():
        return {}
    backend = dist.get_backend()
    nccl: Any = getattr(torch.cuda, "nccl", None)
    version = ".".join(map(str, nccl.version())) if "nccl" in backend and nccl is not None else None
    return {"backend": backend, "nccl": version}


def _buckets(replica: Any) -> dict[str, Any]:
    """What decides which gradients DDP sums together, and in which order."""
    logged = replica._get_ddp_logging_data()
    return {
        "buckets": logged.get("bucket_sizes"),
        "bucket_cap_bytes": replica.bucket_bytes_cap,
        "static_graph": replica.static_graph,
        "find_unused_parameters": replica.find_unused_parameters,
        "gradient_as_bucket_view": replica.gradient_as_bucket_view,
        "comm_hook": logged.get("comm_hook"),
    }


def _group(module: Any) -> dict[str, Any]:
    """What one call of ``fully_shard`` sums together, and in which precision."""
    policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
    return {
        "class": type(module).__name__.removeprefix("FSDP"),
        "values": sum(p.numel() for p in module.parameters()),
        "param_dtype": str(getattr(policy, "param_dtype", None)),
        "reduce_dtype": str(getattr(policy, "reduce_dtype", None)),
    }
