"""Several optimizers: the command's choice of one path, what is refused by name, and what wrappers are taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_server import run
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

import geomprobe
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.trace.record import open_record

GAN = """
import torch
from torch import nn

class Generator(nn.Linear):
    pass

class Critic(nn.Linear):
    pass

generator, critic = Generator(3, 2), Critic(2, 1)
optimizers = [torch.optim.SGD(each.parameters(), lr=rate) for each, rate in ((generator, 0.1), (critic, 0.02))]
for _ in range(3):
    optimizers[1].zero_grad()
    (critic(torch.randn(4, 2)) - critic(generator(torch.randn(4, 3)).detach())).mean().backward()
    optimizers[1].step()
    optimizers[0].zero_grad()
    (critic(generator(torch.randn(4, 3))) ** 2).mean().backward()
    optimizers[0].step()
"""


@pytest.mark.parametrize(("choice", "rate", "count"), [("Generator", 0.1, 8), ("1", 0.02, 3)])
def test_the_command_records_the_path_that_is_named_and_the_replay_takes_it(
    choice: str, rate: float, count: int, tmp_path: Path
) -> None:
    (tmp_path / "gan.py").write_text(GAN)
    recorded = run("record", "--seed", "0", "--optimizer", choice, "-o", "run", "gan.py", cwd=tmp_path)
    assert recorded.code == 0, recorded.err
    assert run("replay", "run", cwd=tmp_path).code == 0
    with open_record(tmp_path / "run") as record:
        assert record.manifest["recording"]["optimizer"] == choice
    trace = geomprobe.open_trace(tmp_path / "run")
    assert trace.num_parameters == count
    assert trace["lr"].tolist() == [rate] * 3
    assert "optimizer" not in trace
    assert np.isfinite(trace["loss"]).all()


def test_the_command_names_the_optimizers_where_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "gan.py").write_text(GAN)
    refused = run("record", "-o", "run", "gan.py", cwd=tmp_path)
    assert refused.code == 1
    for words in ("0: SGD with 2 tensors (8 values) of Generator", "1: SGD with 2 tensors (3 values) of Critic"):
        assert words in refused.err
    assert "--optimizer" in refused.err
    ambiguous = run("record", "--optimizer", "SGD", "-o", "again", "gan.py", cwd=tmp_path)
    assert ambiguous.code == 2
    assert "Choose one by its number" in ambiguous.err


class Wrapped(Optimizer):
    """An optimizer around an optimizer, as accelerate makes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def hybrid(steps: int = 2, wrap: Any = lambda optimizer: optimizer, twice: bool = False, clip: bool = False) -> Any:
    def train() -> None:
        model = nn.Linear(3, 1)
        first, second = torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias])
        geomprobe.attach(model, [wrap(first), wrap(first if twice else second)])
        for _ in range(steps):
            model.zero_grad()
            mse_loss(model(torch.randn(4, 3)), torch.ones(4, 1)).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            first.step()
            second.step()

    return train


def test_wrappers_in_the_list_are_unwrapped(tmp_path: Path) -> None:
    trace = geomprobe.two_pass(hybrid(wrap=Wrapped), tmp_path / "run", seed=0)
    assert trace["optimizer"].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_an_optimizer_that_is_in_the_list_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in the list twice"):
        geomprobe.two_pass(hybrid(twice=True), tmp_path / "run")


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTraining, match="nothing to measure"):
        geomprobe.record(lambda: geomprobe.attach(nn.Linear(1, 1), []), tmp_path / "run")


def test_the_gradient_before_clipping_is_of_one_optimizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is only measured where there is one"):
        geomprobe.two_pass(hybrid(clip=True), tmp_path / "run", before_clipping=True)


def test_clipping_of_all_gradients_keeps_loss_and_hg(tmp_path: Path) -> None:
    trace = geomprobe.two_pass(hybrid(clip=True), tmp_path / "run", seed=0)
    assert np.isfinite(trace["loss"]).all()
    assert np.isfinite(trace["hg_norm"]).tolist() == [True, False] * 2


def test_each_tensors_products_are_of_the_optimizer_that_moves(tmp_path: Path) -> None:
    trace = geomprobe.two_pass(hybrid(), tmp_path / "run", seed=0, per_parameter=True)
    assert (trace["parameters/weight/g.g"] > 0).tolist() == [True, False] * 2
    assert (trace["parameters/bias/g.g"] > 0).tolist() == [False, True] * 2


def test_a_second_attach_says_that_a_list_is_wanted(tmp_path: Path) -> None:
    def train() -> None:
        model = nn.Linear(3, 1)
        geomprobe.attach(model, torch.optim.SGD([model.weight], lr=0.1))
        geomprobe.attach(model, torch.optim.Adam([model.bias]))

    with pytest.raises(UsageError, match=r"attach\(model, \[first, second\]\)"):
        geomprobe.record(train, tmp_path / "run")
