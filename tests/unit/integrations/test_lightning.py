"""The callback finds the path of several optimizers. A stand-in for Lightning calls it as a Trainer does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import geomprobe
from geomprobe.errors import UnsupportedTraining, UsageError

HERE = "geomprobe.integrations.lightning"


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under test, over the few names that it takes from Lightning."""
    names = dict.fromkeys(("Callback", "LightningModule", "Trainer"), object)
    for name in ("lightning", "lightning.pytorch"):
        stand_in = ModuleType(name)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.delitem(sys.modules, HERE, raising=False)
    found = importlib.import_module(HERE)
    monkeypatch.delitem(sys.modules, HERE)
    return found


class Critic(nn.Linear):
    pass


class Gan(nn.Module):
    """A generator that two optimizers train, and a critic that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), Critic(2, 1)

    def configure(self) -> list[torch.optim.Optimizer]:
        weights = [p for p in self.generator.parameters() if p.dim() == 2]
        biases = [p for p in self.generator.parameters() if p.dim() == 1]
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.02)
        return [torch.optim.SGD(weights, lr=0.1), critic, torch.optim.Adam(biases)]


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [([0], [0, 2]), (["Adam"], [0, 2]), (["generator"], [0, 2]), ([1], [1]), (["Critic"], [1]), ([0, 1], [0, 1, 2])],
)
def test_a_choice_takes_all_optimizers_of_its_path(lightning: Any, chosen: Any, numbers: list[int]) -> None:
    gan = Gan()
    optimizers = gan.configure()
    model, path = lightning.chosen_path(gan, optimizers, chosen)
    assert path == [optimizers[number] for number in numbers]
    assert model is {2: gan.generator, 1: gan.critic, 3: gan}[len(path)]


def test_optimizers_of_one_submodule_are_one_path_without_a_choice(lightning: Any) -> None:
    module = nn.Module()
    module.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in module.net]
    assert lightning.chosen_path(module, optimizers) == (module, optimizers)


def test_one_optimizer_is_the_whole_modules(lightning: Any) -> None:
    module = Gan()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]
    assert lightning.chosen_path(module, optimizers) == (module, optimizers)


def test_different_paths_are_refused_until_one_is_chosen(lightning: Any) -> None:
    gan = Gan()
    with pytest.raises(UnsupportedTraining, match=r"gives 3 optimizers \(0: SGD .* of generator; 1: SGD .* of critic"):
        lightning.chosen_path(gan, gan.configure())
    with pytest.raises(UnsupportedTraining, match="gives 0 optimizers"):
        lightning.chosen_path(gan, [])
    with pytest.raises(UsageError, match=r"'SGD'.* is true of some that train different submodules"):
        lightning.chosen_path(gan, gan.configure(), ["SGD"])
    with pytest.raises(UsageError, match=r"'Lion'.* is true of none"):
        lightning.chosen_path(gan, gan.configure(), ["Lion"])


def training(callback: Callable[[Gan, list[torch.optim.Optimizer]], Any]) -> Callable[[], None]:
    """Manual optimization; ``callback`` gives the probe that has the loop."""

    def train() -> None:
        gan = Gan()
        optimizers = gan.configure()
        of_batch = callback(gan, optimizers)
        for index in range(3):
            x = torch.randn(4, 3)
            of_batch(index, x)
            for number, loss in ((1, -gan.critic(gan.generator(x).detach()).mean()), (0, None), (2, None)):
                if loss is None:
                    loss = gan.critic(gan.generator(x)).square().mean()
                gan.zero_grad()
                loss.backward()
                optimizers[number].step()

    return train


def test_it_measures_what_attach_on_the_path_does(lightning: Any, tmp_path: Path) -> None:
    def by_callback(gan: Gan, optimizers: list[torch.optim.Optimizer]) -> Any:
        callback = lightning.GeomprobeCallback("generator")
        plugin = SimpleNamespace(scaler=None)
        trainer: Any = SimpleNamespace(optimizers=optimizers, lr_scheduler_configs=[], precision_plugin=plugin)
        trainer.current_epoch = 0
        callback.on_train_start(trainer, gan)
        callback.on_train_epoch_start(trainer, gan)
        return lambda index, x: callback.on_train_batch_start(trainer, gan, x, index)

    def by_attach(gan: Gan, optimizers: list[torch.optim.Optimizer]) -> Any:
        geomprobe.attach(gan.generator, [optimizers[0], optimizers[2]])
        return lambda index, x: None

    found = geomprobe.two_pass(training(by_callback), tmp_path / "callback", seed=0)
    plain = geomprobe.two_pass(training(by_attach), tmp_path / "attach", seed=0)
    assert found["optimizer"].tolist() == [0.0, 1.0] * 3
    for column in (name for name in plain.columns if name not in ("epoch", "absent")):
        np.testing.assert_array_equal(found[column], plain[column], err_msg=column)
    assert np.isfinite(found["hg_norm"]).all()
