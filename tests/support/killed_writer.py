"""A process that forks one writer a request, and lets it be killed: by its parent, or by the shim at a write.

A request is a line ``PATH KIND ROWS KILL_AT TORN``: the k-th write call (0: none), and whether half of it is done.
The kind ``seal`` seals the folder PATH's ``part.h5`` into its ``trace.h5`` instead.
Answers are lines: ``pid N``, ``rows N`` after each committed append, ``calls N`` if it lived to its end, ``end``.
"""

import ctypes
import os
import random
import sys
from pathlib import Path

from geomprobe.trace.seal import seal_trace
from support.part_cases import blocks, open_part


def say(word, number=""):
    os.write(1, f"{word} {number}\n".encode())


def write(path, kind, rows):
    random.seed(kind)
    with open_part(path, kind) as writer:
        while writer.rows < rows:
            stop = min(rows, writer.rows + random.choice([1, 3, 17, 64, 64, 200]))
            writer.append(blocks(kind, writer.rows, stop))
            say("rows", writer.rows)


def seal(folder):
    parts, out = [Path(folder) / "part.h5"], Path(folder) / "trace.h5"
    seal_trace(parts, out, status="complete", num_parameters=1, manifest={})


def serve(path, kind, rows, kill_at, torn):
    child = os.fork()
    if child == 0:
        say("pid", os.getpid())
        shim = ctypes.CDLL(None)
        if "LD_PRELOAD" in os.environ:
            shim.kill_at_write(ctypes.c_long(kill_at), ctypes.c_int(torn))
        if kind == "seal":
            seal(path)
        else:
            write(path, kind, rows)
        if "LD_PRELOAD" in os.environ:
            say("calls", shim.writes_seen())
        os._exit(0)
    os.waitpid(child, 0)
    say("end")


if __name__ == "__main__":
    for line in sys.stdin:
        path, kind, rows, kill_at, torn = line.split()
        serve(path, kind, int(rows), int(kill_at), int(torn))
