"""Tensors as raw NumPy arrays and back, bit for bit, for dtypes that NumPy lacks as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RAW = {1: torch.uint8, 2: torch.uint16}


def to_numpy(tensor: Tensor) -> tuple[NDArray[Any], str]:
    """The tensor's values on the host, and torch's name of their dtype.

    A dtype without a NumPy counterpart (bfloat16, the 8-bit floats) comes as unsigned integers of its size.

    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16))
    (array([16256, 16256], dtype=uint16), 'bfloat16')
    """
    host = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if hasattr(np, name):
        return host.numpy(), name
    return host.view(_RAW[tensor.element_size()]).numpy(), name


def from_numpy(array: NDArray[Any], dtype: str) -> Tensor:
    """The tensor that `to_numpy` was given, on the host.

    >>> from_numpy(*to_numpy(torch.ones(2, dtype=torch.bfloat16)))
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    tensor = torch.from_numpy(np.array(array))
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else tensor.view(wanted)
