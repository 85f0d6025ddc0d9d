"""A run of several optimizers that was cut off and goes on, or is replayed in pieces, gives the undisturbed files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.same_file import assert_same
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import geomprobe
from geomprobe.errors import EnvironmentMismatch, ReplayDiverged

RATIO = 3  # updates of the one optimizer for each of the other


class Cut(BaseException):
    """Ends a training as a kill does."""


class Count:
    """A script's own state, which it gives to attach."""

    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


class Training:
    """Two optimizers of one model; the second one's gradients pile up over the steps of the first.

    Attributes:
        cut: before so many batches more the next call ends.
        swapped: from this batch on, the second optimizer steps a batch early.
    """

    def __init__(self, accumulate: bool) -> None:
        self.accumulate = accumulate
        self.cut: int | None = None
        self.swapped: int | None = None

    def __call__(self) -> None:
        left, self.cut = self.cut, None
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        first = torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9)
        second = torch.optim.AdamW(model[3].parameters(), lr=0.02)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (first, second)]
        count = Count()
        probe = geomprobe.attach(model, [first, second], a=schedulers[0], b=schedulers[1], count=count)
        loader = DataLoader(TensorDataset(torch.randn(20, 3), torch.randn(20, 1)), 4, shuffle=True)
        for _ in probe.epochs(3):
            for x, y in probe.batches(loader):
                if left is not None and (left := left - 1) < 0:
                    raise Cut
                first.zero_grad()
                if not self.accumulate:
                    second.zero_grad()
                probe.backward(mse_loss(model(x), y))
                first.step()
                count.batches += 1
                early = self.swapped is not None and count.batches >= self.swapped
                if count.batches % RATIO == (RATIO - 1 if early else 0):
                    second.step()
                    second.zero_grad()
            for scheduler in schedulers:
                scheduler.step()


@pytest.mark.parametrize("accumulate", [True, False])
def test_runs_that_were_cut_off_or_split_become_the_undisturbed_ones(accumulate: bool, tmp_path: Path) -> None:
    training = Training(accumulate)
    options = {"checkpoint_every": "2steps", "seed": 3}
    geomprobe.record(training, tmp_path / "whole", **options).close()
    whole = geomprobe.replay(training, tmp_path / "whole")
    assert whole.status == "complete"
    assert whole["optimizer"].tolist() == [0.0, 0.0, 0.0, 1.0] * 5
    rates = np.where(whole["optimizer"] == 0, whole["groups/0/lr"], whole["groups/1/lr"])
    np.testing.assert_array_equal(whole["lr"], rates)
    assert np.isfinite(whole["loss"]).all()

    run = tmp_path / "run"
    for after in (4, 5):  # batches, of which the last ones come again
        training.cut = after
        with pytest.raises(Cut):
            geomprobe.record(training, run, resume=True, **options)
    geomprobe.record(training, run, resume=True).close()
    assert_same(run / "record.h5", tmp_path / "whole" / "record.h5")

    training.cut = 7
    with pytest.raises(Cut):
        geomprobe.replay(training, run)
    geomprobe.replay(training, run, resume=True)
    assert_same(run / "trace.h5", tmp_path / "whole" / "trace.h5")

    (run / "trace.h5").unlink()
    geomprobe.record(training, run, force=True, **options).close()  # a resumed recording has its checkpoints thinned
    for number in (2, 1):
        geomprobe.replay(training, run, segment=(number, 2))
    assert_same(run / "trace.h5", tmp_path / "whole" / "trace.h5")
    assert geomprobe.open_trace(run).status == "complete"


def test_a_replay_in_which_another_optimizer_steps_has_diverged(tmp_path: Path) -> None:
    training = Training(accumulate=False)
    geomprobe.record(training, tmp_path / "run", seed=3).close()
    training.swapped = 7
    with pytest.raises(ReplayDiverged, match="hyperparameters"):
        geomprobe.replay(training, tmp_path / "run")


def test_a_replay_with_other_optimizers_is_refused(tmp_path: Path) -> None:
    model = [2]

    def train() -> None:
        layer = nn.Linear(2, 1)
        optimizers = [torch.optim.SGD([p], lr=0.1) for p in layer.parameters()]
        if model[0] == 1:
            optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1)]
        geomprobe.attach(layer, optimizers)
        for _ in range(2):
            layer(torch.ones(1, 2)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0).close()
    model[0] = 1
    with pytest.raises(EnvironmentMismatch, match="SGD"):
        geomprobe.replay(train, tmp_path / "run")
