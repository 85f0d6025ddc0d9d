"""The values that this process has of a tensor, whether that is plain or a DTensor spread over many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.errors import UnsupportedTraining


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; imports nothing of torch that the script has not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Any) -> Tensor:
    """What this process has of a tensor, values or summands, in the tensor's own memory."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local(tensor: Any) -> Tensor:
    """The values that this process has, in the tensor's own memory; a plain tensor comes back itself.

    Raises:
        UnsupportedTraining: they are summands of a sum that has not been taken (a Partial placement).

    >>> tensor = torch.ones(2)
    >>> local(tensor) is tensor
    True
    """
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedTraining(
            f"A DTensor of shape {list(tensor.shape)} is placed as {tensor.placements}: what this process holds of it "
            "is a summand, not a value. Call .redistribute() or .full_tensor() on it."
        )
    return to_local(tensor)


def local_gradient(gradient: Any, parameter: Any) -> Tensor | None:
    """The gradient of the local values of ``parameter``, or None.

    A DTensor that is placed otherwise than its parameter, such as the Partial gradients of replicated DTensor
    parameters, is redistributed first, as the optimizer does it; every process must then call this.
    """
    if gradient is None or not is_dtensor(gradient):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def placed(
    values: Tensor, beside: Any, placements: Sequence[Any], shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """A DTensor of which this process has ``values``, over the processes of the DTensor ``beside``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values,
        beside.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def own_part(values: Tensor, parameter: Any) -> Tensor:
    """This process's part of ``values``, which are whole everywhere, placed as ``parameter`` is; all must call this."""
    if not is_dtensor(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    return to_local(distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements))


def like_local(values: Tensor, parameter: Any) -> Tensor:
    """``values`` as a DTensor that is placed as ``parameter`` is; themselves for a plain parameter."""
    if not is_dtensor(parameter):
        return values
    return placed(values, parameter, parameter.placements, parameter.shape, parameter.stride())
