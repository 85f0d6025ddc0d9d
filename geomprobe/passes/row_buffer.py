"""One row a step, kept on the device until a block is full, so that no step waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CAPACITY = 64  # rows in a block
INTERVAL = 1.0  # seconds after which a block that is not full is handed over all the same


class Block(NamedTuple):
    """Rows of consecutive steps, on the host; each array has one row a step."""

    floats: NDArray[np.float64]
    integers: NDArray[np.int64]
    host_floats: NDArray[np.float64]
    host_integers: NDArray[np.int64]


class RowBuffer:
    """Collects a row of device values and a row of host values at each step, and hands them over in blocks.

    Args:
        device: where ``floats`` and ``integers`` of a step live.
        floats: float64 device values a step.
        integers: int64 device values a step.
        deliver: called with each `Block`, in order.

    On a GPU a block is copied to pinned memory behind the kernels that fill it and delivered when the next
    one is due, so the host never waits for the device in between.

    >>> got = []
    >>> rows = RowBuffer(torch.device("cpu"), 1, 1, got.append)
    >>> rows.append(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64), [0.5], [7])
    >>> rows.flush(); got[0].host_floats.tolist(), len(got[0].floats)
    ([[0.5]], 1)
    """

    def __init__(
        self, device: torch.device, floats: int, integers: int, deliver: Callable[[Block], None]
    ) -> None:
        self._device = device
        self._deliver = deliver
        self._widths = floats, integers
        self._floats, self._integers = self._allocate()
        self._host: list[tuple[list[float], list[int]]] = []
        self._copying: tuple[Tensor, Tensor, Any, list[tuple[list[float], list[int]]]] | None = None
        self._opened = time.monotonic()
        self._whole = True

    def append(
        self, floats: Tensor, integers: Tensor, host_floats: list[float], host_integers: list[int]
    ) -> None:
        """Add a step's row; hands over a block when it is full or a second old."""
        self._whole = False  # an error or Ctrl-C in here loses this row's place, and no later one may take it
        row = len(self._host)
        self._floats[row].copy_(floats, non_blocking=True)
        self._integers[row].copy_(integers, non_blocking=True)
        self._host.append((host_floats, host_integers))
        if len(self._host) == CAPACITY or time.monotonic() - self._opened > INTERVAL:
            self._rotate()
        self._whole = True

    def flush(self) -> None:
        """Hand over everything, waiting for the device where it must; nothing, once an `append` was cut off."""
        if self._whole:
            self._rotate()
            self._finish_copy()

    def _allocate(self) -> tuple[Tensor, Tensor]:
        floats, integers = self._widths
        return (
            torch.zeros(CAPACITY, floats, dtype=torch.float64, device=self._device),
            torch.zeros(CAPACITY, integers, dtype=torch.int64, device=self._device),
        )

    def _rotate(self) -> None:
        self._finish_copy()
        count, self._opened = len(self._host), time.monotonic()
        if not count:
            return
        floats, integers, event = self._floats[:count], self._integers[:count], None
        if self._device.type == "cuda":
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (floats, integers)]
            floats, integers = (
                to.copy_(source, non_blocking=True)
                for to, source in zip(pinned, (floats, integers), strict=True)
            )
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        else:
            floats, integers = floats.cpu().clone(), integers.cpu().clone()
        self._copying, self._host = (floats, integers, event, self._host), []
        if event is None:
            self._finish_copy()

    def _finish_copy(self) -> None:
        if self._copying is None:
            return
        (floats, integers, event, host), self._copying = self._copying, None
        if event is not None:
            event.synchronize()
        host_floats = np.array([row[0] for row in host], np.float64).reshape(len(host), -1)
        host_integers = np.array([row[1] for row in host], np.int64).reshape(len(host), -1)
        self._deliver(Block(floats.numpy(), integers.numpy(), host_floats, host_integers))
