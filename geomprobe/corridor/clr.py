"""The corridor learning rate (CG section 4) as a torch optimizer that never makes the host wait for the device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from geomprobe.corridor.scheduled import ScheduledOption
from geomprobe.errors import UnsupportedTraining, UsageError

_BATCH = 2**20  # elements updated at a time, so that no temporary is of the model's size


class CLR(Optimizer):
    r"""Gradient descent at the rate that would reach the minimum in one step if the region were a corridor.

    .. math::  h = \min\left(s \frac{\max(E(\theta) - E^*, 0)}{\|g(\theta)\|^2},\ h_{\max}\right),
               \qquad \theta' = \theta - h\, g(\theta)

    (CG eq. 3 with :math:`E^* = 0`, :math:`s = 1` and no cap; Polyak's step size in general.) The norm is
    that of the whole gradient, over all parameter groups; parameters without a gradient do not change.

    Args:
        params: parameters, or parameter groups, which may have their own ``e_star``, ``max_lr``, ``scale``.
        e_star: the loss's minimum, or a lower bound of it, in units of the loss.
        max_lr: cap on the rate (CG uses 10 on ImageNet); None or infinity for no cap.
        scale: factor on the rate before the cap; 0.5 gives Hazan and Kakade's step for a lower bound.

    Each group's ``"lr"`` is, after `step`, the rate that step used: a 0-d tensor on the device, a new one
    each time. It is 0 before the first step and after a step that was skipped. What reads the rate of a
    step has to read it after the step, because the rate does not exist before.

    A torch scheduler multiplies or replaces a rate that was chosen. Here the rate is measured, so a scheduler can act
    only on the cap or on the factor: give the scheduler `scheduled` instead of the optimizer. A scheduler on the
    optimizer itself is refused at the first step.

    In an initialized process group the loss is averaged over all ranks of the default group, so that every
    rank takes the same rate. Gradients are assumed to be averaged already, as DistributedDataParallel leaves
    them. With a GradScaler call ``scaler.step(optimizer, loss=loss)`` with the unscaled loss.

    Raises:
        ValueError: an option is not a number in its range, or a group brings an ``lr``.

    >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = CLR([theta])
    >>> loss = torch.linalg.vector_norm(theta)  # a convex cone: one step reaches its minimum
    >>> loss.backward()
    >>> optimizer.step(loss=loss)
    tensor(5., grad_fn=...)
    >>> theta.detach().norm().item() < 1e-6, round(optimizer.param_groups[0]["lr"].item(), 6)
    (True, 5.0)
    """

    finds_rate = True  # a step's rate stands in the group after it; a trace then has that one

    def __init__(
        self, params: Iterable[Any], e_star: float = 0.0, max_lr: float | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(params, {"e_star": e_star, "max_lr": max_lr, "scale": scale})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do; its skipped steps are counted from now on."""
        _check({**self.defaults, **param_group}, len(self.param_groups))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["max_lr"] = math.inf if group["max_lr"] is None else group["max_lr"]
        device = _home(self.param_groups)
        group["lr"] = torch.zeros((), dtype=_sum_dtype(device), device=device)
        group["skipped_steps"] = torch.zeros((), dtype=torch.int64, device=device)
        for parameter in group["params"]:
            # An optimizer without any state is stepped, without a loss, by torch.distributed.checkpoint.
            self.state[parameter] = {}

    @property
    def skipped_steps(self) -> Tensor:
        """Steps not taken (zero gradient, or a gradient or loss not finite): int64, 0-d, on the device."""
        return self.param_groups[0]["skipped_steps"]

    def scheduled(self, option: str) -> ScheduledOption:
        """The object to give to a torch scheduler, so that it acts on ``option`` of every group.

        ``scheduled("max_lr")`` makes the schedule a cap on the measured rate, such as a warm-up;
        ``scheduled("scale")`` makes it a factor.

        Raises:
            UsageError: ``option`` is neither, or it is ``"max_lr"`` and there is no cap to start from.

        >>> optimizer = CLR([torch.nn.Parameter(torch.ones(1))], max_lr=8.0)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.scheduled("max_lr"), gamma=0.5)
        >>> for _ in range(2):
        ...     _ = optimizer.step(loss=torch.tensor(1.0))
        ...     schedule.step()
        >>> optimizer.param_groups[0]["max_lr"]
        2.0
        """
        if option not in ("max_lr", "scale"):
            raise UsageError(f"CLR can schedule 'max_lr' or 'scale', not {option!r}")
        if any(math.isinf(group[option]) for group in self.param_groups):
            raise UsageError("max_lr is infinite, so a schedule cannot act on it: construct CLR with a finite max_lr")
        return ScheduledOption(self, option)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Take one step at the measured rate, from the gradients in ``.grad``; nothing is copied to the host.

        Where the gradient is zero, or it or the loss is not finite, no parameter changes and `skipped_steps`
        grows by one. A loss at or below ``e_star`` gives a rate of 0, which is a step and not a skip.

        Args:
            closure: computes the loss again, gradients included, and returns it.
            loss: the loss that the gradients are of, one element. Give this or a closure.

        Returns:
            The loss that was given, or that the closure returned.

        Raises:
            UsageError: neither or both were given, or a scheduler acts on the optimizer's ``lr``.
            ValueError: the loss has more than one element.
            UnsupportedTraining: a gradient is sparse or sharded.
        """
        if (closure is None) == (loss is None):
            raise UsageError("CLR needs the step's loss: call step(loss=loss), or step(closure), one of the two")
        self._refuse_direct_schedulers()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = _norm(self._gradients(), _home(self.param_groups))
        value = _mean_over_ranks(loss, norm)
        sound = torch.isfinite(value) & torch.isfinite(norm) & (norm > 0)
        for group in self.param_groups:
            # Two divisions, because the square of a small norm can underflow.
            rate = group["scale"] * (value - group["e_star"]).clamp(min=0) / norm / norm
            group["lr"] = torch.where(sound, rate.clamp(max=group["max_lr"]), 0)
            group["skipped_steps"] = group["skipped_steps"] + ~sound
            _descend(group["params"], group["lr"], sound)
        return loss

    def _gradients(self) -> list[Tensor]:
        found = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.is_sparse for gradient in found):
            raise UnsupportedTraining("CLR takes dense gradients only: construct the embedding with sparse=False")
        if any(type(gradient).__name__ == "DTensor" for gradient in found):
            raise UnsupportedTraining("CLR takes whole gradients only, and these are sharded: use DDP, not FSDP2")
        return found

    def _refuse_direct_schedulers(self) -> None:
        if any("initial_lr" in group for group in self.param_groups):
            raise UsageError(
                "a scheduler was put on CLR itself, whose lr is measured and not set: give the scheduler "
                'optimizer.scheduled("max_lr") or optimizer.scheduled("scale") instead of the optimizer'
            )


def _check(group: dict[str, Any], index: int) -> None:
    where = f"in parameter group {index}"
    if "lr" in group:
        raise ValueError(f"CLR measures its lr, but lr={group['lr']!r} was given {where}: set max_lr or scale")
    if not math.isfinite(group["e_star"]):
        raise ValueError(f"e_star must be finite, but it is {group['e_star']!r} {where}")
    if not 0 < group["scale"] < math.inf:
        raise ValueError(f"scale must be positive and finite, but it is {group['scale']!r} {where}")
    if group["max_lr"] is not None and not group["max_lr"] > 0:
        raise ValueError(f"max_lr must be positive or None, but it is {group['max_lr']!r} {where}")


def _home(groups: list[dict[str, Any]]) -> torch.device:
    """The device on which the rate is computed: that of the first parameter."""
    return next((p.device for group in groups for p in group["params"]), torch.device("cpu"))


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _batches(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors for one foreach call: all on one device and of one dtype, and at most `_BATCH` elements."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(index)
    for indices in alike.values():
        batch: list[int] = []
        size = 0
        for index in indices:
            if batch and size + tensors[index].numel() > _BATCH:
                yield batch
                batch, size = [], 0
            batch.append(index)
            size += tensors[index].numel()
        yield batch


def _norm(gradients: list[Tensor], home: torch.device) -> Tensor:
    norms = [torch.zeros(1, dtype=_sum_dtype(home), device=home)]
    blocks = [block for gradient in gradients for block in _blocks(gradient)]
    for batch in _batches(blocks):
        dtype = torch.float32 if blocks[batch[0]].itemsize < 4 else None
        found = torch._foreach_norm([blocks[index] for index in batch], 2, dtype=dtype)
        norms.append(torch.stack(found).to(norms[0]))
    return torch.linalg.vector_norm(torch.cat(norms))


def _blocks(gradient: Tensor) -> Iterable[Tensor]:
    # A float32 sum over ResNet-18's largest tensor is off by 3e-5; over this few elements, by 2e-7.
    return gradient.view(-1).split(2**16) if gradient.is_contiguous() else [gradient]


def _mean_over_ranks(loss: Tensor | float | None, like: Tensor) -> Tensor:
    value = torch.as_tensor(loss).detach()
    if value.numel() != 1:
        raise ValueError(f"CLR needs a loss of one element, but its shape is {tuple(value.shape)}")
    value = value.to(like, copy=True).reshape(())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _descend(parameters: list[Tensor], rate: Tensor, sound: Tensor) -> None:
    moves = [(p, p.grad) for p in parameters if p.grad is not None]
    for batch in _batches([parameter for parameter, _ in moves]):
        device = moves[batch[0]][0].device
        # The rate is 0 where the step is skipped, but 0 times infinity is NaN: so the gradient becomes 0 as well.
        keep, factor = sound.to(device), -rate.to(device)
        updates = [torch.where(keep, moves[index][1], 0) for index in batch]
        if updates[0].dtype is torch.float32:
            factor = factor.float()  # of the updates' own dtype, the fused kernel can take it
        torch._foreach_mul_(updates, factor)
        torch._foreach_add_([moves[index][0] for index in batch], updates)
