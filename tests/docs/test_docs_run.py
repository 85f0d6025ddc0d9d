"""What the documents show runs: marked blocks as they stand, fragments and command lines with what they suppose."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.command_server import shims
from support.documents import PAGES, ROOT, Block, blocks, commands, relative
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import geomprobe

FRAMEWORKS = ROOT / "docs" / "recipes-frameworks.md"  # run by tests/behavior/integrations, with the frameworks
DISTRIBUTED = ROOT / "docs" / "distributed.md"  # run by tests/processes/test_example.py

# Everything that the pages' command lines ask of a script, in 32 steps.
SCRIPT = """
import argparse
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import geomprobe

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.1)
x = torch.randn(32, 3)
data = TensorDataset(x, (x > 0).sum(1))
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=parser.parse_args().lr)
criterion = nn.CrossEntropyLoss()
probe = geomprobe.attach(model, optimizer)
probe.held_out(lambda batch: criterion(model(batch[0]), batch[1]), DataLoader(data, 8))
probe.full_gradient_of(lambda batch: criterion(model(batch[0]), batch[1]), DataLoader(data, 8))
for epoch in probe.epochs(8):
    for batch in probe.batches(DataLoader(data, 8, shuffle=True)):
        def loss_of_batch():
            return criterion(model(batch[0]), batch[1])
        optimizer.zero_grad()
        probe.backward(loss_of_batch(), closure=loss_of_batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
"""

# Two models, an optimizer for each, and no attach.
GAN = """
import torch
from torch import nn

class Generator(nn.Linear):
    pass

class Critic(nn.Linear):
    pass

generator, critic = Generator(3, 2), Critic(2, 1)
of_generator, of_critic = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (generator, critic))
for _ in range(8):
    of_critic.zero_grad()
    (critic(torch.randn(4, 2)) - critic(generator(torch.randn(4, 3)).detach())).square().mean().backward()
    of_critic.step()
    of_generator.zero_grad()
    critic(generator(torch.randn(4, 3))).square().mean().backward()
    of_generator.step()
