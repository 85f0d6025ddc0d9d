"""Layouts across processes that cannot be measured rightly, each refused by its name and with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from geomprobe.distributed.dtensor import is_dtensor
from geomprobe.errors import UnsupportedTraining


def require_supported(
    model: nn.Module | None,
    parameters: Mapping[str, Any],
    managed: set[int],
    replicas: Sequence[Any],
    world_size: int,
) -> None:
    """Refuse a training whose layout `Layout` cannot describe.

    ``managed`` holds the ids of the parameters that FSDP2 manages, and ``replicas`` the DDP modules.

    Raises:
        UnsupportedTraining: naming the first obstacle.
    """
    distributed = [name for name, parameter in parameters.items() if is_dtensor(parameter)]
    plain = [name for name in parameters if name not in set(distributed)]
    reasons = _of_any(model, parameters)
    if distributed and plain:
        mixture = (
            f"{distributed[0]} is a DTensor and {plain[0]} a plain tensor ({len(distributed)} and {len(plain)} in "
            "all): no one averages the plain ones' gradients over the processes. Call fully_shard on the root "
            "module too, without ignored_params."
        )
        reasons = chain(reasons, [mixture])
    elif distributed:
        reasons = chain(reasons, _of_dtensors(parameters, managed, world_size))
    else:
        reasons = chain(reasons, _of_replicas(parameters, replicas, world_size))
    for reason in reasons:
        raise UnsupportedTraining(reason)


def _of_any(model: nn.Module | None, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    """Obstacles on one process or many."""
    devices = {parameter.device: name for name, parameter in parameters.items()}
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        yield (
            f"The parameters lie on several devices of one process ({places}). Put the model on one device, or give "
            "each device a process of its own (torchrun) under DDP or fully_shard."
        )
    for name, parameter in parameters.items():
        if getattr(parameter, "_in_backward_optimizers", None):
            yield (
                f"{name} is updated inside the backward pass (_apply_optimizer_in_backward), so no step ever has "
                "the whole gradient. Call optimizer.step() after backward."
            )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a model is of a class of it only where it is imported
    for name, module in model.named_modules() if fsdp is not None and model is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):  # type: ignore[union-attr]
            yield (
                f"{name or 'The model'} is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters have "
                "no tensor of their own to measure. Use torch.distributed.fsdp.fully_shard (FSDP2)."
            )


def _of_dtensors(parameters: Mapping[str, Any], managed: set[int], world_size: int) -> Iterator[str]:
    """Tensor and pipeline parallelism, CPU offload, and mixtures of meshes."""
    from torch.distributed.tensor import Replicate, Shard

    for name, parameter in parameters.items():
        mesh, placements = parameter.device_mesh, parameter.placements
        lies = f"{name} lies on {mesh} as {placements}"
        kinds = [type(placement) for placement in placements]
        if not set(kinds) <= {Replicate, Shard}:
            yield f"{lies}: fully_shard over tensor parallelism is not supported. Use fully_shard alone."
        if parameter.device.type != mesh.device_type:
            yield (
                f"{lies}, and its values on {parameter.device}: CPU offload is not supported. Call fully_shard without "
                "offload_policy."
            )
        if mesh.size() != world_size:
            yield (
                f"{lies}, which are {mesh.size()} of the {world_size} processes: a training that is laid out in "
                "further dimensions (pipeline, tensor, expert or context parallelism) is not supported. Use one mesh "
                "over all processes."
            )
        if Shard in kinds and (id(parameter) not in managed or kinds[:-1] != [Replicate] * (len(kinds) - 1)):
            yield (
                f"{lies}, and fully_shard does not account for that: tensor parallelism is not supported. Use "
                "fully_shard alone (attach(model, ...) must get the model that it was called on)."
            )
    outside = [name for name, parameter in parameters.items() if id(parameter) not in managed]
    if outside and len(outside) < len(parameters):
        yield (
            f"{outside[0]} is a DTensor that fully_shard does not manage, beside others that it does: whether its "
            "gradient is averaged over the processes is not known. Call fully_shard on the whole model."
        )
    first_name, first = next(iter(parameters.items()))
    for name, parameter in parameters.items():
        if parameter.device_mesh != first.device_mesh:
            yield (
                f"{first_name} lies on {first.device_mesh} and {name} on {parameter.device_mesh}: a mixture of "
                "meshes is not supported. Call fully_shard with one mesh."
            )


def _of_replicas(parameters: Mapping[str, Tensor], replicas: Sequence[Any], world_size: int) -> Iterator[str]:
    """Parameters whose gradients DDP does not average over all processes."""
    if not replicas and world_size == 1:
        return
    averaged = {
        id(parameter)
        for replica in replicas
        for name, parameter in replica.module.named_parameters(remove_duplicate=False)
        if name not in replica.parameters_to_ignore
    }
    for name, parameter in parameters.items():
        if id(parameter) not in averaged:
            yield (
                f"{world_size} processes train, and neither DDP nor fully_shard averages the gradient of {name} over "
                f"them{' (it is outside the DDP module, or ignored by it)' if replicas else ''}. Wrap the model in "
                "DistributedDataParallel, or call fully_shard on it. (DeepSpeed, Horovod, pipelines and gradients "
                "averaged by hand are not supported.)"
            )
    for replica in replicas:
        if (size := dist.get_world_size(replica.process_group)) != world_size:
            yield (
                f"DDP averages over {size} of the {world_size} processes: a training that is laid out in further "
                "dimensions is not supported. Use DDP over all processes."
            )


# What shows only while the training runs


def refuse_join(replicas: Iterable[Any]) -> None:
    """Refuse DDP's ``join``, by which processes leave the training one by one; asked before each exchange."""
    if any(replica._join_config.enable for replica in replicas):
        raise UnsupportedTraining(
            "The training runs inside DDP's join(), where processes leave one by one as their batches run out, and "
            "those that left cannot be asked. Give every process as many batches (drop_last=True, or pad them)."
        )


def refuse_partial_use(shares: Mapping[str, float], world_size: int) -> None:
    """Refuse parameters that some processes used and others did not, in a training that does not expect it.

    ``shares`` is the part of the processes on which each parameter got a gradient.

    >>> refuse_partial_use({"weight": 1.0, "bias": 0.5}, 2)
    Traceback (most recent call last):
    ...
    geomprobe.errors.UnsupportedTraining: 1 parameters got a gradient on some processes only: bias on 1 of 2. ...
    """
    partial = {name: share for name, share in shares.items() if 0 < share < 1}
    for name, share in partial.items():
        raise UnsupportedTraining(
            f"{len(partial)} parameters got a gradient on some processes only: {name} on {share * world_size:.0f} of "
            f"{world_size}. What the optimizer gets is then not the mean of the processes' gradients (FSDP2 even adds "
            "up those of different parameters). Let each process use every parameter, or give DDP "
            "find_unused_parameters=True, FSDP2 set_reduce_scatter_unused_params(True)."
        )
