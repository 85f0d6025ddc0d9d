"""What the probe costs: step time and memory of recording and replaying, against the plain step.

    python scripts/benchmarks/overhead.py                   ResNet-18, batch 64 of 3x32x32: minutes on 2 cores
    python scripts/benchmarks/overhead.py --steps 200       longer, steadier

Six trainings of the same model on the same batches take turns, step by step in one process, so that whatever
slows the machine slows them all:

    plain       the training loop, without geomprobe
    inert       the loop with the probe attached and no pass running
    recording   pass 1
    replaying   pass 2, without Hg
    compiled    the same, with compiled inner products
    naive       inner products as the scripts of No Wrong Turns take them: flatten, concatenate, float32, .item()

Ratios are of median step times to the plain step's. Memory is the peak of a process that runs one training
alone, above that of the plain one, in units of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

import geomprobe
from geomprobe.measure.options import MeasureOptions
from geomprobe.passes.checkpoint.retention import RecordOptions
from geomprobe.passes.recording import recording
from geomprobe.passes.references.loaded import References
from geomprobe.passes.replaying import replaying
from geomprobe.passes.session import Session
from geomprobe.reproducibility.environment import seed_everything, start_manifest, strict_mode
from geomprobe.trace.record import open_record
from geomprobe.trace.run_folder import RunFolder

Lane = Iterator[None]
Reporting = tuple[Lane, Session | None]
LANES = ["plain", "inert", "recording", "replaying", "compiled", "naive"]
WARM_UP = 3


def batches(steps: int, size: int, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The same few random batches over and over: the data is not what is measured."""
    generator = torch.Generator().manual_seed(1)
    few = [
        (torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(4)
    ]
    return [few[i % 4] for i in range(steps)]


def train(data: list[tuple[Tensor, Tensor]], before_step: Callable[[nn.Module], None] | None = None) -> Lane:
    """The plain training loop, one step at a time."""
    seed_everything(0)
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for images, labels in data:
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if before_step is not None:
            before_step(model)
        optimizer.step()
        yield


def train_probed(data: list[tuple[Tensor, Tensor]]) -> Lane:
    """The same loop with the probe."""
    seed_everything(0)
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    probe = geomprobe.attach(model, optimizer)
    for images, labels in probe.batches(data):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        probe.backward(loss)
        optimizer.step()
        yield


class Naive:
    """The inner products as the scripts of No Wrong Turns take them."""

    def __init__(self) -> None:
        self.final = [p.detach().clone() for p in resnet18().parameters()]

    def __call__(self, model: nn.Module) -> None:
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        offset = weights - torch.cat([p.flatten() for p in self.final])
        product = torch.dot(gradient, offset).item()
        squares = torch.linalg.norm(offset).item() ** 2, torch.linalg.norm(gradient).item() ** 2
        self.values = product / squares[0], squares[1] / squares[0], product / squares[1]


def reporting(session: Session | None) -> contextlib.AbstractContextManager[None]:
    """Let one training report to its pass, if it has one, while it takes a step."""
    return contextlib.nullcontext() if session is None else session.reporting()


def finished_run(folder: Path, data: list[tuple[Tensor, Tensor]]) -> RunFolder:
    """A recording to replay."""
    geomprobe.record(lambda: [None for _ in train_probed(data)], folder, seed=0)
    return RunFolder(folder)


def lanes(
    folder: Path, data: list[tuple[Tensor, Tensor]], names: list[str]
) -> dict[str, tuple[Lane, Session | None]]:
    """The trainings by name, each with the pass that it reports to."""
    made: dict[str, Reporting] = {}
    for name in names:
        manifest = start_manifest(seed=0, strict=True, script={})
        if name == "recording":
            run = RunFolder(folder / "recording")
            run.stream.mkdir(parents=True)
            made[name] = train_probed(data), recording(run, manifest, RecordOptions())
        elif name in ("replaying", "compiled"):
            run = finished_run(folder / name, data)
            run.stream.mkdir(parents=True)
            recorded = open_record(run.path)
            made[name] = (
                train_probed(data),
                replaying(
                    run,
                    recorded,
                    References(recorded, {}),
                    manifest,
                    MeasureOptions(curvature_every=0, compiled=name == "compiled"),
                ),
            )
        elif name == "naive":
            made[name] = train(data, Naive()), None
        else:
            made[name] = (train_probed(data) if name == "inert" else train(data)), None
    return made


def measure(folder: Path, data: list[tuple[Tensor, Tensor]], names: list[str]) -> dict[str, list[float]]:
    """Seconds of each step of each training, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in names}
    trainings = lanes(folder, data, names)
    for step in range(len(data)):
        for name, (lane, session) in trainings.items():
            with reporting(session):
                began = time.perf_counter()
                next(lane)
                if step >= WARM_UP:
                    times[name].append(time.perf_counter() - began)
    for lane, session in trainings.values():
        with reporting(session):
            lane.close()
            if session is not None:
                session.complete()  # raises if the replay was not the same run
    return times


def peak_memory(name: str, arguments: argparse.Namespace) -> int:
    """Peak resident bytes of a process that runs one training alone."""
    command = [sys.executable, __file__, "--alone", name, "--batch-size", str(arguments.batch_size)]
    output = subprocess.run(
        [*command, "--image", str(arguments.image)], check=True, capture_output=True, text=True
    )
    return int(json.loads(output.stdout.splitlines()[-1]))


def high_water_mark() -> int:
    """Peak resident bytes of this process alone; getrusage's includes those of the one that started it."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def alone(name: str, arguments: argparse.Namespace) -> None:
    """Run one training and print the process's peak memory."""
    data = batches(4, arguments.batch_size, (3, arguments.image, arguments.image))
    with tempfile.TemporaryDirectory() as folder, strict_mode(True):
        for lane, session in lanes(Path(folder), data, [name]).values():
            gc.collect()
            for _ in data:
                with reporting(session):
                    next(lane)
        print(json.dumps(high_water_mark()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image", type=int, default=32, help="height and width")
    parser.add_argument("--alone", choices=LANES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone, arguments)
        return
    names = LANES
    data = batches(arguments.steps + WARM_UP, arguments.batch_size, (3, arguments.image, arguments.image))
    with tempfile.TemporaryDirectory() as folder, strict_mode(True):
        times = measure(Path(folder), data, names)
    weights = 4 * sum(p.numel() for p in resnet18().parameters())
    memory = {name: peak_memory(name, arguments) for name in names}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    print(
        f"ResNet-18, batch {arguments.batch_size} of 3x{arguments.image}x{arguments.image}, {arguments.steps} steps"
    )
    print(f"{'':10} {'median':>10} {'to plain':>9} {'extra memory':>14}")
    plain = statistics.median(times["plain"])
    for name in names:
        median = statistics.median(times[name])
        extra = (memory[name] - memory["plain"]) / weights
        print(f"{name:10} {1e3 * median:7.1f} ms {median / plain:8.3f}x {extra:8.2f} |w|")


if __name__ == "__main__":
    main()
