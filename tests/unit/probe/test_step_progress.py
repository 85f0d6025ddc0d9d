"""Each event of a step is a move of the process that the watchdog sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from geomprobe.distributed.progress import ProgressMarker
from geomprobe.probe.loops import Position
from geomprobe.probe.step_progress import StepProgress


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
