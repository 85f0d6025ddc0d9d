"""The child process that reads parts: a torn file can hang or crash HDF5, so nobody else may open one.

`geomprobe.trace.stream.reader` starts it and keeps it for the next request. The two talk over a
`multiprocessing.connection.Connection`. A request is a dictionary. The answer is the part's header, a dictionary; then,
block by block, a list of arrays, ``step`` and each table asked for; and at last None. Where the part cannot be read,
the answer ends with the reason, as text. The first row that is not what its checksum says ends the blocks, so that no
wrong row ever leaves this process.
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from geomprobe.trace.stream.checksum import row_checksums

_BLOCK_BYTES = 4 << 20


def serve(descriptor: int) -> None:
    """Answer requests until the other end is closed, as it is when the parent is gone, or until one has failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            request = parent.recv()
        except EOFError:
            return
        # A parent that was killed cannot end a child that hangs inside HDF5; an alarm does.
        limit = int(request["timeout_s"]) + 10
        signal.alarm(limit)
        try:
            for answer in _answers(request):
                signal.alarm(0)  # the parent may take its time with a block
                parent.send(answer)
                signal.alarm(limit)
        except Exception as error:
            parent.send(traceback.format_exception_only(error)[-1].strip())
            return  # HDF5 may still hold pieces of a damaged file
        signal.alarm(0)
        parent.send(None)


def _answers(asked: dict[str, Any]) -> Iterator[Any]:
    """The header and the blocks; asked are ``path``, ``tables`` (None: all), ``start``, ``stop``, ``block_rows``."""
    with h5py.File(asked["path"], "r", libver="latest", swmr=True) as file:
        header = _header(file)
        yield header
        yield from _whole_blocks(file, header, asked)


def _whole_blocks(file: Any, header: dict[str, Any], asked: dict[str, Any]) -> Iterator[list[NDArray[Any]]]:
    """Blocks of ``step`` and the tables, up to the first row that is damaged."""
    names = [name for name, table in header["tables"].items() if table["columns"]]
    chosen = [name for name in names if asked["tables"] is None or name in asked["tables"]]
    places = [1 + names.index(name) for name in chosen]
    width = 1 + sum(len(header["tables"][name]["columns"]) for name in chosen)
    size = asked["block_rows"] or max(1, _BLOCK_BYTES // (8 * width))
    end = header["rows"] if asked["stop"] is None else min(asked["stop"], header["rows"])
    for first in range(asked["start"], end, size):
        rows = slice(first, min(first + size, end))
        arrays = [file[path][rows] for path in ("step", *(f"tables/{name}" for name in chosen))]
        good = _good(arrays[0], arrays[1:], file["checks"][rows], places)
        if good:
            yield [array[:good] for array in arrays]
        if good < len(arrays[0]):
            return


def _header(file: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = {key: _plain(value) for key, value in file.attrs.items()}
    header = {key: attributes.pop(key) for key in ("schema", "schema_version", "first_step")}
    tables = json.loads(attributes.pop("tables"))
    rows = _committed(file["step"][:], header["first_step"])
    return {**header, "attributes": attributes, "tables": tables, "rows": rows}


def _committed(step: NDArray[np.int64], first_step: int) -> int:
    return _leading(step == first_step + np.arange(len(step)))


def _good(
    step: NDArray[np.int64], tables: Sequence[NDArray[Any]], checks: NDArray[np.int64], places: Sequence[int]
) -> int:
    """How many rows from the first on are what their checksums say; `places` tells which checksums those are."""
    if any(len(array) != len(step) for array in (checks, *tables)):
        return 0
    good = [checks[:, 0] == step]
    good += [row_checksums(step, table) == checks[:, at] for table, at in zip(tables, places, strict=True)]
    return _leading(np.logical_and.reduce(good))


def _leading(true: NDArray[np.bool_]) -> int:
    wrong = np.flatnonzero(~true)
    return int(wrong[0]) if len(wrong) else len(true)


def _plain(value: Any) -> str | int | float:
    return value if isinstance(value, str) else value.item()
