"""A process that holds a run and writes parts of a pass on command, until it is closed or killed.

Every number is a known function of its step: distance 2, gradient norm 3, and `cosine` and `residual` below.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

RATE = 0.1
COLUMNS = {
    "trace": (
        *("steps/epoch", "steps/loss", "groups/0/lr", "inner_products/g.g", "inner_products/g.d"),
        *("inner_products/d.d", "inner_products/Hg.Hg", "steps/same"),
    ),
    "record": ("epoch", "loss", "lr"),
}
FIRST_DIFFERENT = 100_000
EPOCH = 50


def loss(step):
    return 10.0 - np.asarray(step) / 1000


def cosine(step):
    return np.cos(np.asarray(step) / 100)


def residual(step):
    """The relative residual; measured at each tenth step."""
    step = np.asarray(step)
    return np.where(step % 10 == 0, np.exp(-step / 100), np.nan)


def rows(kind, first, stop):
    step = np.arange(first, stop)
    ones = np.ones(len(step))
    steps = [step // EPOCH, loss(step)]
    if kind == "record":
        return np.stack([*steps, RATE * ones], axis=1)
    hg = 3 * residual(step) / RATE
    products = [9 * ones, 6 * cosine(step), 4 * ones, hg**2, step < FIRST_DIFFERENT]
    return np.stack([*steps, RATE * ones, *products], axis=1).astype(float)


def open_part(path, kind, first):
    from geomprobe.trace.stream.writer import PartWriter, Table

    table = Table({"trace": "values", "record": "steps"}[kind], COLUMNS[kind], "float64")
    others = [Table("fingerprints/loss", ("loss",), "int64")] if kind == "record" else []
    attributes = {"manifest": "{}", "num_parameters": 7}
    return PartWriter(
        path, schema=f"geomprobe-{kind}", tables=[table, *others], attributes=attributes, first_step=first
    )


def append(part, kind, first, count):
    start = first + part.rows
    blocks = {{"trace": "values", "record": "steps"}[kind]: rows(kind, start, start + count)}
    if kind == "record":
        blocks["fingerprints/loss"] = np.arange(start, start + count)[:, None]
    part.append(blocks)


class LiveWriter:
    """The process, as a context manager that kills it. Each part is named by its first step."""

    def __init__(self, run, kind="trace"):
        command = [sys.executable, __file__, str(run), kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._hear()

    @property
    def pid(self):
        return self._process.pid

    def append(self, count, first=0):
        """Commit rows to the part that begins at ``first``."""
        self._process.stdin.write(f"{first} {count}\n")
        self._process.stdin.flush()
        self._hear()

    def close(self):
        """Let it end in good order, which takes its lock away."""
        self._process.stdin.close()
        self._process.wait()

    def kill(self):
        self._process.kill()
        self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()

    def _hear(self):
        assert self._process.stdout.readline() == "done\n"


def main(run, kind):
    from geomprobe.trace.run_folder import RunFolder

    parts = {}
    with RunFolder(run).writing():
        print("done", flush=True)
        for line in sys.stdin:
            first, count = map(int, line.split())
            path = Path(run) / "stream" / f"{kind}-{first:08d}.h5"
            parts[first] = parts.get(first) or open_part(path, kind, first)
            append(parts[first], kind, first, count)
            print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
