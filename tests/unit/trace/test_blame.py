"""A cause comes before what it causes, with a loader and without one."""

import pytest

from geomprobe.trace.blame import Difference, first_difference

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
