"""Learning rates from a trace: smoothed, filled and clipped as by hand, and taken by an optimizer step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_server import python
from torch import nn
from torch.optim import SGD

import geomprobe
from geomprobe import open_trace
from geomprobe.corridor.schedules import TraceLR, from_trace, rates
from geomprobe.errors import UsageError
from geomprobe.trace.schema import UnknownColumn
from geomprobe.trace.stream.writer import PartWriter, Table

NAN = np.nan


def trace(folder: Path, lolr: Any, epoch: Any = None) -> geomprobe.Trace:
    """A trace with chosen locally optimal rates ``g.d / g.g``."""
    columns = ("steps/epoch", "inner_products/g.g", "inner_products/g.d")
    epochs = np.full(len(lolr), NAN) if epoch is None else np.array(epoch, float)
    rows = np.stack([epochs, np.full(len(lolr), 4.0), 4.0 * np.array(lolr)], axis=1)
    path = folder / "part.h5"
    with PartWriter(
        path, schema="geomprobe-trace", tables=[Table("values", columns, "float64")], attributes={}
    ) as part:
        part.append({"values": rows})
    return open_trace(path)


def test_each_step_takes_its_epochs_mean_over_the_measured_ones(tmp_path: Path) -> None:
    found = rates(trace(tmp_path, [1, NAN, 3, 5, 7, NAN], [0, 0, 0, 1, 1, 1]), "lolr")
    np.testing.assert_array_equal(found, [2, 2, 2, 6, 6, 6])


def test_an_epoch_without_a_measured_step_lies_between_its_neighbors(tmp_path: Path) -> None:
    found = rates(trace(tmp_path, [1, 1, NAN, NAN, 4, 4], [0, 0, 1, 1, 2, 2]), "lolr")
    np.testing.assert_array_equal(found, [1, 1, 2, 3, 4, 4])


@pytest.mark.parametrize(
    ("smooth", "wanted"),
    [
        (None, [1, 9, 2, 3, 8, 4]),
        (1, [1, 9, 2, 3, 8, 4]),
        (3, [5, 2, 3, 3, 4, 6]),
        (4, [2, 2.5, 5.5, 3.5, 4, 6]),
        (99, [3.5] * 6),
    ],
)
def test_a_number_means_the_median_of_as_many_steps_around(tmp_path: Path, smooth: Any, wanted: Any) -> None:
    found = rates(trace(tmp_path, [1, 9, 2, 3, 8, 4]), "lolr", smooth=smooth)
    np.testing.assert_array_equal(found, wanted)


def test_what_was_not_measured_is_interpolated_and_the_ends_are_held(tmp_path: Path) -> None:
    found = rates(trace(tmp_path, [NAN, 2, NAN, NAN, 8, np.inf]), "lolr", smooth=None)
    np.testing.assert_array_equal(found, [2, 2, 4, 6, 8, 8])


def test_rates_that_are_not_positive_are_raised_to_the_least_that_is(tmp_path: Path) -> None:
    found = rates(trace(tmp_path, [-1, 0, 0.5, 2]), "lolr", smooth=None, scale=3)
    np.testing.assert_array_equal(found, [1.5, 1.5, 1.5, 6])


def taken(schedule: Any, steps: int, lrs: tuple[float, ...] = (0.3,)) -> tuple[Any, list[list[float]]]:
    """The scheduler, and the rates that the optimizer's groups had at each step."""
    weights = [nn.Parameter(torch.ones(1)) for _ in lrs]
    optimizer = SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)])
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return scheduler, found


def test_an_optimizer_takes_the_rates_step_by_step_and_then_holds_the_last(tmp_path: Path) -> None:
    schedule = from_trace(trace(tmp_path, [0.1, 0.2, 0.4]), "lolr", smooth=None)
    scheduler, found = taken(schedule, 5)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    np.testing.assert_allclose(np.ravel(found), [0.1, 0.2, 0.4, 0.4, 0.4])
    assert scheduler.get_last_lr() == [0.4]


