"""The losses of a step are those before scaling, and each event of a step is a move that the watchdog sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from geomprobe.distributed.progress import ProgressMarker
from geomprobe.probe.listeners import LossTracker, StepProgress
from geomprobe.probe.loops import Position


def test_a_scaled_loss_is_as_it_was_also_where_it_was_divided_since():
    losses = LossTracker()
    losses.loss_scaled(torch.tensor(8.0))
    losses.losses_seen([torch.tensor(8.0) / 2])
    losses.losses_seen([torch.tensor(3.0)])  # of another backward pass, which was not scaled
    assert [loss.item() for loss in losses.values] == [0.5, 3.0]


def test_a_loss_stays_what_it_was_when_the_script_writes_to_it():
    losses, loss = LossTracker(), torch.tensor(1.0)
    losses.losses_seen([loss])
    loss += 5
    assert losses.values[0].item() == 1.0


def test_losses_end_with_the_update_and_with_their_gradients():
    losses = LossTracker()
    for end in (losses.after_update, losses.gradients_dropped, losses.restored):
        losses.losses_seen([torch.tensor(1.0)])
        end()
        assert losses.values == []


def test_a_step_goes_through_its_stages_in_order():
    marker, probe = ProgressMarker(), SimpleNamespace(step=0)
    progress: Any = StepProgress(marker)
    progress.fetching()
    progress.attached(probe)
    seen = [marker.look(1.0)[:2]]
    for event, *arguments in (
        ("fetch_ended", True),
        ("fetched", 1),
        ("entered", ()),
        ("losses_seen", []),
        ("before_update", [], None),
        ("after_update",),
        ("between_steps", Position(0, 0)),
    ):
        probe.step += event == "after_update"
        getattr(progress, event)(*arguments)
        seen.append(marker.look(1.0)[:2])
    assert seen == [(0, 1), (0, 2), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0), (1, 0)]


def test_an_event_is_a_move_though_the_stage_is_the_same():
    marker = ProgressMarker()
    progress = StepProgress(marker)
    progress.fetching()
    assert [marker.look(1.0).still for _ in range(3)] == [0.0, 1.0, 2.0]
    progress.fetching()
    assert marker.look(1.0).still == 0.0
