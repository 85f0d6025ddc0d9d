"""Optimizers make one path where they train the same model, and a choice names one of the paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from geomprobe.errors import UsageError
from geomprobe.probe.parameters import ModelDiscovery
from geomprobe.probe.paths import MOST, OptimizerPaths


class Generator(nn.Linear):
    pass


class Critic(nn.Linear):
    pass


class Script:
    """A generator and a critic, an optimizer for each, and another one for the generator's bias."""

    def __init__(self, chosen: str | None = None) -> None:
        self.generator, self.critic = Generator(2, 2), Critic(2, 1)
        self.sgd = torch.optim.SGD([self.generator.weight], lr=0.1)
        self.adam = torch.optim.Adam(self.critic.parameters())
        self.other = torch.optim.Adam([self.generator.bias])
        self.models = ModelDiscovery()
        self.models.add(self.generator)
        self.models.add(self.critic)
        self.paths = OptimizerPaths(self.models, chosen)
        for each in (self.sgd, self.adam, self.other):
            self.paths.add(each)


def test_optimizers_of_one_model_are_on_one_path() -> None:
    script = Script()
    assert script.paths.of(script.sgd) == [script.sgd, script.other]
    assert script.paths.of(script.other) == [script.other, script.sgd]
    assert script.paths.of(script.adam) == [script.adam]


def test_a_path_goes_over_all_models_that_one_of_its_optimizers_trains() -> None:
    script = Script()
    joint = torch.optim.SGD([*script.generator.parameters(), *script.critic.parameters()], lr=0.1)
    script.paths.add(joint)
    assert script.paths.of(script.adam) == [script.adam, script.sgd, script.other, joint]


def test_a_path_is_described_by_its_models_and_numbers() -> None:
    script = Script()
    assert script.paths.described([script.sgd, script.other]) == {"name": "Generator", "measured": [0, 2]}
    unknown = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    assert script.paths.described([unknown]) == {"name": "Adam", "measured": [-1]}


def test_each_optimizer_that_steps_is_noted_once() -> None:
    script = Script()
    for each in (script.other, script.adam, script.other):
        script.paths.stepping(each)
    assert script.paths.stepped == [2, 1]


def test_not_all_of_many_optimizers_are_noted() -> None:
    script = Script()
    for _ in range(100):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        script.paths.add(optimizer)
        script.paths.stepping(optimizer)
    assert len(script.paths.stepped) == MOST


def test_the_first_path_is_that_of_whichever_steps_first() -> None:
    script = Script("first")
    assert script.paths.is_chosen(script.adam)


def test_the_same_parameters_without_a_model_are_a_path() -> None:
    weight = nn.Parameter(torch.zeros(1))
    paths = OptimizerPaths(ModelDiscovery())
    first, second = torch.optim.SGD([weight], lr=0.1), torch.optim.Adam([weight])
    paths.add(first)
    paths.add(second)
    assert paths.of(second) == [second, first]


def test_a_wrapper_with_the_groups_of_another_is_not_one_more() -> None:
    class Around(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__([p for group in inner.param_groups for p in group["params"]], {})
            self.param_groups = inner.param_groups

    script = Script()
    script.paths.add(Around(script.adam))
    around = Around(script.sgd)
    script.paths.add(around)
    assert script.paths.of(script.adam) == [script.adam]
    assert script.paths.of(script.sgd) == [script.sgd, script.other]


def test_one_that_was_thrown_away_is_not_there_even_in_a_cycle() -> None:
    script = Script()
    script.other.itself = script.other  # type: ignore[attr-defined]
    del script.other
    assert script.paths.of(script.sgd) == [script.sgd]


@pytest.mark.parametrize("chosen", ["Generator", "SGD", "0", "2"])
def test_a_choice_is_a_class_of_a_model_or_an_optimizer_or_a_number(chosen: str) -> None:
    script = Script(chosen)
    assert script.paths.is_chosen(script.sgd)
    assert script.paths.is_chosen(script.other)
    assert not script.paths.is_chosen(script.adam)


def test_a_choice_of_nothing_is_true_of_none() -> None:
    script = Script("7")
    assert not script.paths.is_chosen(script.sgd)


def test_a_choice_of_two_paths_is_refused_and_names_them() -> None:
    script = Script("Adam")
    with pytest.raises(
        UsageError, match=r"train different models. There are 0: SGD .* of Generator; 1: Adam .* of Crit"
    ):
        script.paths.is_chosen(script.adam)


def test_a_compiled_model_has_its_own_name() -> None:
    script = Script("Generator")
    script.models._called.clear()
    script.models.add(torch.compile(script.generator))  # type: ignore[arg-type]
    assert script.paths.is_chosen(script.sgd)
