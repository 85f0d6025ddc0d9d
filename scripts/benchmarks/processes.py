"""What the probe costs on several processes: step times of recording and replaying, against the plain step.

    python scripts/benchmarks/processes.py                                      1, 2 and 4 processes, DDP and FSDP2
    python scripts/benchmarks/processes.py --processes 8 --features 1024 --layers 12 --batch-size 16 --steps 100

Four trainings of the same GPT on the same words take turns, step by step in the same processes; each step begins when
all processes are there, and is over when the device is:

    plain       the training loop, without geomprobe
    recording   pass 1
    replaying   pass 2, without Hg
    Hg          pass 2, with Hg at each step

Ratios to the plain step are medians over rounds of turns; a step's time is that of the slowest process. Where each
process has a GPU it is NCCL; on CPUs it is gloo with one thread a process, and more processes than cores crowd them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lanes
import torch
from torch import Tensor
from torch import distributed as dist

# isort: split
# lanes has put the examples and the workloads on the path.
from distributed import LanguageModel, join_the_others, spread
from workloads import GPT

import geomprobe
from geomprobe.report.table import table

LANES = ["plain", "recording", "replaying", "Hg"]
WARM_UP = 3
VOCABULARY = 2000


def batches(options: argparse.Namespace, rank: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The same few random batches over and over: the data is not what is measured."""
    generator = torch.Generator().manual_seed(1 + rank)
    shape = options.batch_size, options.context + 1
    few = [torch.randint(VOCABULARY, shape, generator=generator).to(device) for _ in range(4)]
    return [(words[:, :-1], words[:, 1:]) for words in (few[i % 4] for i in range(options.steps + WARM_UP))]


def train(options: argparse.Namespace, data: list[tuple[Tensor, Tensor]], probed: bool) -> Iterator[None]:
    """The training loop, one step at a time."""
    lanes.seed_everything(0)
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


def lane(name: str, folder: Path, options: argparse.Namespace, data: list[tuple[Tensor, Tensor]]) -> lanes.Lane:
    """A training by its name, with the pass that it reports to."""
    training = partial(train, options, data)
    if name == "plain":
        return lanes.Lane(training(False))
    if name == "recording":
        return lanes.Lane(training(True), lanes.recording(folder / name))
    session = lanes.replaying(folder / name, partial(training, True), curvature_every=int(name == "Hg"))
    return lanes.Lane(training(True), session)


def step_times(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step of each training on this process, taking turns."""
    device, rank, _ = join_the_others()
    data = batches(options, rank, device)
    trainings = {name: lane(name, folder, options, data) for name in LANES}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    times = lanes.take_turns(trainings, options.steps, WARM_UP, before=dist.barrier, after=wait)
    for training in trainings.values():
        training.finish()
    return times


def worker(options: argparse.Namespace) -> None:
    """One process of a measurement; the first of them prints the times of the slowest, step by step."""
    torch.set_num_threads(1)
    with lanes.strict_mode(True):
        times = step_times(options, Path(options.folder))
    mine = torch.tensor([times[name] for name in LANES], dtype=torch.float64)
    mine = mine.to("cuda") if torch.cuda.is_available() else mine
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps(dict(zip(LANES, mine.tolist(), strict=True))))
    dist.destroy_process_group()


def measured(options: argparse.Namespace, processes: int, parallel: str) -> dict[str, list[float]]:
    """The step times of a training laid out in one way."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    sizes = [
        part
        for name in ("steps", "batch_size", "context", "features", "layers")
        for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--worker", parallel, "--folder", folder, *sizes]
        found: dict[str, list[float]] = lanes.alone(__file__, *words, launcher=launcher, env=env)
    return found


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """A line of the table for each layout."""
    for parallel in options.parallel:
        for processes in options.processes:
            times = measured(options, processes, parallel)
            ratios = [f"{lanes.ratio(times[name], times['plain']):.2f}" for name in LANES[1:]]
            yield [parallel, str(processes), f"{1e3 * lanes.typical(times['plain']):.1f} ms", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print(lanes.machine())
    print(
        f"GPT of {options.layers} layers of width {options.features}, batch {options.batch_size} x {options.context} "
        f"on each process, {options.steps} steps"
    )
    print(table(["", "processes", "plain step", *LANES[1:]], list(rows(options)), right=[1, 2, 3, 4, 5]))


if __name__ == "__main__":
    main()