"""


def run(command: list[str], folder: Path, codes: tuple[int, ...] = (0,)) -> str:
    """What the command prints, in a terminal where `python` and `geomprobe` are those of the tests."""
    with shims() as programs:
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in codes, f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def marked(page: Path) -> list[Block]:
    found = blocks(page.read_text())
    return [block for block in found if block.info.endswith((" run", ".py"))]


@pytest.mark.parametrize("page", [page for page in PAGES if marked(page)], ids=relative)
def test_marked_blocks_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = ""
    for info, text in marked(page):
        if info == "sh run":
            printed += run(["sh", "-euc", text], tmp_path)
        elif info == "python run":
            (tmp_path / "block.py").write_text(text)
            runpy.run_path("block.py")
        else:
            (tmp_path / info.split()[1]).write_text(text)
    for info, text in blocks(page.read_text()):  # what the page says that they print
        lines = [] if info else [line for line in text.splitlines() if "steps equal" in line]
        assert [line for line in lines if line.strip() not in printed] == []


def fragments() -> list:
    pages = [page for page in PAGES if page != FRAMEWORKS]
    return [
        pytest.param(block.text, id=f"{relative(page)}-{i}")
        for page in pages
        for i, block in enumerate(blocks(page.read_text()))
        if block.info == "python"
    ]


def trained():
    x = torch.randn(32, 3)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = geomprobe.attach(model, optimizer)
    for _ in probe.epochs(4):
        for batch in probe.batches(DataLoader(x, 4, shuffle=True)):
            optimizer.zero_grad()
            probe.backward((model(batch) - batch.prod(1, keepdim=True)).square().mean())
            optimizer.step()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fragments")
    geomprobe.record(trained, folder / "runs" / "a", seed=0, sketch=8).close()
    geomprobe.replay(trained, folder / "runs" / "a")
    shutil.copytree(folder / "runs" / "a", folder / "runs" / "source")
    return folder


@pytest.fixture
def supposed(runs, monkeypatch):
    """The names that fragments take for granted, and the runs that they open."""
    monkeypatch.chdir(runs)
    x, y = torch.randn(8, 3), torch.randint(4, (8,))
    model, criterion = nn.Linear(3, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(x, y)
    trace = geomprobe.open_trace("runs/a")
    return {
        "torch": torch, "geomprobe": geomprobe, "DataLoader": DataLoader, "x": x, "y": y, "epochs": 2,
        "model": model, "optimizer": optimizer, "criterion": criterion, "loader": DataLoader(data, 4),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer), "scaler": torch.amp.GradScaler("cpu"),
        "sampler": torch.utils.data.DistributedSampler(data, 1, 0), "probe": geomprobe.attach(model, optimizer),
        "validation_set": data, "train_set": data, "loss": criterion(model(x), y), "trace": trace, "lam": 0.1,
        "products": {name: trace[f"inner_products/{name}"] for name in ("g.d", "w.d", "g.g", "w.g", "w.w")},
    }  # fmt: skip


@pytest.mark.parametrize("fragment", fragments())
def test_fragments_run_where_what_they_suppose_is_there(fragment, supposed):
    if "model(words, following)" in fragment:  # a model that gives its loss
        model = supposed["model"]
        supposed["model"] = lambda x, y: supposed["criterion"](model(x), y)
    exec(compile(fragment, "fragment", "exec"), supposed)


def command_lines() -> list[str]:
    lines = {
        " ".join(command)
        for page in PAGES
        if page != DISTRIBUTED
        for command in commands(page.read_text())
        if command[0] == "geomprobe"
    }
    return sorted(lines)


# Numbers of steps for a run of a week, in one of 32 steps; and what a page leaves out.
SHRUNK = {"39000,78000": "9,18", "100,200": "9,18", "...": "-o runs/a train.py", "500steps": "5steps"}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Two runs of the script, recorded and replayed, and further weights in files."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "gan.py").write_text(GAN)
    (folder / "project").mkdir()
    (folder / "project" / "train.py").write_text(SCRIPT)
    for name in ("a", "b"):
        run(["geomprobe", "record", "-o", f"runs/{name}", "--sketch", "16", "train.py"], folder)
        run(
            ["geomprobe", "replay", f"runs/{name}", "--held-out-every", "4", "--full-gradient-every", "1"],
            folder,
        )
    weights = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).state_dict()
    torch.save(weights, folder / "best.pt")
    pytest.importorskip("safetensors.torch").save_file(weights, folder / "swa.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", command_lines())
def test_command_lines_do_what_they_say(line, prepared, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    words = [part for word in line.split() for part in SHRUNK.get(word, word).split()]
    if words[1] == "record":
        shutil.rmtree(folder / "runs")
    if words[1] == "replay":
        (folder / "runs" / "a" / "trace.h5").unlink()
    run(words, folder, codes=(3,) if words[1] == "diff" else (0,))  # the runs differ


@pytest.mark.slow
def test_the_quickstart_ends_in_a_certified_trace_and_a_figure(tmp_path):
    folder = tmp_path / "digits"
    done = subprocess.run(["sh", "scripts/quickstart.sh", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trace = geomprobe.open_trace(folder)
    page = (ROOT / "docs" / "start-here.md").read_text()
    assert f"{trace.num_steps} of {trace.num_steps} steps equal, w_T bitwise equal: certified" in page
    assert (trace["cosine"] > 0).all()
    assert (folder / "gamma.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_without_what_a_network_gives(tmp_path):
    command = ["sh", "scripts/docs.sh", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {
        page.relative_to(tmp_path / "site").with_suffix(".md").as_posix()
        for page in (tmp_path / "site").rglob("*.html")
    }
    assert {relative(page) for page in PAGES} <= pages
    start = (tmp_path / "site" / "docs" / "start-here.html").read_text()
    assert not any(kind in start for kind in ('src="http', 'rel="stylesheet" href="http'))
