"""Whether a replay of a long run stays small and fast: memory against steps, rows written a second, time of sealing.

    python scripts/benchmarks/streaming.py                            10,000 and 100,000 steps: about 10 minutes
    python scripts/benchmarks/streaming.py --steps 2000 20000

Memory is the peak of a process that replays a run of cheap steps (a linear layer of 3 numbers) without Hg. Rows are
written as a replay writes them, through the block on the device and the part, as fast as the loop that makes them can;
sealing is timed on the parts that this leaves.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

import lanes
import numpy as np
import torch

import geomprobe
from geomprobe.passes.row_buffer import Block, RowBuffer
from geomprobe.report.table import number, table
from geomprobe.trace.schema import TRACE_SCHEMA, VALUES
from geomprobe.trace.seal import seal_trace
from geomprobe.trace.stream.writer import PartWriter, Table

HOST = ("steps/epoch", "groups/0/lr", "groups/0/weight_decay", "groups/0/momentum")
DEVICE = ("steps/loss", *(f"inner_products/{name}" for name in ("g.g", "w.g", "w.w", "g.d", "w.d", "d.d")))
PRINTS = 200  # fingerprints a step: those of a ResNet-18, with momentum and BatchNorm
TARGET = 5000


def train(steps: int) -> None:
    """Cheap steps."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(8, 2)
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(10):
        for _ in range(steps // 10):
            optimizer.zero_grad()
            probe.backward((model(data) - torch.rand(8, 1)).square().mean())
            optimizer.step()


def one_pass(verb: str, run: str, steps: int) -> None:
    """One pass of a run; prints the seconds that it took and the process's peak memory."""
    began = time.perf_counter()
    if verb == "record":
        geomprobe.record(functools.partial(train, steps), run, seed=0).close()
    else:
        geomprobe.replay(functools.partial(train, steps), run, curvature_every=0)
    print(json.dumps([time.perf_counter() - began, lanes.peak_memory()]))


def passed(verb: str, run: Path, steps: int) -> list[str]:
    """A row of the table: a pass in a process of its own."""
    words = ["--alone", verb, str(run), "--steps", str(steps)]
    seconds, peak = lanes.alone(__file__, *words, env={"OMP_NUM_THREADS": "1"})
    return [verb, f"{steps}", f"{seconds:.1f} s", f"{steps / seconds:.0f}", f"{peak / 2**20:.1f} MiB"]


def written(folder: Path, steps: int) -> tuple[float, float]:
    """Seconds of streaming rows, and of sealing them."""
    path = folder / "trace-00000000.h5"
    columns = Table(VALUES, (*HOST, *DEVICE), "float64")
    with PartWriter(path, schema=TRACE_SCHEMA, tables=[columns], attributes={}) as writer:

        def deliver(block: Block) -> None:
            writer.append({VALUES: np.hstack([block.host_floats, block.floats])})

        rows = RowBuffer(torch.device("cpu"), len(DEVICE), PRINTS, deliver)
        values, prints = torch.rand(len(DEVICE), dtype=torch.float64), torch.zeros(PRINTS, dtype=torch.int64)
        began = time.perf_counter()
        for step in range(steps):
            rows.append(values, prints, [float(step), 0.1, 0.0, 0.9], [step, step])
        rows.flush()
        streamed = time.perf_counter()
    seal_trace([path], folder / "trace.h5", status="complete", manifest={}, num_parameters=3, timeout_s=600)
    return streamed - began, time.perf_counter() - streamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--alone", nargs=2, metavar=("PASS", "RUN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        verb, run = arguments.alone
        one_pass(verb, run, arguments.steps[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        passes = [passed(verb, Path(folder) / str(n), n) for n in arguments.steps for verb in ("record", "replay")]
        streams = {n: written(Path(tempfile.mkdtemp(dir=folder)), n) for n in arguments.steps}
    print(table(["pass", "steps", "time", "steps/s", "peak memory"], passes, right=[1, 2, 3, 4]), end="\n\n")
    rows = [
        [str(n), f"{n / stream:.0f}", number(n / stream / TARGET, 3), f"{seal:.2f} s"]
        for n, (stream, seal) in streams.items()
    ]
    print(table(["rows", "rows/s", f"over {TARGET}/s", "sealing"], rows, right=[0, 1, 2, 3]))


if __name__ == "__main__":
    main()
