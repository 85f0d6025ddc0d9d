"""What the benchmarks share: turns, ratios, and the count of calls in a step."""

from __future__ import annotations

import pytest
from support.paths import SCRIPTS


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")


def test_ways_take_turns_and_each_round_begins_with_another():
    from lanes import take_turns

    called = []
    ways = {name: lambda name=name: called.append(name) for name in "abc"}
    times = take_turns(ways, rounds=2, warm_up=1, before=lambda: called.append("-"))
    assert "".join(called) == "-a-b-c-b-c-a-c-a-b"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_way_that_is_dear_at_each_fourth_step_counts_by_both_kinds_of_steps():
    from lanes import ratio, typical

    seconds = [8.0, 1.0, 1.0, 1.0, 8.0, 1.0, 1.0, 1.0]
    assert typical(seconds, every=4) == (8 + 3 * 1) / 4
    assert ratio(seconds, [0.5] * 8, every=4) == 2 * (8 + 3 * 1) / 4
    assert typical([3.0, 1.0, 2.0]) == 2


def test_a_lane_reports_to_its_pass_and_ends_in_a_certified_trace(tmp_path):
    import torch
    from lanes import Lane, recording, replaying, seed_everything, strict_mode

    import geomprobe

    def train():
        seed_everything(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = geomprobe.attach(model, optimizer)
        for batch in probe.batches([torch.ones(4, 2)] * 3):
            optimizer.zero_grad()
            probe.backward(model(batch).square().mean())
            optimizer.step()
            yield

    with strict_mode(True):
        lanes = [Lane(train(), recording(tmp_path / "a")), Lane(train(), replaying(tmp_path / "b", train))]
        for _ in range(3):
            for lane in lanes:
                lane()
        for lane in lanes:
            lane.finish()
    assert geomprobe.open_trace(tmp_path / "b").certificate["steps_equal"] == 3


def test_calls_are_counted_in_each_pass_and_those_of_hg_only_where_it_is_taken(tmp_path):
    from calls import counted

    found = counted(tmp_path)
    entered = {name: set(calls.entered) for name, calls in found.items()}
    hg = "geomprobe.measure.curvature."
    assert any(name.startswith(hg) for name in entered["replayed with Hg"])
    assert all("geomprobe.probe.probe" in names for names in entered.values())
    for calls in found.values():
        assert len(calls.modules) >= calls.entered.total() >= len(calls.entered) > 0
    assert len(found["replayed with Hg"].modules) > len(found["replayed without Hg"].modules)
