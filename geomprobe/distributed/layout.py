"""How one training is spread over processes, and the few numbers that they exchange to measure it as a whole.

The values that a process has of a parameter are its *local* ones: all of them without sharding and under
DDP, its shard of them under FSDP2. Every sum over the weights is a sum over local values and one all-reduce.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from geomprobe.distributed.dtensor import is_dtensor
from geomprobe.distributed.unsupported import refuse_join, refuse_partial_use, require_supported
from geomprobe.errors import GeomprobeError

Kind = Literal["one process", "DDP", "FSDP2", "DTensor"]


@dataclass(frozen=True)
class Layout:
    """Where the parameters of one training are: what this process has of them, and what of it counts.

    Attributes:
        kind: ``"one process"``; ``"DDP"``; ``"FSDP2"`` for ``fully_shard`` (HSDP too) and the ``replicate`` that
            is built like it; ``"DTensor"`` for parameters that are DTensors, replicated, without either.
        rank: this process's number.
        world_size: how many processes there are.
        sharded: whether any parameter is: only then do sums over the weights need the other processes.
        owned: for each parameter, whether this process's values count in such a sum. Where they are sharded,
            a replica counts on the first of the processes that have it.
        replicas: the DDP modules.
    """

    kind: Kind = "one process"
    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    owned: tuple[bool, ...] = ()
    replicas: tuple[nn.Module, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, model: nn.Module | None, parameters: Mapping[str, Tensor]) -> Layout:
        """Find the layout of a training, by its model and its measured parameters. Nothing is sent.

        Raises:
            UnsupportedTraining: FSDP1, tensor or pipeline parallelism, an optimizer inside the backward pass,
                parameters that no one averages the gradients of, or several devices in one process.
        """
        rank, world_size = _place()
        distributed = any(map(is_dtensor, parameters.values()))
        replicas = [] if distributed else _ddp_modules(model, parameters)
        managed = {id(p) for module in fsdp_modules(model) for p in module.parameters()} if distributed else set()
        require_supported(model, parameters, managed, replicas, world_size)
        if not distributed:
            kind: Kind = "DDP" if replicas or world_size > 1 else "one process"
            owned = (True,) * len(parameters)
            return cls(kind, rank, world_size, owned=owned, replicas=tuple(replicas))
        placed: list[Any] = list(parameters.values())
        sharded = any(placement.is_shard() for parameter in placed for placement in parameter.placements)
        owned = tuple(not sharded or _holds_first_replica(parameter) for parameter in placed)
        kind = "FSDP2" if id(placed[0]) in managed else "DTensor"
        return cls(kind, rank, world_size, sharded and world_size > 1, owned)

    def sum(self, parts: Tensor) -> Tensor:
        """Sums over all weights, the same on every process, from each one's float64 sums over its owned local values.

        Without sharding that is ``parts`` itself, and nothing is sent.
        """
        return self.exchange(parts, parts.new_empty(0))[0]

    def exchange(self, parts: Tensor, averaged: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All numbers of a step that the processes exchange, in one all-reduce, or none where there are none.

        Args:
            parts: as for `sum`.
            averaged: numbers of this process, such as its loss; one dimension, as ``apart``, and all float64 on one
                device.
            apart: numbers of this process that all are to know.

        Returns:
            The `sum` of ``parts``; the mean of ``averaged`` over the processes; ``apart`` of each, by rank.

        Raises:
            UnsupportedTraining: a process may have left the training before the others (DDP's ``join``).

        >>> Layout().exchange(torch.ones(1), torch.tensor([3.0]), torch.tensor([4.0]))
        (tensor([1.]), tensor([3.]), tensor([[4.]]))
        """
        apart = averaged.new_empty(0) if apart is None else apart
        if self.world_size == 1:
            return parts, averaged, apart.unsqueeze(0)
        refuse_join(self.replicas)
        everyone = apart.new_zeros(self.world_size, apart.numel())
        everyone[self.rank] = apart
        pieces = [parts.reshape(-1) if self.sharded else parts.new_empty(0), averaged, everyone.reshape(-1)]
        sent = torch.cat(pieces)
        if sent.numel():
            dist.all_reduce(sent)
        sums, mean, each = sent.split([piece.numel() for piece in pieces])
        total = sums.view(parts.shape) if self.sharded else parts
        return total, mean / self.world_size, each.view(everyone.shape)

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all weights, from this process's float64 sum over each of its tensors."""
        counted = sums.new_tensor(self.owned or (True,) * len(sums))
        return self.sum(torch.sum(sums * counted))

    def failures(self, failure: Exception | None, device: torch.device) -> dict[int, tuple[str, str]]:
        """Which processes have failed, so that none waits for one of them in the next exchange.

        Where none has, one number is exchanged, on ``device``, and waited for.

        Returns:
            The exception's class and text by rank.

        >>> Layout().failures(ValueError("no"), torch.device("cpu"))
        {0: ('ValueError', 'no')}
        """
        own = None if failure is None else (type(failure).__name__, str(failure))
        found: list[Any] = [own]
        if self.largest([int(own is not None)], device)[0] and self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, own)
        return {rank: reason for rank, reason in enumerate(found) if reason is not None}

    def largest(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Of each number, the largest of the processes', exchanged on ``device``. They are waited for."""
        if self.world_size == 1:
            return list(numbers)
        sent = torch.tensor(numbers, device=device)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        return sent.tolist()

    def require_same_use(self, used: Mapping[str, bool], device: torch.device) -> None:
        """Compare which parameters got a gradient (``used``) over the processes, where that may differ.

        Raises:
            UnsupportedTraining: naming the first that some used and others did not.
        """
        counts = torch.tensor(list(used.values()), dtype=torch.float64, device=device)
        shares = self.exchange(counts.new_empty(0), counts)[1].tolist()
        refuse_partial_use(dict(zip(used, shares, strict=True)), self.world_size)

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {"kind": self.kind, "world_size": self.world_size}


class ElsewhereFailed(GeomprobeError):
    """Another process has failed, and this one stops with it.

    >>> print(ElsewhereFailed({2: "the closure returned another loss"}))
    This process stops because rank 2 failed: the closure returned another loss
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        found = "; ".join(f"rank {rank} failed: {text}" for rank, text in reasons.items())
        super().__init__(f"This process stops because {found}")


def fsdp_modules(model: nn.Module | None) -> list[Any]:
    """The modules on which `fully_shard` was called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or model is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _place() -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _holds_first_replica(parameter: Any) -> bool:
    place = parameter.device_mesh.get_coordinate()
    return all(
        not placement.is_replicate() or at == 0 for placement, at in zip(parameter.placements, place, strict=True)
    )


def _ddp_modules(model: nn.Module | None, parameters: Mapping[str, Tensor]) -> list[Any]:
    ddp = nn.parallel.DistributedDataParallel
    inside = [m for m in model.modules() if isinstance(m, ddp)] if model is not None else []
    if inside or _place()[1] == 1:
        return inside
    # The script gave the module inside its wrapper, which does not know of the wrapper, and torch keeps no list of DDP
    # modules: so all objects are looked through, once a run. That such a script runs as it is is a promise.
    wanted = {id(p) for p in parameters.values()}
    wrappers = [thing for thing in gc.get_objects() if issubclass(type(thing), ddp)]
    return [wrapper for wrapper in wrappers if any(id(p) in wanted for p in wrapper.parameters())]
