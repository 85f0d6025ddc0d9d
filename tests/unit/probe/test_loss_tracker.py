"""The losses of a step are summed as they were before scaling, and belong to that step only."""

from __future__ import annotations

import math

import torch

from geomprobe.probe.loss_tracker import LossTracker

CPU = torch.device("cpu")


def test_a_step_without_a_loss_has_none():
    assert math.isnan(LossTracker().total(CPU))


def test_micro_batches_are_summed_in_float64():
    losses = LossTracker()
    losses.losses_seen([torch.tensor(1.0)])
    losses.losses_seen([torch.tensor(2**-30)])
    assert losses.total(CPU).item() == 1 + 2**-30


def test_a_loss_that_is_no_number_leaves_the_step_without_one():
    losses = LossTracker()
    losses.losses_seen([torch.ones(2)])
    assert math.isnan(losses.total(CPU))


def test_a_scaled_loss_counts_as_it_was_also_where_it_was_divided_since():
    losses = LossTracker()
    losses.loss_scaled(torch.tensor(8.0))
    losses.losses_seen([torch.tensor(8.0) / 2])
    losses.losses_seen([torch.tensor(3.0)])  # of another backward pass, which was not scaled
    assert losses.total(CPU).item() == 0.5 + 3


def test_losses_end_with_the_update_and_with_their_gradients():
    losses = LossTracker()
    for end in (losses.after_update, losses.gradients_dropped, losses.restored):
        losses.losses_seen([torch.tensor(1.0)])
        end()
        assert losses.values == []
