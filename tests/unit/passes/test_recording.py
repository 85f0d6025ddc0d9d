"""The listeners of a recording, each alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geomprobe.errors import UnsupportedTraining
from geomprobe.passes.recording import FinalWeights, ReferenceKeeper


class Taken:
    """References that are only noted."""

    def __init__(self) -> None:
        self.weights: dict[str, list[float]] = {}

    def take(self, name: str, weights: dict[str, torch.Tensor], step: int) -> None:
        self.weights[f"{name} before {step}"] = weights["w"].tolist()

    def __contains__(self, name: str) -> bool:
        return any(taken.startswith(f"{name} ") for taken in self.weights)


def training() -> tuple[Any, torch.Tensor]:
    weight = torch.zeros(1)
    return SimpleNamespace(step=0, parameters={"w": weight}), weight


def step(probe: Any, final: FinalWeights) -> None:
    probe.parameters["w"].add_(1)
    probe.step += 1
    final.after_update()


def test_the_final_weights_are_those_of_the_last_step_whatever_is_loaded_afterwards():
    (probe, weight), taken = training(), Taken()
    final = FinalWeights(probe, taken)  # type: ignore[arg-type]
    step(probe, final)
    step(probe, final)
    final.weights_will_change()
    weight.zero_()
    final.weights_will_change()
    final.complete()
    assert taken.weights == {"final before 2": [2.0]}


def test_weights_that_something_else_has_moved_unseen_are_no_final_iterate():
    (probe, weight), taken = training(), Taken()
    final = FinalWeights(probe, taken)  # type: ignore[arg-type]
    step(probe, final)
    weight.zero_()
    with pytest.raises(UnsupportedTraining, match=r"changed the weights after the last step \(0\)"):
        final.complete()
    assert taken.weights == {}


def test_a_copy_that_was_kept_is_forgotten_when_training_goes_on():
    (probe, _), taken = training(), Taken()
    final = FinalWeights(probe, taken)  # type: ignore[arg-type]
    step(probe, final)
    final.weights_will_change()
    step(probe, final)
    final.complete()
    assert taken.weights == {"final before 2": [2.0]}


def test_without_a_step_there_are_no_final_weights():
    with pytest.raises(UnsupportedTraining, match="No optimizer stepped"):
        FinalWeights(training()[0], Taken()).complete()  # type: ignore[arg-type]


def test_references_are_taken_before_the_steps_that_were_asked_for_and_the_missed_ones_named():
    (probe, weight), taken = training(), Taken()
    session: Any = SimpleNamespace(manifest={})
    keeper = ReferenceKeeper(session, probe, {1, 5, 7}, taken, ())  # type: ignore[arg-type]
    for probe.step in range(3):
        keeper.before_update([], None)
        weight.add_(1)
    keeper.complete()
    assert taken.weights == {"step-1 before 1": [1.0]}
    assert session.manifest == {"missed_reference_steps": [5, 7]}
