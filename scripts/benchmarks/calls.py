"""How much of geomprobe runs in one step: calls of its functions, modules entered, and changes of module.

    python scripts/benchmarks/calls.py
    python scripts/benchmarks/calls.py --by-module     and how often each module is entered

A small MLP is trained by SGD in one process, through `geomprobe.record` and `geomprobe.replay`. In the middle of each
pass the interpreter reports every call (`sys.setprofile`) from the end of one optimizer step to the end of the next.
Only functions of geomprobe count, generators each time that they continue. A module is entered, and the module changes,
where the function that is called lies in another module than the one called before it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import geomprobe
from geomprobe.report.table import table

PACKAGE = "geomprobe."
STEPS = 16
COUNTED = 8
"""The step whose calls are counted: far from the start, the end and an epoch's edge."""


class Calls:
    """The calls of geomprobe's functions while it is installed, by module, in their order."""

    def __init__(self) -> None:
        self.modules: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith(PACKAGE):
            self.modules.append(module)

    @property
    def entered(self) -> Counter[str]:
        """How often each module is entered from another."""
        before = ["", *self.modules]
        return Counter(module for last, module in zip(before, self.modules, strict=False) if module != last)


def train(calls: Calls) -> None:
    """Train the MLP, and count the calls of one step."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(8 * STEPS, 8), torch.randint(4, (8 * STEPS,)))
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(1):
        for step, (x, y) in enumerate(probe.batches(DataLoader(data, batch_size=8, shuffle=True))):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            probe.backward(loss)
            optimizer.step()
            sys.setprofile(calls if step == COUNTED - 1 else None)


def counted(folder: Path) -> dict[str, Calls]:
    """The calls of one step of each pass."""
    found = {name: Calls() for name in ("recorded", "replayed with Hg", "replayed without Hg")}

    def training(name: str) -> Callable[[], None]:
        return lambda: train(found[name])

    run = folder / "run"
    geomprobe.record(training("recorded"), run, seed=0).close()
    geomprobe.replay(training("replayed with Hg"), run)
    geomprobe.replay(training("replayed without Hg"), run, curvature_every=0, force=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-module", action="store_true", help="how often each module is entered, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = counted(Path(folder))
    rows = [
        [name, str(len(calls.modules)), str(len(calls.entered)), str(calls.entered.total())]
        for name, calls in found.items()
    ]
    print(table(["one step", "calls", "modules", "module changes"], rows, right=[1, 2, 3]))
    if arguments.by_module:
        names = sorted(set().union(*(calls.entered for calls in found.values())))
        rows = [[name, *(str(calls.entered[name]) for calls in found.values())] for name in names]
        print("\n" + table(["entered", *found], rows, right=[1, 2, 3]))


if __name__ == "__main__":
    main()
