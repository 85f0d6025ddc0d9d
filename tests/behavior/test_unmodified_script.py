"""A training with nothing of geomprobe in it is recorded and replayed as it stands, on the command line too."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.cases import CASES, Case, Watch, classified, mlp
from support.command_server import Result, python
from support.oracle import History, float64, held, seeded
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import geomprobe
from behavior.test_two_pass import RELATIVE, assert_columns, run_both
from geomprobe.cli import launch
from geomprobe.errors import UsageError
from geomprobe.trace.absence import LATE

SEED = 11

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

UNMODIFIED = [
    case
    for case in CASES
    if str(case)
    in {
        "closure",
        "accumulation",
        "2 workers",
        "tied weights",
        "sparse gradients, SGD",
        "GradScaler, accumulation",
        "GradScaler, for-loop optimizer, overflows at the start and later",
        "GradScaler, fused Adam, overflows at the start and later",
        "GradScaler, fused SGD, unscaled and clipped",
    }
]


@pytest.mark.parametrize("case", UNMODIFIED, ids=str)
def test_a_loop_without_attach_gives_the_brute_forces_columns(case: Case, tmp_path: Path) -> None:
    both = run_both(case, tmp_path / "run", Watch)
    first = both.trace["absent"][0]
    assert first in (0.0, LATE.number)  # of the first update only what was seen before it is known
    both.wanted["steps/absent"][0] = first
    assert_columns(both.trace, both.wanted)
    assert both.trace.certificate["steps_equal"] == len(both.oracle.history.loss)
    assert both.recorded.final == both.replayed.final == both.oracle.final
    assert both.trace.manifest["model"]["parameters"] == both.oracle.history.parameters


# Epochs, told from the loaders


class Epochs:
    """A loop over loaders made in some way; keeps the epoch of each step."""

    def __init__(self) -> None:
        self.model = mlp()
        self.optimizer = SGD(self.model.parameters(), 0.1)
        self.data = classified()
        self.held_out = classified()
        self.steps: list[int] = []

    def step(self, epoch: int, batch: Any) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(batch[0]), batch[1]).backward()
        self.optimizer.step()
        self.steps.append(epoch)

    def evaluate(self, data: TensorDataset) -> None:
        import torch

        with torch.no_grad():
            for x, _ in DataLoader(data, 8):
                self.model(x)


def one_loader(loop: Epochs) -> None:
    loader = DataLoader(loop.data, 8, shuffle=True)
    for epoch in range(3):
        for batch in loader:
            loop.step(epoch, batch)


def a_loader_an_epoch(loop: Epochs) -> None:
    for epoch in range(3):
        for batch in DataLoader(loop.data, 8, shuffle=True):
            loop.step(epoch, batch)


def a_data_set_an_epoch(loop: Epochs) -> None:
    for epoch in range(3):
        for batch in DataLoader(classified(), 8):
            loop.step(epoch, batch)


def evaluation_before_within_and_after(loop: Epochs) -> None:
    loader = DataLoader(loop.data, 8, shuffle=True)
    loop.evaluate(loop.held_out)
    for epoch in range(3):
        for index, batch in enumerate(loader):
            loop.step(epoch, batch)
            if index == 1:
                loop.evaluate(loop.held_out)
        loop.evaluate(loop.held_out)


def evaluation_between_a_batch_and_its_step(loop: Epochs) -> None:
    for epoch in range(3):
        for batch in DataLoader(loop.data, 8):
            loop.evaluate(loop.held_out)
            loop.step(epoch, batch)


def evaluation_on_the_training_set(loop: Epochs) -> None:
    for epoch in range(3):
        for batch in DataLoader(loop.data, 8, shuffle=True):
            loop.step(epoch, batch)
        loop.evaluate(loop.data)


def persistent_workers(loop: Epochs) -> None:
    loader = DataLoader(loop.data, 8, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        for batch in loader:
            loop.step(epoch, batch)


def epochs_cut_short(loop: Epochs) -> None:
    loader = DataLoader(loop.data, 8, shuffle=True)
    for epoch in range(3):
        for _, batch in zip(range(2), loader, strict=False):
            loop.step(epoch, batch)


WAYS = [
    one_loader,
    a_loader_an_epoch,
    a_data_set_an_epoch,
    evaluation_before_within_and_after,
    evaluation_between_a_batch_and_its_step,
    evaluation_on_the_training_set,
    persistent_workers,
    epochs_cut_short,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_epochs_are_told_from_the_loader(way: Any, tmp_path: Path) -> None:
    loops: list[Epochs] = []

    def training() -> None:
        loops.append(Epochs())
        way(loops[-1])

    with geomprobe.record(training, tmp_path / "run", seed=SEED) as recorded:
        np.testing.assert_array_equal(recorded.steps["epoch"], loops[0].steps)


# On the command line

MODEL = """
from torch import nn


def make():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
"""

TRAIN = """
import argparse
import json

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from network import make

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--log", required=True)
options = parser.parse_args()

train_set, held_out = (TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,))) for _ in range(2))
model = make()
optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
log = []


@torch.no_grad()
def evaluate(data):
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(data, 8, shuffle=True))
    model.train()
    return right / len(data)


