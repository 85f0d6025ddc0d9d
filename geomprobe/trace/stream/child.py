"""The child process that opens files first: a torn or crafted one can hang or crash HDF5.

Parts are read here alone, and a sealed file is opened elsewhere only once it was found good here.

`geomprobe.trace.stream.reader` starts it and keeps it for the next request. The two talk over a
`multiprocessing.connection.Connection`. A request is a dictionary. The answer begins with what the
file says of itself, a dictionary, as `geomprobe.trace.validation` found it. Of a part follow, block by block, lists of
arrays, ``step`` and each table asked for. The answer ends with None or, where the file is refused, with a
`Refusal`. The first row that is not what its checksum says ends the blocks, so that no wrong row ever leaves here.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from geomprobe.errors import RunError
from geomprobe.trace import validation
from geomprobe.trace.stream.checksum import row_checksums

_BLOCK_BYTES = 4 << 20
_MEMORY_BYTES = 2 << 30  # beside what the process has at its start


def serve(descriptor: int) -> None:
    """Answer requests until the other end is closed, as it is when the parent is gone, or until one has failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    _limit_memory()
    parent: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            request = parent.recv()
        except EOFError:
            return
        # A parent that was killed cannot end a child that hangs inside HDF5; an alarm does.
        _limit_time(request)
        try:
            for answer in _answers(request):
                _limit_time(None)  # the parent may take its time with a block
                parent.send(answer)
                _limit_time(request)
        except RunError as error:  # a file that could be read, and was closed
            _limit_time(None)
            parent.send(Refusal(str(error), ends=False))
        except Exception as error:
            parent.send(Refusal(traceback.format_exception_only(error)[-1].strip(), ends=True))
            return  # HDF5 may still hold pieces of a damaged file
        else:
            _limit_time(None)
            parent.send(None)


class Refusal(NamedTuple):
    """Why a file cannot be read, and whether this process ends with it."""

    why: str
    ends: bool


def _limit_time(request: dict[str, Any] | None) -> None:
    """End this process when the time of an answer is over, by the clock or at work; None for no limit."""
    signal.alarm(int(request["timeout_s"]) + 10 if request else 0)
    # A damaged file may keep HDF5 busy for ever. Its own work is measured, so that a slow disk is no reason.
    signal.setitimer(signal.ITIMER_PROF, request["work_s"] if request else 0)


def _limit_memory() -> None:
    """Let a file that declares sizes beyond all measure end in an error, not in the memory of the machine."""
    with contextlib.suppress(OSError, ValueError):  # where there is no such file, or a lower limit already
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY_BYTES,) * 2)


def _answers(asked: dict[str, Any]) -> Iterator[Any]:
    """What a file says of itself, and a part's blocks.

    Asked are ``path`` and ``as``, what the file should be; of a sealed file also ``columns``, the known ones of
    ``/steps``; of a part ``tables`` (None: all), ``start``, ``stop`` and ``block_rows``.
    """
    size = os.stat(asked["path"]).st_size
    if asked["as"] != "part":
        with h5py.File(asked["path"], "r") as file:
            if asked["as"] == "sealed":
                yield validation.sealed_facts(file, size, asked["columns"])
            else:
                yield validation.reference_names(file, size)
        return
    with h5py.File(asked["path"], "r", libver="latest", swmr=True) as file:
        header = validation.part_header(file, size)
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
