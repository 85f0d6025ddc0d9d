"""Processes that run out of space: each forks with a limit on file sizes and does one thing until it fails.

``full_disk.py THING FOLDER LIMIT...`` prints, for each limit, the exit status and what the process said.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path

import numpy as np

from geomprobe.trace.seal import seal_trace, write_reference
from geomprobe.trace.stream.writer import WriteFailed
from support.part_cases import blocks, open_part

KIND = "geomprobe-record"


def append_until_full(writer):
    while True:
        writer.append(blocks(KIND, writer.rows, writer.rows + 50))


def caught(folder):
    """The failure is handled, tried again, and the writer closed."""
    writer = open_part(folder / "part.h5", KIND)
    try:
        append_until_full(writer)
    except WriteFailed as error:
        first = str(error)
    rows = writer.rows
    try:
        writer.append(blocks(KIND, rows, rows + 1))
    except WriteFailed as error:
        print(rows, str(error) == first, first)
    writer.close()
    writer.close()


def uncaught(folder):
    """The failure ends the process."""
    with open_part(folder / "part.h5", KIND) as writer:
        append_until_full(writer)


def left_open(folder):
    """Nobody closes the writer."""
    writer = open_part(folder / "part.h5", KIND)
    with contextlib.suppress(WriteFailed):
        append_until_full(writer)
    print(writer.rows)


def closed_when_full(folder):
    """The disk fills up between the last append and the close."""
    writer = open_part(folder / "part.h5", KIND)
    writer.append(blocks(KIND, 0, 50))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    writer.close()
    print(writer.rows)


def exited_when_full(folder):
    """The same, and nobody closes."""
    writer = open_part(folder / "part.h5", KIND)
    writer.append(blocks(KIND, 0, 50))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    print(writer.rows)


def seal(folder):
    parts, out = [folder.parent / "whole.h5"], folder.parent / "trace.h5"
    try:
        seal_trace(parts, out, status="complete", num_parameters=1, manifest={})
    except WriteFailed as error:
        print(error)


def reference(folder):
    arrays = {f"layer{i}": (np.random.rand(50_000), "float64") for i in range(4)}
    try:
        write_reference(folder.parent / "reference-final.h5", arrays)
    except WriteFailed as error:
        print(error)


def limited(thing, folder, limit):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        thing(folder)
        sys.stdout.flush()
        return True
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"status {status} {limit}", flush=True)
    return False


if __name__ == "__main__":
    name, root, *limits = sys.argv[1:]
    for number in map(int, limits):
        if limited(globals()[name], Path(root) / str(number), number):
            break
