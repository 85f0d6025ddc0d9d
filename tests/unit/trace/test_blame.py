"""A cause comes before what it causes, with a loader and without one."""

import re

import pytest

from geomprobe.trace.blame import (
    FINAL_WEIGHTS,
    STATE_STEPS,
    Difference,
    StateSteps,
    cause_before,
    first_difference,
    likely,
)

NAMES = {
    "rng": ("fetch/torch", "step/torch"),
    "batch": ("fetched", "inputs"),
    "weights": ("0.weight", "0.bias"),
    "loss": ("loss",),
}
SAME = {"rng": [5, 6], "batch": [1, 2], "weights": [3, 4], "loss": [7]}
NO_FETCH = {**SAME, "rng": [0, 6]}


@pytest.mark.parametrize(
    ("a", "changed", "expected"),
    [
        (SAME, {}, None),
        (SAME, {"rng": [0, 9], "batch": [8, 2]}, Difference("rng", "fetch/torch", ("batch",), 1)),
        (SAME, {"rng": [5, 9], "batch": [8, 2]}, Difference("batch", "fetched", ("rng",))),
        (SAME, {"rng": [5, 9], "weights": [8, 8]}, Difference("rng", "step/torch", ("weights",))),
        (
            NO_FETCH,
            {"rng": [0, 9], "batch": [1, 8], "loss": [9]},
            Difference("rng", "step/torch", ("batch", "loss")),
        ),
        (NO_FETCH, {"batch": [1, 8], "loss": [9]}, Difference("batch", "inputs", ("loss",))),
        (SAME, {"weights": [3, 8], "loss": [9]}, Difference("weights", "0.bias", ("loss",))),
        (SAME, {"weights": [8, 8]}, Difference("weights", "0.weight", (), 1)),
    ],
)
def test_the_first_cause_is_blamed(a, changed, expected):
    assert first_difference(NAMES, a, {**a, **changed}) == expected


def test_streams_of_a_record_that_knows_no_fetch_are_those_of_the_step():
    names = {"loss": ("loss",), "rng": ("torch", "python")}
    assert first_difference(names, {"loss": [1], "rng": [2, 3]}, {"loss": [2], "rng": [2, 4]}) == Difference(
        "rng", "python", ("loss",)
    )


def test_a_gradient_is_to_blame_where_nothing_that_it_is_made_of_differs():
    names = {**NAMES, "hyperparameters": ("lr",), "optimizer": ("0.weight",), "gradient": ("0.weight", "0.bias")}
    same = {**SAME, "hyperparameters": [1], "optimizer": [0], "gradient": [8, 9]}
    assert first_difference(names, same, {**same, "gradient": [8, 1]}) == Difference("gradient", "0.bias")
    both = {"gradient": [1, 9], "loss": [1]}
    assert first_difference(names, same, {**same, **both}) == Difference("loss", "loss", ("gradient",))
    rate = {"gradient": [1, 9], "hyperparameters": [2]}
    assert first_difference(names, same, {**same, **rate}) == Difference("hyperparameters", "lr", ("gradient",))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0), (3, 2), (4, 3), (5, 3), (7, 3), (10, 3), (11, 10), (20, 10), (21, 20)],
)
def test_the_last_step_with_a_state_is_known(step, expected):
    rule = StateSteps(first=4, every=10)
    assert rule.last_before(step) == expected
    assert rule.taken(expected)
    assert not any(map(rule.taken, range(expected + 1, step)))


@pytest.mark.parametrize(
    ("step", "also", "tensor", "words"),
    [
        (0, (), "0.weight", "the model began with other weights"),
        (20, (), "0.weight", "so something other than the optimizer wrote to the weights, or .* state is equal"),
        (11, (), "0.weight", "so the update has no deterministic form, .* to the weights; the state .* was equal"),
        (3, ("optimizer",), "0.weight", "something other than it wrote to the weights and the optimizer's state; "),
        (20, ("optimizer",), "0.weight", "something changed the optimizer's state after step 10, .* differs too"),
        (15, (), "0.weight", "other than the optimizer wrote .*, something changed .* state after step 10, .*, or the"),
        (15, (), FINAL_WEIGHTS, "so something other than the optimizer wrote to the weights, or .* state is equal"),
        (15, ("optimizer",), FINAL_WEIGHTS, "something changed the optimizer's state after step 10"),
    ],
)
def test_what_moved_the_weights_is_told_as_far_as_the_state_can_tell(step, also, tensor, words):
    said = likely(step, Difference("weights", tensor, also), StateSteps(first=4, every=10))
    assert re.search(words, said)
    assert step == 0 or f"the gradient, the learning rate and the other hyperparameters of step {step - 1} were" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", "learning rate"),
        ("tensor lr", "learning rate"),
        ("momentum", r"hyperparameters \(momentum\)"),
        ("moving optimizer", "another one of the optimizers stepped"),
    ],
)
def test_the_hyperparameter_is_named(name, words):
    assert re.search(words, likely(5, Difference("hyperparameters", name), STATE_STEPS))


def test_the_order_of_causes_holds_between_processes_too():
    assert sorted(["length", "gradient", "batch", "weights"], key=cause_before) == [
        *("batch", "weights", "gradient", "length")
    ]
