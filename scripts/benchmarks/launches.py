"""How many kernels and host synchronizations a step of each pass would ask of a GPU, beyond the plain step.

    python scripts/benchmarks/launches.py                   MLP, ResNet-50 and GPT-2-small: minutes, and 8 GB of memory
    python scripts/benchmarks/launches.py mlp --where       and the lines of geomprobe that they come from

It needs no GPU. Each operator of one step in the middle of a training is priced as torch's CUDA build would launch it
(`device_work.DeviceWork`). What the plain step asks for is subtracted; under "with Hg" beside it, what a step with a
double backward written by hand asks for. The attention of GPT is torch's plain one, which can be differentiated twice.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lanes
import torch
from device_work import DeviceWork
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import geomprobe
from geomprobe.kernels.numba_kernel import NumbaKernel
from geomprobe.passes import row_buffer
from geomprobe.report.table import table
from geomprobe.reproducibility.digest import leaves
from geomprobe.reproducibility.fingerprint import StepInputs
from geomprobe.trace.blame import STATE_STEPS

STEPS, COUNTED = (
    STATE_STEPS.first + 2,
    STATE_STEPS.first,
)  # the optimizer's state is read at the first steps, then rarely
READ = 4  # of TritonKernel.read: a copy of the table of addresses, zeros for the columns' sums, and two kernels
RARELY = 1000  # the check of Hg, whose work no step in the middle has
TARGET = {"record": (20, 0), "replay": (20, 0)}
"""Launches and waits beyond the plain step; with Hg, 1.1 of the launches of a step with a double backward by hand."""

Batch = tuple[nn.Module, Tensor, Tensor]


def mlp(width: int = 1024) -> Batch:
    layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers), torch.randn(32, 784), torch.randint(10, (32,))


def resnet50() -> Batch:
    import torchvision

    return torchvision.models.resnet50(num_classes=10), torch.randn(2, 3, 32, 32), torch.randint(10, (2,))


def gpt2_small(tokens: int = 50257, features: int = 768, layers: int = 12) -> Batch:
    from workloads.gpt import GPT

    model = GPT(tokens, features=features, heads=12, layers=layers, context=1024)
    return model, torch.randint(tokens, (8, 2)), torch.randint(tokens, (8 * 2,))


MODELS: dict[str, Callable[[], Batch]] = {"mlp": mlp, "resnet50": resnet50, "gpt2-small": gpt2_small}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-4, foreach=True),
    "fused AdamW": functools.partial(torch.optim.AdamW, lr=1e-4, fused=True),
}
LANES = ["plain", "by hand", "record", "replay", "replay with Hg"]


def trained(
    make: Callable[[], Batch], make_optimizer: Callable[..., Any], work: DeviceWork, by_hand: bool = False
) -> None:
    """Train a few steps, and count one of them. ``by_hand`` takes Hg by a double backward, without geomprobe."""
    model, inputs, labels = make()
    optimizer = make_optimizer(model.parameters())
    parameters = list(model.parameters())
    probe = geomprobe.attach(model, optimizer)
    batches = iter(probe.batches([(inputs, labels)] * STEPS))
    for step in range(STEPS):
        work.host(inputs, labels)
        work.host_steps(optimizer)
        with work if step == COUNTED else contextlib.nullcontext():
            x, y = (each.to(inputs.device, non_blocking=True) for each in next(batches))
            out = model(x)
            loss = functional.cross_entropy(out.flatten(0, -2), y)
            optimizer.zero_grad()
            if by_hand:
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
                torch.autograd.grad(gradients, parameters, [g.detach() for g in gradients])
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.detach()
            else:
                probe.backward(loss)
            optimizer.step()
    next(batches, None)


def counted(
    make: Callable[[], Batch], make_optimizer: Callable[..., Any], names: Sequence[str] = LANES
) -> dict[str, DeviceWork]:
    """The work of one step of each lane."""
    work = DeviceWork()

    def train() -> None:
        trained(make, make_optimizer, work)

    found = {}
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), _as_on_a_device(lambda: work):
        run = Path(folder, "run")
        for name in ["record", *names]:
            if name in found:
                continue
            if name == "record":
                geomprobe.record(train, run, seed=0, checkpoint_every="never").close()
            elif name.startswith("replay"):
                every = int(name == "replay with Hg")
                geomprobe.replay(train, run, force=True, curvature_every=every, check_curvature_every=RARELY)
            else:
                lanes.seed_everything(0)
                with lanes.strict_mode(True):
                    trained(make, make_optimizer, work, by_hand=name == "by hand")
            found[name], work = work, DeviceWork()
    return found


@contextlib.contextmanager
def _as_on_a_device(work: Callable[[], DeviceWork]) -> Iterator[None]:
    """Let a pass on the host do what it does on a device, where it looks at the device."""
    fetched = StepInputs.fetched

    def fetched_on_host(inputs: StepInputs, batch: Any) -> None:
        with work().paused():
            fetched(inputs, batch)

    def entered(inputs: StepInputs, given: Any) -> None:
        inputs._add(leaves(given)[0])  # the loader's batch is on the host, and what the model is given is not

    read = NumbaKernel.read

    def read_on_device(kernel: NumbaKernel, addresses: Any) -> Any:
        with work().paused():
            found = read(kernel, addresses)
        work().device(*found)
        work().add("TritonKernel.read", launches=READ)
        return found

    with (
        mock.patch.multiple(StepInputs, fetched=fetched_on_host, entered=entered),
        mock.patch.object(NumbaKernel, "read", read_on_device),
        mock.patch.object(row_buffer, "INTERVAL", float("inf")),  # a slow step must not count as one that ends a block
    ):
        yield


def totals(work: DeviceWork) -> tuple[int, int]:
    """Launches and waits."""
    return work.launches.total(), work.waits.total()


def beyond(work: DeviceWork, plain: DeviceWork) -> tuple[int, int]:
    """Launches and waits that a lane has more than the plain one."""
    (launches, waits), (launches_before, waits_before) = totals(work), totals(plain)
    return launches - launches_before, waits - waits_before


def print_where(name: str, work: DeviceWork, most: int = 40) -> None:
    """The lines of geomprobe that ask for the most."""
    own = {place for counter in (work.launches, work.waits) for place in counter if place[0]}
    worst = sorted(own, key=lambda place: (-work.waits[place], -work.launches[place], place))
    print(f"\n{name}:")
    for line, operator in worst[:most]:
        print(
            f"  {line:44} {operator:28} launches {work.launches[line, operator]:5} waits {work.waits[line, operator]}"
        )
    for (line, operator), size in work.allocated.most_common(4):
        if line:
            print(f"  {line:44} {operator:28} allocates {size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all, if none is given")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--lanes", nargs="+", default=LANES, choices=LANES)
    parser.add_argument("--where", action="store_true", help="the lines of geomprobe that ask for the most")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models or MODELS:
        for optimizer in arguments.optimizers:
            row = [f"{model}, {optimizer}"]
            of = counted(MODELS[model], OPTIMIZERS[optimizer], ["plain", *arguments.lanes])
            for name in of if arguments.where else ():
                if name not in ("plain", "by hand"):
                    print_where(f"{row[0]}, {name}", of[name])
            row.append(str(totals(of["plain"])[0]))
            for name in LANES[1:]:
                if name not in of:
                    row.append("")
                elif name == "by hand":
                    row.append(str(totals(of[name])[0]))
                else:
                    launches, waits = beyond(of[name], of["plain"])
                    row.append(f"{launches:+}, {waits}")
            both = "replay with Hg" in of and "by hand" in of
            row.append(f"{totals(of['replay with Hg'])[0] / totals(of['by hand'])[0]:.2f}" if both else "")
            rows.append(row)
            print(f"{row[0]} is counted", file=sys.stderr)
    print(f"torch {torch.__version__}; beyond the plain step: launches, waits; target: +20, 0, and 1.1 of Hg by hand")
    print(table(["", "plain", "Hg by hand", *LANES[2:], "to by hand"], rows, right=range(1, 7)))


if __name__ == "__main__":
    main()
