"""The values that this process holds of a tensor, whether that is plain or a DTensor spread over many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geomprobe.errors import UnsupportedTraining


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor; without importing what DTensors need, where there are none.

    >>> is_dtensor(torch.ones(1))
    False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The values that this process holds, in the memory where they lie; for a plain tensor that is itself.

    Raises:
        UnsupportedTraining: they are summands of a sum that has not been taken (a Partial placement).

    >>> tensor = torch.ones(2)
    >>> local(tensor) is tensor
    True
    """
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise UnsupportedTraining(
            f"A DTensor of shape {list(tensor.shape)} is placed as {tensor.placements}: what "  # type: ignore[attr-defined]
            "this process holds of it is a summand, not a value. Call .redistribute() or .full_tensor() on it."
        )
    return held(tensor)


def local_gradient(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient of the local values of ``parameter``.

    A DTensor that lies otherwise than its parameter, such as the Partial gradients of replicated DTensor
    parameters, is brought there first, as the optimizer does it; every process must then call this.

    >>> local_gradient(None, torch.ones(2)) is None
    True
    """
    if gradient is None or not is_dtensor(gradient):
        return gradient
    placements = parameter.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(gradient)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values on every process, such as a loss; every process must call this.

    >>> whole(torch.tensor(2.0))
    tensor(2.)
    """
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, be it values or summands, in the memory where it lies.

    >>> tensor = torch.ones(2)
    >>> held(tensor) is tensor
    True
    """
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def placed(
    values: Tensor, beside: Tensor, placements: Sequence[Any], shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """A DTensor of which this process holds ``values``, over the processes that the DTensor ``beside`` lies on."""
    from torch.distributed.tensor import DTensor

    mesh = beside.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(
        values, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def own_part(values: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of ``values``, whole everywhere, once they lie as ``parameter`` does.

    Every process must call this.

    >>> values = torch.ones(2)
    >>> own_part(values, torch.zeros(2)) is values
    True
    """
    if not is_dtensor(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return held(distribute_tensor(values.to(parameter.device), mesh, placements))


def like_local(values: Tensor, parameter: Tensor) -> Tensor:
    """``values`` as a DTensor that is placed as ``parameter`` is; themselves for a plain parameter.

    >>> values = torch.ones(2)
    >>> like_local(values, torch.zeros(2)) is values
    True
    """
    if not is_dtensor(parameter):
        return values
    return placed(values, parameter, parameter.placements, parameter.shape, parameter.stride())  # type: ignore[attr-defined]
