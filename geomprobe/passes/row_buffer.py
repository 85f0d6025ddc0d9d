"""One row a step, kept on the device until a block is full, so that no step waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geomprobe.reproducibility.columns import Columns, Row, by_table
from geomprobe.trace.stream.writer import Table

CAPACITY = 64  # rows in a block
INTERVAL = 1.0  # seconds after which a block that is not full is handed over all the same

Block = dict[str, NDArray[Any]]  # by table: an array [steps, columns]

_DTYPES = {"float64": torch.float64, "int64": torch.int64}


class RowBuffer:
    """Collects a row of values at each step, and calls ``deliver`` with each `Block`, in order.

    A row comes as a mapping from name to values; ``columns`` fix their order, and ``tables`` are made of them. On a GPU
    (``device``) a block is copied to pinned memory behind the kernels that fill it and delivered when the next one is
    due, so the host never waits for the device in between.

    >>> got = []
    >>> loss = Columns("loss", "steps", ("loss",), "float64", on_device=True)
    >>> rows = RowBuffer(torch.device("cpu"), [loss, Columns("lr", "steps", ("lr",), "float64", False)], got.append)
    >>> rows.append({"loss": torch.ones(1, dtype=torch.float64), "lr": [0.5]})
    >>> rows.flush(); got[0]["steps"]
    array([[1. , 0.5]])
    """

    def __init__(self, device: torch.device, columns: Sequence[Columns], deliver: Callable[[Block], None]) -> None:
        if len({each.name for each in columns}) < len(columns):
            raise ValueError(f"two columns of a row have one name: {sorted(each.name for each in columns)}")
        self._device, self._deliver = device, deliver
        self._by_table = by_table(columns)
        self.tables = [
            Table(table, tuple(name for each in group for name in each.columns), group[0].dtype)
            for table, group in self._by_table.items()
        ]
        self._host_names = [each.name for each in columns if not each.on_device]
        self._device_names: dict[str, list[str]] = {}  # by dtype, in the order of `_blocks`' columns
        self._places: dict[str, slice] = {}
        self._blocks: dict[str, Tensor] = {}
        for dtype, torch_dtype in _DTYPES.items():
            own = [each for each in columns if each.on_device and each.dtype == dtype and each.columns]
            end = 0
            for each in own:
                self._places[each.name] = slice(end, end := end + len(each.columns))
            if own:
                self._device_names[dtype] = [each.name for each in own]
                self._blocks[dtype] = torch.zeros(CAPACITY, end, dtype=torch_dtype, device=device)
        self._host: list[list[Any]] = []
        self._copying: tuple[dict[str, Tensor], Any, list[list[Any]]] | None = None
        self._opened = time.monotonic()
        self._whole = True

    def append(self, row: Row) -> None:
        """Add a step's row; hands over a block when it is full or a second old."""
        self._whole = False  # an error or Ctrl-C in here loses this row's place, and no later one may take it
        count = len(self._host)
        for dtype, names in self._device_names.items():
            values, place = [row[name] for name in names], self._blocks[dtype][count]
            if sum(map(torch.numel, values)) != place.numel():  # `cat` would write to other memory
                raise RuntimeError(f"a row has {[v.numel() for v in values]} values of {names} for {place.numel()}")
            torch.cat(values, out=place)
        self._host.append([row[name] for name in self._host_names])
        if len(self._host) == CAPACITY or time.monotonic() - self._opened > INTERVAL:
            self._rotate()
        self._whole = True

    def flush(self) -> None:
        """Hand over everything, waiting for the device where it must; nothing, once an `append` was cut off."""
        if self._whole:
            self._rotate()
            self._finish_copy()

    def _rotate(self) -> None:
        self._finish_copy()
        count, self._opened = len(self._host), time.monotonic()
        if not count:
            return
        cuda = self._device.type == "cuda"
        filled = {
            dtype: torch.empty(block[:count].shape, dtype=block.dtype, device="cpu", pin_memory=cuda).copy_(
                block[:count], non_blocking=cuda
            )
            for dtype, block in self._blocks.items()
        }
        event = torch.cuda.current_stream(self._device).record_event() if cuda else None
        self._copying, self._host = (filled, event, self._host), []
        if event is None:
            self._finish_copy()

    def _finish_copy(self) -> None:
        if self._copying is None:
            return
        (filled, event, host), self._copying = self._copying, None
        if event is not None:
            event.synchronize()
        arrays = {dtype: block.numpy() for dtype, block in filled.items()}
        columns = dict(zip(self._host_names, zip(*host, strict=True), strict=True))

        def values(each: Columns) -> NDArray[Any]:
            if each.name in self._places:
                return arrays[each.dtype][:, self._places[each.name]]
            return np.array(columns.get(each.name, ()), each.dtype).reshape(len(host), len(each.columns))

        self._deliver({table: np.hstack([values(each) for each in group]) for table, group in self._by_table.items()})
