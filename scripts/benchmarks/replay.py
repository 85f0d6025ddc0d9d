"""What a replay in pieces gains, and what the checkpoints that allow it cost.

    python scripts/benchmarks/replay.py                     the quickstart's training: about 15 minutes on 2 cores
    python scripts/benchmarks/replay.py --epochs 20 --rounds 1

One run with one thread is recorded, and replayed by one process and by K in turns. The time of a piece is then
modeled as start-up + loading a checkpoint + the steps of its epochs, each of them measured, and K pieces on as many
devices of their own as lasting as long as the longest. What checkpoints cost is the time of recorded epochs with one
at each, over that of epochs without, the two trainings taking turns epoch by epoch in one process.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import lanes
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

# isort: split
# lanes has put the examples on the path.
from digits import Digits, small_resnet

import geomprobe
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.report.table import number, table

TRAINING = lanes.SCRIPTS / "examples" / "digits.py"
DAY_S, PAPER_EPOCHS = 86_400.0, 180


def geomprobe_command(*argv: str) -> float:
    """Run a command with one thread; gives its seconds."""
    package = str(Path(geomprobe.__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "geomprobe", *argv], env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def recorded(run: Path, epochs: int) -> float:
    """Record the training; gives the seconds."""
    script = [str(TRAINING), "--epochs", str(epochs), "--workers", "0"]
    return geomprobe_command("record", "-o", str(run), "--seed", "0", "--keep-checkpoints", "all", *script)


@dataclass(frozen=True)
class Costs:
    """Seconds of what a replay in pieces is made of."""

    record_epoch: float
    replay_epoch: float
    start: float
    parent: float
    load: float
    checkpoint: float

    def piece(self, epochs: int, pieces: int) -> float:
        """The longest of several pieces of a replay."""
        return self.start + self.load + math.ceil(epochs / pieces) * self.replay_epoch


def measured(folder: Path, epochs: int, jobs: int, rounds: int) -> tuple[Costs, float, float]:
    """The costs, and the times of a serial and of a parallel replay: the minimum of each."""
    recordings = {n: recorded(folder / str(n), n) for n in (1, epochs)}
    options = {"one epoch": (1, 1), "serial": (epochs, 1), "parallel": (epochs, jobs)}
    times: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(rounds):
        for name, (n, count) in options.items():
            times[name].append(geomprobe_command("replay", "--force", "--jobs", str(count), str(folder / str(n))))
    shortest = {name: min(seconds) for name, seconds in times.items()}
    replay_epoch = (shortest["serial"] - shortest["one epoch"]) / (epochs - 1)
    record_epoch = (recordings[epochs] - recordings[1]) / (epochs - 1)
    start = shortest["one epoch"] - replay_epoch
    nothing_left = ["replay", "--segment", "1000/1000", str(folder / str(epochs))]  # as far as they go alike
    parent = min(geomprobe_command(*nothing_left) for _ in range(rounds))
    write, load = checkpoint_times(folder / str(epochs))
    costs = Costs(record_epoch, replay_epoch, start, parent, load, write)
    return costs, shortest["serial"], shortest["parallel"]


def checkpoint_times(run: Path) -> tuple[float, float]:
    """Seconds of writing a checkpoint of a run, and of verifying and reading it: medians."""
    steps = checkpoint.saved(run / "checkpoints")
    path = checkpoint.folder(run / "checkpoints", steps[-1])
    writing, reading = [], []
    for i in range(10):
        began = time.perf_counter()
        facts = checkpoint.verify(path)
        contents = checkpoint.read(path)
        read = time.perf_counter()
        checkpoint.write(run / "again", i, contents, facts)
        reading.append(read - began)
        writing.append(time.perf_counter() - read)
    return statistics.median(writing), statistics.median(reading)


def train(epochs: int) -> Iterator[None]:
    """The quickstart's training, an epoch at a time."""
    lanes.seed_everything(0)
    model = small_resnet(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(Digits(train=True), 64, shuffle=True, drop_last=True, num_workers=1)
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(epochs):
        for images, labels in probe.batches(loader):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            probe.backward(loss)
            optimizer.step()
        yield


def with_and_without(folder: Path, epochs: int) -> tuple[float, float, list[float]]:
    """Median seconds of an epoch with a checkpoint and without, and the ratios of neighbors."""
    trainings = {
        every: lanes.Lane(train(epochs + 1), lanes.recording(folder / every, every)) for every in ("epoch", "never")
    }
    times = lanes.take_turns(trainings, epochs, warm_up=1)
    for training in trainings.values():
        training.finish()
    ratios = [a / b for a, b in zip(times["epoch"], times["never"], strict=True)]
    return lanes.typical(times["epoch"]), lanes.typical(times["never"]), ratios


def predictions(costs: Costs, epochs: int) -> str:
    """What the model predicts for several devices: for this run, and for a day's training of the papers' length."""
    scale = DAY_S / PAPER_EPOCHS / costs.record_epoch
    day = replace(costs, record_epoch=DAY_S / PAPER_EPOCHS, replay_epoch=scale * costs.replay_epoch)
    rows = []
    for name, run, count in (("this run", costs, epochs), ("a day, 180 epochs", day, PAPER_EPOCHS)):
        training = count * run.record_epoch
        serial = run.start + count * run.replay_epoch
        for pieces in (1, 2, 8, 64):
            longest = serial if pieces == 1 else run.piece(count, pieces)
            both = training + count * run.checkpoint + longest
            cells = [f"{longest:.1f} s", number(serial / pieces / longest, 3), number(both / training, 4)]
            rows.append([name, str(pieces), str(math.ceil(count / pieces)), *cells])
    header = ["run", "devices", "epochs each", "replay", "efficiency", "record + replay, to record"]
    return table(header, rows, right=[1, 2, 3, 4, 5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200, help="of the run that is replayed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of which the shortest time counts")
    parser.add_argument("--checkpointed-epochs", type=int, default=60, help="with and without a checkpoint")
    arguments = parser.parse_args()
    epochs, jobs = arguments.epochs, arguments.jobs
    with tempfile.TemporaryDirectory() as folder, lanes.strict_mode(True):
        costs, serial, parallel = measured(Path(folder), epochs, jobs, arguments.rounds)
        with_one, without, ratios = with_and_without(Path(folder), arguments.checkpointed_epochs)
    print(f"{lanes.machine()}; {TRAINING.name}, {epochs} epochs, one thread\n")
    rows = [
        ["serial replay", f"{serial:.1f} s"],
        [f"replay --jobs {jobs}", f"{parallel:.1f} s"],
        ["the same, by the model", f"{costs.parent + costs.piece(epochs, jobs):.1f} s"],
        ["efficiency, T_serial / (K T_parallel)", number(serial / (jobs * parallel), 3)],
        ["start-up of a replay", f"{costs.start:.2f} s"],
        ["start-up of the process that starts the others", f"{costs.parent:.2f} s"],
        ["verifying and reading a checkpoint", f"{1e3 * costs.load:.1f} ms"],
        ["writing a checkpoint", f"{1e3 * costs.checkpoint:.1f} ms"],
        ["an epoch, replayed", f"{1e3 * costs.replay_epoch:.0f} ms"],
        ["an epoch, recorded", f"{1e3 * costs.record_epoch:.0f} ms"],
    ]
    print(table(["measured", ""], rows, right=[1]), end="\n\n")
    print(predictions(costs, epochs), end="\n\n")
    quarters = statistics.quantiles(ratios, n=4)
    rows = [
        ["an epoch with a checkpoint", f"{1e3 * with_one:.1f} ms"],
        ["an epoch without", f"{1e3 * without:.1f} ms"],
        ["ratio of the medians", number(with_one / without, 4)],
        ["ratio of neighbors, median (quartiles)", "{1:.3f} ({0:.3f} to {2:.3f})".format(*quarters)],
    ]
    print(table([f"recording, {torch.get_num_threads()} threads", ""], rows, right=[1]))


if __name__ == "__main__":
    main()
