"""The rates of a row are those that the update used."""

from __future__ import annotations

import math

import torch

from geomprobe.corridor.clr import CLR
from geomprobe.measure.group_values import GroupValues


def sgd(**options: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5, **options)


def test_a_rate_that_changes_within_the_step_is_not_known() -> None:
    optimizer = sgd(momentum=0.9)
    groups = GroupValues([optimizer])
    groups.before_update()
    optimizer.param_groups[0]["lr"] = 0.25
    groups.after_update()
    assert math.isnan(groups.rate)
    assert groups.unknown_rates == 1.0
    assert groups.values()["groups"][2] == 0.9


def test_a_rate_that_changes_after_the_step_is_the_next_one() -> None:
    optimizer = sgd()
    groups = GroupValues([optimizer])
    groups.before_update()
    groups.after_update()
    optimizer.param_groups[0]["lr"] = 0.25
    assert groups.rate == 0.5
    assert groups.unknown_rates == 0.0


def test_groups_that_were_loaded_are_the_ones_that_count() -> None:
    optimizer = sgd()
    groups = GroupValues([optimizer])
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.125
    optimizer.load_state_dict(state)
    groups.before_update()
    groups.after_update()
    assert groups.rate == 0.125


def test_an_optimizer_that_finds_its_rate_has_it_after_the_step() -> None:
    weight = torch.tensor([2.0], requires_grad=True)
    optimizer = CLR([weight])
    groups = GroupValues([optimizer])
    groups.before_update()
    weight.grad = torch.tensor([4.0])
    optimizer.step(lambda: torch.tensor(8.0))
    groups.after_update()
    assert float(groups.rate) == 0.5


def test_of_several_optimizers_the_rate_is_that_of_the_one_that_moves() -> None:
    first, second = sgd(), sgd(momentum=0.5)
    second.param_groups[0]["lr"] = 0.25
    groups = GroupValues([first, second])
    groups.before_update()
    first.param_groups[0]["lr"] = 0.125  # by a scheduler of the other one: it is the present one
    groups.after_update(moving=1)
    assert groups.rate == 0.25
    assert groups.unknown_rates == 0.0
    (host, _), values = groups.columns, groups.values()["groups"]
    found = dict(zip(host.columns, values, strict=True))
    assert found["groups/0/lr"] == 0.125
    assert found["groups/1/lr"] == found["groups/moving/lr"] == 0.25
    assert found["groups/1/momentum"] == 0.5


def test_one_optimizer_has_no_column_of_the_one_that_moves() -> None:
    (host, device) = GroupValues([sgd()]).columns
    assert not any("moving" in name for name in (*host.columns, *device.columns))
