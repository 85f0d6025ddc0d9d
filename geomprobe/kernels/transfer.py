"""Small values of the host on their way to the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moved(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """What the host knows, as a tensor on a device, without waiting for it; a step makes none that it can keep.

    >>> moved([True, False], torch.device("cpu"))
    tensor([ True, False])
    """
    tensor = torch.tensor(values, dtype=dtype)
    # The allocator of pinned memory gives none of it to others before the copy has been made.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