def test_groups_keep_the_ratios_of_their_rates(tmp_path: Path) -> None:
    schedule = from_trace(trace(tmp_path, [0.1, 0.2]), "lolr", smooth=None)
    _, found = taken(schedule, 2, (0.5, 0.05))
    np.testing.assert_allclose(found, [[0.1, 0.01], [0.2, 0.02]])


def test_a_saved_scheduler_goes_on_where_it_was(tmp_path: Path) -> None:
    schedule = from_trace(trace(tmp_path, np.arange(1.0, 9.0)), "lolr", smooth=None)
    scheduler, _ = taken(schedule, 3)
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    other = TraceLR(optimizer, np.ones(2))
    other.load_state_dict(copy.deepcopy(state))
    optimizer.step()
    other.step()
    assert other.get_last_lr() == [5.0]


def test_a_run_with_such_a_schedule_is_recorded_cut_off_and_replayed(tmp_path: Path) -> None:
    source = trace(tmp_path, [0.1, 0.3, 0.2, 0.05], [0, 0, 1, 1])
    ends: list[int] = [3]

    def train() -> None:
        model = nn.Linear(3, 1)
        optimizer = SGD(model.parameters(), lr=1.0)
        scheduler = from_trace(source, "lolr", smooth=None)(optimizer)
        probe = geomprobe.attach(model, optimizer, scheduler=scheduler)
        for epoch in probe.epochs(4):
            if epoch == ends[0]:
                raise RuntimeError("cut off")
            optimizer.zero_grad()
            probe.backward(model(torch.randn(4, 3)).square().mean())
            optimizer.step()
            scheduler.step()

    with pytest.raises(RuntimeError, match="cut off"):
        geomprobe.record(train, tmp_path / "run", seed=0)
    ends[0] = 9
    geomprobe.record(train, tmp_path / "run", resume=True).close()
    found = geomprobe.replay(train, tmp_path / "run")
    assert found.certificate["steps_equal"] == 4
    np.testing.assert_allclose(found["lr"], [0.1, 0.3, 0.2, 0.05])


def test_a_run_folder_will_do_in_place_of_a_trace(tmp_path: Path) -> None:
    trace(tmp_path, [0.1, 0.2])
    _, found = taken(from_trace(tmp_path / "part.h5", smooth=None), 2)
    np.testing.assert_allclose(np.ravel(found), [0.1, 0.2])


@pytest.mark.parametrize(
    ("column", "options", "error", "words"),
    [
        ("lolrr", {}, UnknownColumn, "did you mean lolr"),
        ("cosine", {}, UsageError, "cosine is in units of 1, and a schedule is made of learning rates"),
        ("lolr", {}, UsageError, "has no epochs to smooth over: give a number of steps"),
        ("lolr", {"smooth": 0}, UsageError, "smooth=0: name 'epoch', a number of steps from 1 on, or None"),
        ("lolr", {"smooth": "median"}, UsageError, "smooth='median'"),
        ("lolr", {"smooth": True}, UsageError, "smooth=True"),
        ("lolr", {"smooth": None, "scale": -1}, UsageError, "scale=-1"),
        ("lolr", {"smooth": None}, UsageError, "holds no positive number"),
        ("clr", {"smooth": None}, UsageError, "holds no positive number"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_makes_no_schedule_is_refused(tmp_path: Path, column: str, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        from_trace(trace(tmp_path, [-1.0, -2.0]), column, **options)


def test_a_first_group_without_a_rate_is_refused(tmp_path: Path) -> None:
    schedule = from_trace(trace(tmp_path, [0.1]), "lolr", smooth=None)
    with pytest.raises(UsageError, match="groups keep the ratios"):
        taken(schedule, 1, (0.0,))


def test_the_package_loads_it_on_first_use_only() -> None:
    code = (
        "import sys, geomprobe; print('geomprobe.corridor.schedules' in sys.modules); "
        "print(geomprobe.schedules.from_trace.__name__)"
    )
    assert python("-c", code).out.split() == ["False", "from_trace"]
