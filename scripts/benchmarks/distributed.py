"""What the probe costs on several processes: step times of recording and replaying, against the plain step.

    python scripts/benchmarks/distributed.py                                    1, 2 and 4 processes, DDP and FSDP2
    python scripts/benchmarks/distributed.py --processes 8 --features 1024 --layers 12 --batch-size 16 --steps 100

Four trainings of the same GPT on the same words take turns, step by step in the same processes, so that whatever slows
the machine slows them all; each step begins when all processes are there, and is over when the device is:

    plain       the training loop, without geomprobe
    recording   pass 1
    replaying   pass 2, without Hg
    Hg          pass 2, with Hg at each step

Ratios are of median step times to the plain step's; a step's time is that of the slowest process. Where each process
has a GPU it is NCCL; on CPUs it is gloo, with one thread a process, and more processes than cores measure the crowd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed import LanguageModel, join_the_others, spread
from torch import Tensor
from torch import distributed as dist
from workloads import GPT

import geomprobe
from geomprobe.distributed.ranks import here
from geomprobe.measure.options import MeasureOptions
from geomprobe.passes.checkpoint.retention import RecordOptions
from geomprobe.passes.lease import own_record
from geomprobe.passes.recording import recording
from geomprobe.passes.references.loaded import References
from geomprobe.passes.replaying import replaying
from geomprobe.passes.session import Session
from geomprobe.report.table import table
from geomprobe.reproducibility.environment import seed_everything, start_manifest, strict_mode
from geomprobe.trace.run_folder import RunFolder

Lane = Iterator[None]
LANES = ["plain", "recording", "replaying", "Hg"]
WARM_UP = 3
VOCABULARY = 2000


def batches(options: argparse.Namespace, rank: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The same few random batches over and over: the data is not what is measured."""
    generator = torch.Generator().manual_seed(1 + rank)
    shape = options.batch_size, options.context + 1
    few = [torch.randint(VOCABULARY, shape, generator=generator).to(device) for _ in range(4)]
    return [(words[:, :-1], words[:, 1:]) for words in (few[i % 4] for i in range(options.steps + WARM_UP))]


def train(options: argparse.Namespace, data: list[tuple[Tensor, Tensor]], probed: bool) -> Lane:
    """The training loop, one step at a time."""
    seed_everything(0)
    sizes = {"features": options.features, "layers": options.layers, "context": options.context}
    model = spread(LanguageModel(GPT(VOCABULARY, **sizes)).to(data[0][0].device), options.worker)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = geomprobe.attach(model, optimizer) if probed else None
    for words, following in data:
        loss = model(words, following)
        optimizer.zero_grad()
        if probe is None:
            loss.backward()
        else:
            probe.backward(loss, closure=partial(model, words, following))
        optimizer.step()
        yield


def reporting(session: Session | None) -> contextlib.AbstractContextManager[None]:
    """Let one training report to its pass, if it has one, while it takes a step."""
    return contextlib.nullcontext() if session is None else session.reporting()


def observed(
    name: str, folder: Path, options: argparse.Namespace, data: list[tuple[Tensor, Tensor]]
) -> Session | None:
    """The pass of a lane; for a replay, its recording is made first."""
    if name == "plain":
        return None
    run = RunFolder(folder / name)
    if name != "recording":
        geomprobe.record(lambda: [None for _ in train(options, data, True)], run.path, seed=0).close()
    ranks = here()
    manifest = start_manifest(seed=0, strict=True, script={}) | ranks.described()
    run.stream.mkdir(parents=True, exist_ok=True)
    if name == "recording":
        return recording(run, manifest, RecordOptions(), ranks)
    recorded = own_record(run, ranks)
    measure = MeasureOptions(curvature_every=int(name == "Hg"))
    return replaying(run, recorded, References(recorded, {}), manifest, measure, ranks=ranks)


def step_times(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step of each training on this process, taking turns."""
    device, rank, _ = join_the_others()
    data = batches(options, rank, device)
    passes = {name: observed(name, folder, options, data) for name in LANES}
    lanes = {name: train(options, data, name != "plain") for name in LANES}
    times: dict[str, list[float]] = {name: [] for name in LANES}
    for _ in data:
        for name, lane in lanes.items():
            dist.barrier()
            began = time.perf_counter()
            with reporting(passes[name]):
                next(lane)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - began)
    for name, session in passes.items():
        with reporting(session):
            next(lanes[name], None)
            if session is not None:
                session.complete()  # raises if the replay was not the same run
    return {name: seconds[WARM_UP:] for name, seconds in times.items()}


def worker(options: argparse.Namespace) -> None:
    """One process of a measurement; the first of them prints the times of the slowest, step by step."""
    torch.set_num_threads(1)
    with strict_mode(True):
        times = step_times(options, Path(options.folder))
    mine = torch.tensor([times[name] for name in LANES], dtype=torch.float64)
    mine = mine.to("cuda") if torch.cuda.is_available() else mine
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps(dict(zip(LANES, mine.tolist(), strict=True))))
    dist.destroy_process_group()
    sys.stdout.flush()
    # torch's threads now and then abort a process that takes its modules apart, which would lose its figures.
    os._exit(0)


def measured(options: argparse.Namespace, processes: int, parallel: str) -> dict[str, list[float]]:
    """The step times of a training laid out in one way."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    sizes = [
        part
        for name in ("steps", "batch_size", "context", "features", "layers")
        for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    package = str(Path(geomprobe.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": package,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [*torchrun, __file__, "--worker", parallel, "--folder", folder, *sizes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(options: argparse.Namespace) -> Iterator[list[Any]]:
    """A line of the table for each layout."""
    for parallel in options.parallel:
        for processes in options.processes:
            times = measured(options, processes, parallel)
            medians = {name: statistics.median(seconds) for name, seconds in times.items()}
            ratios = [f"{medians[name] / medians['plain']:.2f}" for name in LANES[1:]]
            yield [parallel, str(processes), f"{1e3 * medians['plain']:.1f} ms", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"], nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--context", type=int, default=64, help="words of a sequence")
    parser.add_argument("--features", type=int, default=256, help="numbers per word")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    print(f"torch {torch.__version__}, {device}")
    print(
        f"GPT of {options.layers} layers of width {options.features}, batch {options.batch_size} x {options.context} "
        f"on each process, {options.steps} steps"
    )
    print(table(["", "processes", "plain step", *LANES[1:]], list(rows(options)), right=[1, 2, 3, 4, 5]))


if __name__ == "__main__":
    main()
