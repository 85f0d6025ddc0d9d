"""What the probe costs: step time and memory of recording and replaying, against the plain step.

    python scripts/benchmarks/overhead.py                   ResNet-18, batch 64 of 3x32x32: minutes on 2 cores
    python scripts/benchmarks/overhead.py --steps 200       longer, steadier

Six trainings of the same model on the same batches take turns, step by step in one process:

    plain       the training loop, without geomprobe
    inert       the loop with the probe attached and no pass running
    recording   pass 1
    replaying   pass 2, without Hg
    naive       inner products as the scripts of No Wrong Turns take them: flatten, concatenate, float32, .item()

Times are medians over steps, ratios medians over rounds of turns. Memory is the peak of a process that runs one
training alone, above that of the plain one, in units of the weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lanes
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

import geomprobe
from geomprobe.report.table import table

LANES = ["plain", "inert", "recording", "replaying", "naive"]
WARM_UP = 3


def batches(steps: int, size: int, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The same few random batches over and over: the data is not what is measured."""
    generator = torch.Generator().manual_seed(1)
    few = [
        (torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(4)
    ]
    return [few[i % 4] for i in range(steps)]


def train(data: list[tuple[Tensor, Tensor]], before_step: Callable[[nn.Module], None] | None = None) -> Iterator[None]:
    """The plain training loop, one step at a time."""
    lanes.seed_everything(0)
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


def train_probed(data: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The same loop with the probe."""
    lanes.seed_everything(0)
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


def lane(name: str, folder: Path, data: list[tuple[Tensor, Tensor]]) -> lanes.Lane:
    """A training by its name, with the pass that it reports to."""
    if name == "plain":
        return lanes.Lane(train(data))
    if name == "naive":
        return lanes.Lane(train(data, Naive()))
    if name == "inert":
        return lanes.Lane(train_probed(data))
    if name == "recording":
        return lanes.Lane(train_probed(data), lanes.recording(folder / name))
    replayed = lanes.replaying(folder / name, lambda: train_probed(data), curvature_every=0)
    return lanes.Lane(train_probed(data), replayed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image", type=int, default=32, help="height and width")
    parser.add_argument("--alone", choices=LANES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (3, arguments.image, arguments.image)
    steps = WARM_UP if arguments.alone else arguments.steps
    data = batches(WARM_UP + steps, arguments.batch_size, shape)
    with tempfile.TemporaryDirectory() as folder, lanes.strict_mode(True):
        if arguments.alone:
            lanes.print_peak(lane(arguments.alone, Path(folder), data), WARM_UP, steps)
            return
        trainings = {name: lane(name, Path(folder), data) for name in LANES}
        times = lanes.take_turns(trainings, steps, WARM_UP)
        for training in trainings.values():
            training.finish()
    sizes = ["--batch-size", str(arguments.batch_size), "--image", str(arguments.image)]
    memory = {name: lanes.alone(__file__, "--alone", name, *sizes) for name in LANES}
    weights = 4 * sum(p.numel() for p in resnet18().parameters())
    print(lanes.machine())
    print(f"ResNet-18, batch {arguments.batch_size} of 3x{arguments.image}x{arguments.image}, {steps} steps")
    rows = [
        [
            name,
            f"{1e3 * lanes.typical(times[name]):.1f} ms",
            f"{lanes.ratio(times[name], times['plain']):.3f}x",
            f"{(memory[name] - memory['plain']) / weights:.2f} |w|",
        ]
        for name in LANES
    ]
    print(table(["", "median", "to plain", "extra memory"], rows, right=[1, 2, 3]))


if __name__ == "__main__":
    main()
