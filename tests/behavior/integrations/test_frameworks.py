"""A training inside a framework is recorded, replayed and certified, and measures what its plain loop would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.framework_training import ACCUMULATE, EPOCHS, FRAMEWORKS, UPDATES, plain
from support.oracle import History, float64, held, seeded
from torch import Tensor
from torch.optim import Optimizer

from geomprobe import Trace, open_trace
from geomprobe.trace.schema import COMPONENTS

pytestmark = pytest.mark.integrations

SEED = 3
SCRIPT = Path(__file__).parents[2] / "support/framework_training.py"


def command(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stderr
    return done


def product(losses: list[Tensor], parameters: list[Tensor]) -> tuple[float, float]:
    """``||HG||`` and ``G.HG``, differentiating twice through the loss's own graph."""
    loss = torch.stack(losses).sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    vector = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    along = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))
    turned = torch.autograd.grad(along, parameters, materialize_grads=True)
    hg, g = (torch.cat([t.reshape(-1) for t in tensors]).double() for tensors in (turned, vector))
    return float(hg.norm()), float(g @ hg)


class Run:
    """A framework's training, recorded and replayed, and the columns that its plain loop gives."""

    def __init__(self, framework: str, folder: Path) -> None:
        self.folder = folder
        line = ("-m", "geomprobe", "record", "--seed", str(SEED), "-o", "run", str(SCRIPT), framework)
        self.recorded = command(*line, cwd=folder)
        self.replayed = command("-m", "geomprobe", "replay", "run", cwd=folder)
        history, curved = History(), []

        def watch(epoch: int, optimizer: Optimizer, losses: list[Tensor]) -> None:
            history.add(optimizer)
            history.epoch.append(epoch)
            history.loss.append(sum(loss.item() for loss in losses))
            curved.append(product(losses, list(held(optimizer))))

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with seeded(SEED):
            optimizer = plain(framework, json.loads((folder / "order.json").read_text()), watch)
        torch.set_num_threads(threads)
        history.references["final"] = [float64(p) for p in held(optimizer)]
        self.columns = history.columns()
        self.curved = dict(zip(("hg_norm", "g_hg"), np.array(curved).T, strict=True))

    @property
    def trace(self) -> Trace:
        return open_trace(self.folder / "run")


@pytest.fixture(scope="module", params=list(FRAMEWORKS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Run(request.param, tmp_path_factory.mktemp(request.param))


def test_the_replay_is_certified(run: Run) -> None:
    assert f"{UPDATES} of {UPDATES} steps equal, w_T bitwise equal: certified" in run.replayed.stdout
    assert run.trace.certificate["components"] == list(COMPONENTS)


def test_every_column_equals_the_plain_loops(run: Run) -> None:
    for path, values in run.columns.items():
        np.testing.assert_allclose(run.trace[path], values, rtol=1e-9, err_msg=path)
    size = np.abs(run.curved["hg_norm"])
    for name, values in run.curved.items():
        scale = size if name == "hg_norm" else size * run.trace["grad_norm"]
        assert np.abs(run.trace[name] - values).max() < 1e-5 * scale.min(), name


def test_epochs_losses_and_batches_are_seen(run: Run) -> None:
    np.testing.assert_array_equal(run.trace["epoch"], np.repeat(np.arange(EPOCHS), UPDATES // EPOCHS))
    assert np.isfinite(run.trace["loss"]).all()
    prints = batches(run.folder)
    assert len(np.unique(prints)) == UPDATES


def batches(folder: Path) -> np.ndarray:
    """What a record keeps of each step's batches, as one number."""
    import h5py

    with h5py.File(folder / "run" / "record.h5") as file:
        return np.bitwise_xor.reduce(file["fingerprints/batch"][:], axis=1)


def test_without_a_pass_the_callbacks_do_nothing(run: Run) -> None:
    framework = run.trace.manifest["script"]["argv"][0]
    alone = run.folder / "alone"
    alone.mkdir(exist_ok=True)
    command(str(SCRIPT), framework, cwd=alone)
    assert not (alone / "run").exists()
    assert len(json.loads((alone / "order.json").read_text())) == UPDATES * ACCUMULATE * 4


def test_a_module_with_two_paths_is_refused_by_name_until_one_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    done = command("-m", "geomprobe", "record", "-o", "run", "two.py", cwd=tmp_path, code=1)
    assert "Two.configure_optimizers gives 2 optimizers (0: SGD with 2 tensors (2 values) of a; 1: Adam" in done.stderr
    (tmp_path / "two.py").write_text(TWO.replace("GeomprobeCallback()", "GeomprobeCallback('a')"))
    command("-m", "geomprobe", "record", "-o", "run", "two.py", cwd=tmp_path)
    assert "w_T bitwise equal: certified" in command("-m", "geomprobe", "replay", "run", cwd=tmp_path).stdout
    assert open_trace(tmp_path / "run")["lr"].tolist() == [0.1, 0.1]


def test_optimizers_of_one_submodule_are_one_path(tmp_path: Path) -> None:
    layers = "torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)"
    one = TWO.replace(f"self.a, self.b = {layers}", f"self.net = torch.nn.Sequential({layers})")
    (tmp_path / "one.py").write_text(one.replace("self.a", "self.net[0]").replace("self.b", "self.net[1]"))
    command("-m", "geomprobe", "record", "-o", "run", "one.py", cwd=tmp_path)
    assert "w_T bitwise equal: certified" in command("-m", "geomprobe", "replay", "run", cwd=tmp_path).stdout
    assert open_trace(tmp_path / "run")["optimizer"].tolist() == [0.0, 1.0, 0.0, 1.0]


TWO = """
import lightning
import torch
from geomprobe.integrations.lightning import GeomprobeCallback

class Two(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    def training_step(self, batch, index):
        for part, optimizer in zip((self.a, self.b), self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(part(batch + 1).square().mean())
            optimizer.step()
    def configure_optimizers(self):
        return torch.optim.SGD(self.a.parameters(), 0.1), torch.optim.Adam(self.b.parameters())

trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, callbacks=[GeomprobeCallback()])
trainer.fit(Two(), torch.utils.data.DataLoader(torch.zeros(8, 1), 4))
"""


def test_an_accelerate_run_that_was_cut_off_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    stop = """            if batches.number == 10 and not Path("stopped").exists():
                Path("stopped").touch()
                raise SystemExit(1)
"""
    place = "        for batch in probe.batches(loader):\n"
    (tmp_path / "train.py").write_text(SCRIPT.read_text().replace(place, place + stop))
    record = ("-m", "geomprobe", "record", "--seed", "3", "--checkpoint-every", "1steps", "-o", "run")
    command(*record, "train.py", "accelerate", cwd=tmp_path, code=1)
    command(*record, "--resume", "train.py", "accelerate", cwd=tmp_path)
    replayed = command("-m", "geomprobe", "replay", "run", cwd=tmp_path)
    assert f"{UPDATES} of {UPDATES} steps equal, w_T bitwise equal: certified" in replayed.stdout


def snippets() -> list[str]:
    page = Path(__file__).parents[3] / "docs" / "recipes-frameworks.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", snippets(), ids=list(FRAMEWORKS))
def test_the_recipes_run_and_are_certified(tmp_path: Path, snippet: str) -> None:
    (tmp_path / "train.py").write_text(snippet)
    command("-m", "geomprobe", "record", "-o", "run", "train.py", cwd=tmp_path)
    assert "w_T bitwise equal: certified" in command("-m", "geomprobe", "replay", "run", cwd=tmp_path).stdout
