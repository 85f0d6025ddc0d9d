"""What proving a row costs: the sources of its gradient, the weights that Hg is of, and the checks of Hg.

    python scripts/benchmarks/proofs.py                     ResNet-18, batch 64 of 3x32x32: minutes on 2 cores

Trainings of the same model on the same batches take turns, step by step in one process:

    plain     the training loop, without geomprobe
    sources   it, and what follows the gradients: each step of each pass has this
    Hg        the loop with the double backward of each step
    weights   it, and what compares the weights: each step with Hg has this
    checked   it, and what checks that there is a Hessian, in each step; a replay does so five times in a run

Times are medians over steps, ratios medians over rounds of turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lanes
import torch
from overhead import WARM_UP, batches
from torch import Tensor
from torch.nn import functional
from torchvision.models import resnet18

from geomprobe.kernels.fused_read import FusedRead
from geomprobe.measure.curvature.hessian_gradient import Curvature
from geomprobe.measure.curvature.symmetry import direction
from geomprobe.measure.gradient_sources import GradientSources
from geomprobe.probe.listeners import LossTracker
from geomprobe.report.table import table

LANES = ["plain", "sources", "Hg", "weights", "checked"]


def train(name: str, data: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """One of the loops, one step at a time."""
    lanes.seed_everything(0)
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parameters: list[Tensor] = list(model.parameters())
    losses = LossTracker()
    sources = GradientSources(losses)
    probe: Any = SimpleNamespace(parameters=dict(enumerate(parameters)), optimizers=[optimizer])
    sources.attached(probe)
    curvature, look = Curvature(parameters, model), FusedRead(parameters)
    for images, labels in data:
        optimizer.zero_grad()
        before = look.look(parameters)[0] if name in ("weights", "checked") else None
        loss = functional.cross_entropy(model(images), labels)
        if name == "sources":
            losses.losses_seen([loss])
            with sources.backward_pass([loss], [None]):
                loss.backward()
            sources.settle()
            sources.after_update()
            losses.after_update()
        elif name == "plain":
            loss.backward()
        else:
            curvature.backward(loss)
            if name == "checked":
                curvature.gradient()
                curvature.product(direction(parameters, 1), keep=True)
            curvature.product([p.grad for p in parameters])
            if before is not None:
                (look.look(parameters)[0] == before).all()
        optimizer.step()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image", type=int, default=32, help="height and width")
    arguments = parser.parse_args()
    data = batches(WARM_UP + arguments.steps, arguments.batch_size, (3, arguments.image, arguments.image))
    ways = {name: lanes.Lane(train(name, data)) for name in LANES}
    times = lanes.take_turns(ways, arguments.steps, WARM_UP)
    print(lanes.machine())
    print(f"ResNet-18, batch {arguments.batch_size} of 3x{arguments.image}x{arguments.image}, {arguments.steps} steps")
    rows = [
        [name, f"{1e3 * lanes.typical(times[name]):.1f} ms"]
        + [f"{lanes.ratio(times[name], times[other]):.3f}x" for other in ("plain", "Hg")]
        for name in LANES
    ]
    print(table(["", "median", "to plain", "to Hg"], rows, right=[1, 2, 3]))


if __name__ == "__main__":
    main()
