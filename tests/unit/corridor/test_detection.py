import subprocess
import sys

import numpy as np
import pytest

from geomprobe.corridor import occupancy, segments
from geomprobe.errors import UsageError

NAN = float("nan")


class FakeTrace:
    columns = ("step", "relative_residual")

    def __init__(self, steps, residuals):
        self.data = {"step": np.asarray(steps, float), "relative_residual": np.asarray(residuals, float)}

    def __getitem__(self, name):
        return self.data[name]


def stays(found):
    return list(zip(found.entries.tolist(), found.exits.tolist(), strict=True))


@pytest.mark.parametrize(
    ("residuals", "expected", "share"),
    [
        ([0.2, 0.01, 0.02, 0.2, 0.03], [(1, 3), (4, 5)], 0.6),
        ([0.01, 0.01], [(0, 2)], 1.0),
        ([0.2, 0.3], [], 0.0),
        ([0.1], [], 0.0),  # the threshold itself is outside
        ([0.0], [(0, 1)], 1.0),
        ([0.01, np.inf, 0.01], [(0, 1), (2, 3)], 2 / 3),
    ],
)
def test_stays_begin_below_the_threshold_and_end_at_the_first_step_that_is_not(residuals, expected, share):
    found = segments(residuals, 0.1)
    assert stays(found) == expected
    assert found.share == pytest.approx(share)
    assert found.lengths.tolist() == [last - first for first, last in expected]


def test_a_measurement_stands_until_the_next_one():
    residuals = [NAN, 0.01, NAN, NAN, 0.02, NAN, 0.5, NAN, 0.01, NAN]
    found = segments(residuals, 0.1)
    assert stays(found) == [(1, 6), (8, 10)]
    assert (found.share, found.measured) == (0.75, 4)


def test_smoothing_joins_stays_that_noise_cuts():
    residuals = np.full(30, 0.05)
    residuals[[5, 12, 20]] = 0.2
    assert len(segments(residuals, 0.11).entries) == 4
    assert stays(segments(residuals, 0.11, smooth=5)) == [(0, 30)]


def test_smoothing_averages_measured_rows_and_only_those_that_exist():
    residuals = [1.0, NAN, 2.0, 6.0, NAN, 3.0]
    curve = occupancy(residuals, [1.5, 1.6, 3.0, 3.1, 3.7, 4.5, 4.6], smooth=3)
    averages = [1.5, 3.0, 11 / 3, 4.5]
    assert curve.share.tolist() == [np.mean(np.array(averages) < t) for t in curve.thresholds]
    assert segments(residuals, 2.9, smooth=100).share == 0.0  # all rows around each: their mean is 3


def test_smoothing_over_more_rows_than_there_are_keeps_their_number():
    assert segments([0.1, 0.2, 0.3], 0.25, smooth=50).measured == 3


def test_a_trace_gives_its_own_step_numbers():
    found = segments(FakeTrace([100, 101, 102, 103], [0.5, 0.01, NAN, 0.01]), 0.1)
    assert stays(found) == [(101, 104)]


def test_the_curve_agrees_with_the_segments_at_every_threshold():
    residuals = np.random.default_rng(0).lognormal(-3, 2, 500)
    residuals[::7] = NAN
    curve = occupancy(residuals)
    assert curve.share.tolist() == [segments(residuals, t).share for t in curve.thresholds]
    assert (np.diff(curve.thresholds) > 0).all()
    assert (curve.share[0], curve.share[-1]) == (0.0, 1.0)


def test_an_exact_corridor_is_occupied_at_every_threshold():
    assert set(occupancy([0.0, 0.0]).share) == {1.0}


def test_thresholds_span_the_data_when_some_of_it_is_zero_or_infinite():
    curve = occupancy([0.0, 1e-3, 1.0, np.inf])
    assert (curve.thresholds[0], curve.share[0], curve.share[-1]) == (1e-3, 0.25, 0.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segments([NAN, NAN], 0.1), "measured at none of 2 steps.*--curvature-every"),
        (lambda: occupancy([]), "measured at none of 0 steps"),
        (lambda: segments([0.1], 0.0), "must be positive, but it is 0.0"),
        (lambda: segments([0.1], NAN), "must be positive, but it is nan"),
        (lambda: segments([[0.1]], 0.1), r"the array's shape is \(1, 1\)"),
        (lambda: segments([0.1], 0.1, smooth=0), "at least 1, but it is 0"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_detection_loads_without_torch_and_the_rest_by_name():
    program = (
        "import sys, geomprobe.corridor as c; c.segments([0.1], 0.5); c.occupancy([0.1]); "
        "assert 'torch' not in sys.modules; c.CLR; assert 'torch' in sys.modules; "
        "assert all(hasattr(c, name) for name in c.__all__); assert not hasattr(c, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