for epoch in range(3):
    for index, (x, y) in enumerate(DataLoader(train_set, 4, shuffle=True, num_workers=epoch == 1)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            log.append({"epoch": epoch, "loss": loss.item()})
        if index == 2:
            evaluate(held_out)
    evaluate(train_set)
    if log:
        scheduler.step()

with open(options.log, "w") as file:
    json.dump(log, file)
print(f"trained {len(log)} steps")
"""


def command(*arguments: str, cwd: Path) -> Result:
    done = python(*arguments, cwd=cwd)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "network.py").write_text(MODEL)
    (folder / "train.py").write_text(TRAIN)
    return folder


@pytest.fixture(scope="module")
def expected(project: Path) -> dict[str, np.ndarray]:
    """Columns of the script, run in this process and stored by torch's own hook on every optimizer."""
    history, optimizers = History(), []

    def store(optimizer: Optimizer, *_: Any) -> None:
        optimizers[:] = [optimizer]
        history.add(optimizer)

    hook = register_optimizer_step_pre_hook(store)
    argv, path = sys.argv, list(sys.path)
    try:
        sys.argv = ["train.py", "--lr", "0.2", "--log", str(project / "plain.json")]
        sys.path.insert(0, str(project))
        with seeded(SEED):
            runpy.run_path(str(project / "train.py"), run_name="__main__")
    finally:
        hook.remove()
        sys.argv, sys.path[:] = argv, path
        sys.modules.pop("network", None)
    log = json.loads((project / "plain.json").read_text())
    history.epoch, history.loss = ([row[key] for row in log] for key in ("epoch", "loss"))
    history.references["final"] = [float64(p) for p in held(optimizers[0])]
    return history.columns()


@pytest.fixture(scope="module")
def by_command(project: Path) -> Path:
    """The script, recorded and replayed from a shell; the run folder."""
    script = ("train.py", "--lr", "0.2", "--log", "log.json")
    recorded = command("-m", "geomprobe", "record", "-o", "runs/a", "--seed", str(SEED), *script, cwd=project)
    assert "Wrote runs/a/record.h5" in recorded.out
    replayed = command("-m", "geomprobe", "replay", "runs/a", cwd=project)
    assert "certified" in replayed.out
    assert recorded.out.count("trained") == replayed.out.count("trained") == 1
    return project / "runs" / "a"


def test_the_command_line_measures_an_unmodified_script(by_command: Path, expected: Any) -> None:
    assert len(set(expected["steps/epoch"])) == 3
    assert len(expected["steps/loss"]) < 18  # at least one step overflowed
    with h5py.File(by_command / "trace.h5", "r") as file:
        assert file["steps/absent"][0] == LATE.number
        for path, values in expected.items():
            known = slice(path == "steps/absent", None)
            np.testing.assert_allclose(file[path][known], values[known], rtol=RELATIVE, err_msg=path)
        assert file.attrs["status"] == "complete"
        assert file["certificate"].attrs["steps_equal"] == len(expected["steps/loss"])
        assert file["certificate"].attrs["final_weights_equal"]


def test_the_script_trains_under_both_passes_as_it_does_alone(by_command: Path, expected: Any) -> None:
    project = by_command.parents[1]
    assert json.loads((project / "log.json").read_text()) == json.loads((project / "plain.json").read_text())


def test_the_manifest_tells_what_was_run(by_command: Path) -> None:
    manifest = geomprobe.open_trace(by_command).manifest
    assert manifest["script"]["argv"] == ["--lr", "0.2", "--log", "log.json"]
    assert manifest["script"]["path"] == str(by_command.parents[1] / "train.py")
    assert manifest["seed"] == SEED
    assert set(manifest["sources"]) >= {"network.py"}
    assert manifest["model"]["class"] == "Sequential"


def test_a_module_is_known_by_its_file_without_importing_its_package(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("train", "__main__"):
        (package / f"{name}.py").write_text(f"# {name}")
    for module, file in (("package.train", "train.py"), ("package", "__main__.py")):
        found = launch.described(module, ["--lr"], module=True, cwd=tmp_path)
        assert found["sha256"] == hashlib.sha256((package / file).read_bytes()).hexdigest()
        assert (found["kind"], found["path"], found["argv"]) == ("module", module, ["--lr"])
    for missing in ("package.nothing", "nothing", "package.train.deeper"):
        with pytest.raises(UsageError, match=f"{missing}: there is no such module in"):
            launch.described(missing, [], module=True, cwd=tmp_path)


def test_a_script_with_attach_runs_by_itself_and_loads_no_hdf5(tmp_path: Path) -> None:
    attached = TRAIN.replace("log = []", "import geomprobe\nprobe = geomprobe.attach(model, optimizer)\nlog = []")
    attached += "\nimport sys\nprint(probe.active, 'h5py' in sys.modules)\n"
    (tmp_path / "network.py").write_text(MODEL)
    (tmp_path / "train.py").write_text(attached)
    command = [sys.executable, "train.py", "--lr", "0.2", "--log", "log.json"]  # fresh: its imports count
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"network.py", "train.py", "log.json", "__pycache__"}
