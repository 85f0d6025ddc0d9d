"""Layouts across processes that cannot be measured rightly, each refused by its name and with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from geomprobe.errors import UnsupportedTraining


def refuse_devices(parameters: Mapping[str, Tensor]) -> None:
    """Several devices of one process.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_devices({"weight": nn.Parameter()})
    """
    devices = {p.device: name for name, p in parameters.items()}
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise UnsupportedTraining(
            f"The parameters lie on several devices of one process ({places}). Put the model on one device, or give "
            "each device a process of its own (torchrun) under DDP or fully_shard."
        )


def refuse_optimizer_in_backward(parameters: Mapping[str, Tensor]) -> None:
    """Updates within the backward pass, where no step ever has the whole gradient.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_optimizer_in_backward({"weight": nn.Parameter()})
    """
    for name, parameter in parameters.items():
        if getattr(parameter, "_in_backward_optimizers", None):
            raise UnsupportedTraining(
                f"{name} is updated inside the backward pass (_apply_optimizer_in_backward), so no step ever has "
                "the whole gradient. Call optimizer.step() after backward."
            )


def refuse_fsdp1(model: nn.Module | None) -> None:
    """FullyShardedDataParallel modules, that is FSDP1.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_fsdp1(nn.Linear(1, 1))
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or model is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise UnsupportedTraining(
                f"{name or 'The model'} is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters have "
                "no tensor of their own to measure. Use torch.distributed.fsdp.fully_shard (FSDP2)."
            )


def refuse_join(replicas: Iterable[Any]) -> None:
    """Uneven inputs, under DDP's ``join``.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_join([])
    """
    if any(replica._join_config.enable for replica in replicas):
        raise UnsupportedTraining(
            "The training runs inside DDP's join(), where processes leave one by one as their batches run out, and "
            "those that left cannot be asked. Give every process as many batches (drop_last=True, or pad them)."
        )


def refuse_partial_use(shares: Mapping[str, float], world_size: int) -> None:
    """Parameters that some processes used and others did not, in a training that does not expect it.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_partial_use({"weight": 1.0, "bias": 0.0}, 2)
    """
    partial = {name: share for name, share in shares.items() if 0 < share < 1}
    for name, share in partial.items():
        raise UnsupportedTraining(
            f"{len(partial)} parameters got a gradient on some processes only: {name} on {share * world_size:.0f} of "
            f"{world_size}. What the optimizer gets is then not the mean of the processes' gradients (FSDP2 even adds "
            "up those of different parameters). Let each process use every parameter, or give DDP "
            "find_unused_parameters=True, FSDP2 set_reduce_scatter_unused_params(True)."
        )


def refuse_mixture(distributed: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
    """DTensors beside plain parameters.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_mixture(["weight"], {"weight": nn.Parameter()})
    """
    plain = [name for name in parameters if name not in set(distributed)]
    if plain:
        raise UnsupportedTraining(
            f"{distributed[0]} is a DTensor and {plain[0]} a plain tensor ({len(distributed)} and {len(plain)} in "
            "all): no one averages the plain ones' gradients over the processes. Call fully_shard on the root "
            "module too, without ignored_params."
        )


def refuse_placement(name: str, parameter: Any, world_size: int, managed: bool) -> None:
    """Tensor and pipeline parallelism, and CPU offload, by where one DTensor lies.

    Raises:
        UnsupportedTraining: where there are any.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements
    lies = f"{name} lies on {mesh} as {placements}"
    kinds = [type(placement) for placement in placements]
    if not set(kinds) <= {Replicate, Shard}:
        raise UnsupportedTraining(
            f"{lies}: fully_shard over tensor parallelism is not supported. Use fully_shard alone."
        )
    if parameter.device.type != mesh.device_type:
        raise UnsupportedTraining(
            f"{lies}, and its values on {parameter.device}: CPU offload is not supported. Call fully_shard without "
            "offload_policy."
        )
    if mesh.size() != world_size:
        raise UnsupportedTraining(
            f"{lies}, which are {mesh.size()} of the {world_size} processes: a training that is laid out in further "
            "dimensions (pipeline, tensor, expert or context parallelism) is not supported. Use one mesh over all "
            "processes."
        )
    if Shard in kinds and (not managed or kinds[:-1] != [Replicate] * (len(kinds) - 1)):
        raise UnsupportedTraining(
            f"{lies}, and fully_shard does not account for that: tensor parallelism is not supported. Use fully_shard "
            "alone (attach(model, ...) must get the model that it was called on)."
        )


def refuse_unaveraged(replicas: Sequence[Any], parameters: Mapping[str, Tensor], world_size: int) -> None:
    """Parameters whose gradients are not averaged over all processes by DDP.

    Raises:
        UnsupportedTraining: where there are any.

    >>> refuse_unaveraged([], {}, 1)
    """
    averaged = _averaged(replicas)
    for name, parameter in parameters.items():
        if id(parameter) not in averaged:
            raise UnsupportedTraining(
                f"{world_size} processes train, and neither DDP nor fully_shard averages the gradient of {name} over "
                f"them{' (it is outside the DDP module, or ignored by it)' if replicas else ''}. Wrap the model in "
                "DistributedDataParallel, or call fully_shard on it. (DeepSpeed, Horovod, pipelines and gradients "
                "averaged by hand are not supported.)"
            )
    for replica in replicas:
        if (size := dist.get_world_size(replica.process_group)) != world_size:
            raise UnsupportedTraining(
                f"DDP averages over {size} of the {world_size} processes: a training that is laid out in further "
                "dimensions is not supported. Use DDP over all processes."
            )


def _averaged(replicas: Iterable[Any]) -> set[int]:
    return {
        id(p)
        for replica in replicas
        for name, p in replica.module.named_parameters(remove_duplicate=False)
        if name not in replica.parameters_to_ignore
    }
