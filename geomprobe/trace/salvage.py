"""The child process that reads a part for `geomprobe.trace.part`: a torn file can hang or crash HDF5, so only it may.

It writes to standard output one JSON line (the header), then, block by block, the raw bytes of ``step``
and of each asked-for table, committed rows only.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np

BLOCK_BYTES = 4 << 20


def block_rows(columns: int) -> int:
    """Rows of one block of the stream, about 4 MiB of 8-byte numbers.

    >>> block_rows(40)
    12787
    """
    return max(1, BLOCK_BYTES // (8 * (columns + 1)))


def serve(request: str) -> None:
    """Answer one request, JSON with ``path``, ``tables`` (or null for all), ``start`` and ``stop`` (or null)."""
    # So that Ctrl-C also ends a process that hangs inside HDF5.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    asked = json.loads(request)
    with h5py.File(asked["path"], "r", libver="latest", swmr=True) as file:
        header = _header(file)
        chosen = asked["tables"]
        names = [name for name in header["tables"] if chosen is None or name in chosen]
        _write(file, header, names, asked["start"], asked["stop"], sys.stdout.buffer)


def _header(file: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = {key: _plain(value) for key, value in file.attrs.items()}
    header = {key: attributes.pop(key) for key in ("schema", "schema_version", "first_step")}
    tables = json.loads(attributes.pop("tables"))
    return {**header, "attributes": attributes, "tables": tables, "rows": _committed(file, header, tables)}


def _committed(file: Any, header: dict[str, Any], tables: dict[str, Any]) -> int:
    step = file["step"][:]
    wrong = np.flatnonzero(step != header["first_step"] + np.arange(len(step)))
    rows = int(wrong[0]) if len(wrong) else len(step)
    return min([rows, *(len(file[f"tables/{name}"]) for name in tables if tables[name]["columns"])])


def _write(
    file: Any, header: dict[str, Any], names: list[str], start: int, stop: int | None, out: BinaryIO
) -> None:
    out.write(json.dumps(header).encode() + b"\n")
    filled = [file[f"tables/{name}"] for name in names if header["tables"][name]["columns"]]
    end = header["rows"] if stop is None else min(stop, header["rows"])
    size = block_rows(sum(table.shape[1] for table in filled))
    for first in range(start, end, size):
        last = min(first + size, end)
        for dataset in (file["step"], *filled):
            out.write(np.ascontiguousarray(dataset[first:last]).data)
    out.flush()


def _plain(value: Any) -> str | int | float:
    return value if isinstance(value, str) else value.item()
