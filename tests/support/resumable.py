"""A training that a command may record, kill and resume, and in which something may happen at a chosen step.

The environment tells what and when: ``AT=30 DO=SIGKILL``. Arguments of the script tell what sort of training it is.
"""

import shutil
import time

from support.command_server import run, start
from support.same_file import assert_same

STEPS, BATCHES = 120, 10

SCRIPT = """
import argparse, os, random, resource, signal, time
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
import geomprobe

parser = argparse.ArgumentParser()
parser.add_argument("--sort", default="named")
sort = parser.parse_args().sort
torch.set_num_threads(int(os.environ.get("THREADS", "1")))

def happens(step):
    do = os.environ.get("DO")
    if str(step) != os.environ.get("AT"):
        return
    if do.startswith("SIG"):
        for name in do.split():
            if name.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, name))
            else:
                time.sleep(float(name))
    if do == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if do == "fault":
        with torch.no_grad():
            model[0].bias[0] += 1e-3
    if do == "wait":
        Path("waiting").touch()
        while Path("waiting").exists():
            time.sleep(0.01)

class Drift:
    "State of the script's own, of which nobody is told."
    value = 0.0

    def __call__(self, batch):
        points, labels = zip(*batch)
        return torch.stack(points) * random.choice((-1, 1)) + torch.randn(8), torch.stack(labels)

points, labels = torch.randn(40, 8), torch.arange(40) % 4
model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
drift = Drift()
workers = {"num_workers": 1, "persistent_workers": True} if sort == "persistent" else {}
loader = DataLoader(TensorDataset(points, labels), 4, shuffle=True, collate_fn=drift, **workers)
probe = geomprobe.attach(model, optimizer, scheduler=scheduler)
epochs = int(os.environ.get("EPOCHS", "12"))
first = True
for epoch in range(epochs) if sort == "unnamed" else probe.epochs(epochs):
    for x, y in probe.batches(loader):
        if first:
            print("begins at step", getattr(probe, "step", 0), flush=True)
            first = False
        if sort == "secretive":
            drift.value += 0.01
        happens(getattr(probe, "step", 0))
        optimizer.zero_grad()
        probe.backward(functional.cross_entropy(model(x), y) * (1 + drift.value))
        optimizer.step()
    scheduler.step()
"""


class Bench:
    """A folder with the script in it, and a run of each sort that nobody disturbed."""

    def __init__(self, folder):
        self.folder = folder
        self.script = folder / "train.py"
        self.script.write_text(SCRIPT)
        self._wholes = {}

    def whole(self, sort="named"):
        """The undisturbed run of a sort of training."""
        if sort not in self._wholes:
            path = self.folder / f"whole-{sort}"
            assert run(*recording(path, sort), cwd=self.folder).code == 0
            assert run("replay", path, cwd=self.folder).code == 0
            self._wholes[sort] = path
        return self._wholes[sort]

    def recorded(self, path, sort="named"):
        """A copy of it, not replayed."""
        shutil.copytree(self.whole(sort), path)
        (path / "trace.h5").unlink()
        return path

    def record(self, path, *options, sort="named", **env):
        """Record, going on where there is something; the result of the command."""
        return run(*recording(path, sort, "--resume", *options), cwd=self.folder, env=env)

    def replay(self, path, *options, **env):
        return run("replay", *options, path, cwd=self.folder, env=env)

    def waiting(self, argv, step):
        """A command that waits before a step until `go_on` is called."""
        command = start(*argv, cwd=self.folder, env={"AT": str(step), "DO": "wait"})
        while not (self.folder / "waiting").exists():
            time.sleep(0.01)
        return command

    def go_on(self):
        (self.folder / "waiting").unlink()

    def assert_whole(self, path, name, sort="named"):
        """Hold a record or a trace to the undisturbed one, bit for bit."""
        assert_same(path / name, self.whole(sort) / name)
        left = sorted((path / "stream").glob("*"))
        assert [file.name for file in left if not file.name.startswith("lock")] == []  # it may be a dead one's


def recording(path, sort="named", *options):
    """The command that records a sort of training."""
    return "record", "--seed", "0", *options, "-o", path, "train.py", "--sort", sort


def said(result, code, *words):
    """The command exited with a code and said words on standard error, without a traceback of its own."""
    assert result.code == code, result
    for word in words:
        assert str(word) in result.err, result.err
    assert "geomprobe/" not in result.err
    return result
