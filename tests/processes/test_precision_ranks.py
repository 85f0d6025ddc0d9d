"""Every precision over several processes: certified, measured as in one process, and the same bits with and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import launches
from support.precise_training import TRIES, Case, Found, brute_force, every_case
from support.same_file import assert_same

from geomprobe import Trace, open_trace
from geomprobe.trace.record import open_record

MIXED = Case("", autocast=True, scaled=True, overflow_at=(0, 4), clip="norm", measured={"before_clipping": True})
ACCUMULATED = Case("", "SGD, for-loop", scaled=True, overflow_at=(2, 7), parts=2)
LOW = Case("", "float32 state", dtype=torch.bfloat16)
COMPILED = Case("", "Adam, for-loop", compiled="model and step")
DOUBLE = Case("", "SGD, fused", torch.float64, scaled=True, overflow_at=(2,), parts=2, sync_each=True, clip="value")

QUICK = [
    replace(MIXED, kind="DDP", segmented=True),
    replace(ACCUMULATED, kind="FSDP2"),
    replace(COMPILED, kind="DDP"),
]
SLOW = [
    replace(MIXED, kind="FSDP2"),
    replace(ACCUMULATED, kind="FSDP2", segmented=True),
    replace(LOW, kind="DDP"),
    replace(LOW, kind="FSDP2"),
    replace(ACCUMULATED, kind="DDP"),
    replace(COMPILED, kind="FSDP2"),
    replace(COMPILED, kind="DDP", closure=True),
    replace(COMPILED, kind="FSDP2", closure=True),
    replace(DOUBLE, kind="DDP", measured={"before_clipping": True}),
    replace(DOUBLE, kind="FSDP2", optimizer="Adam, fused"),  # torch has no fused SGD of DTensors
    Case("FSDP2", policy=True),
    Case("FSDP2", "SGD, for-loop", policy=True, parts=2, clip="norm", measured={"before_clipping": True}),
    replace(COMPILED, kind="DDP", backend="inductor"),
    replace(COMPILED, kind="FSDP2", backend="inductor"),
]
OF_CLIPPED = [f"unclipped/inner_products/{product}" for product in ("g.g", "w.g", "g.d")]

Seen = tuple[list[Found], Trace]


class Runs:
    """What each of two processes saw of a case, and its trace. Cases of one sort go through one launch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Case, Seen] = {}

    def __getitem__(self, case: Case) -> Seen:
        if case not in self._seen:
            cases = QUICK if case in QUICK else SLOW
            folder = self._folder / ("quick" if cases is QUICK else "slow")
            assert not folder.exists(), "the launch failed: see the first test of it"
            folder.mkdir()
            said = launches.start(2, every_case, folder, cases, folder)
            assert [code for code, _ in said] == [0, 0], said
            for index, each in enumerate(cases):
                found = [of_all[index] for _, of_all in said]
                self._seen[each] = found, open_trace(folder / str(index))
        return self._seen[case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "LIMIT_S", 240.0)
        yield Runs(Path(tmp_path_factory.mktemp("precision")))


EACH = pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
SEGMENTED = [
    *(case for case in QUICK if case.segmented),
    *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW if case.segmented),
]


@EACH
def test_a_replay_in_any_precision_is_certified(runs: Runs, case: Case) -> None:
    trace = runs[case][1]
    assert trace.status == "complete"
    assert trace.certificate["steps_equal"] == trace.num_steps == TRIES - len(case.overflow_at)
    assert trace.certificate["final_weights_equal"]


@EACH
def test_without_geomprobe_and_in_both_passes_the_weights_end_bitwise_the_same(runs: Runs, case: Case) -> None:
    finals = {final for found in runs[case][0] for final in found.finals}
    assert len(finals) == 1


@EACH
def test_attempted_and_applied_steps_are_counted_apart_and_alike_on_every_rank(runs: Runs, case: Case) -> None:
    found, trace = runs[case]
    skipped = len(case.overflow_at)
    for of_rank in found:
        assert of_rank.skipped == [skipped] * 3
        updates = of_rank.manifest["updates"]
        assert (updates["attempted"], updates["applied"]) == (TRIES, TRIES - skipped)
        assert updates["clipped_by"] == ([f"clip_grad_{case.clip}_"] if case.clip else [])
    assert trace.certificate["steps_attempted"] == TRIES
    with open_record(trace.path) as record:
        assert record.manifest["updates"] == trace.manifest["updates"] == found[0].manifest["updates"]


@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_a_replay_in_segments_counts_the_attempts_of_a_whole_one(runs: Runs, case: Case) -> None:
    trace = runs[case][1]
    assert_same(trace.path / "trace.h5", trace.path.with_suffix(".h5"))


@EACH
def test_every_column_is_that_of_one_process_on_the_global_batch(runs: Runs, case: Case) -> None:
    trace, expected = runs[case][1], brute_force(case)
    if not case.scaled:
        assert "attempt" not in trace
    for path, values in expected.items():
        if path not in trace:
            continue
        scale = np.abs(values).max()
        np.testing.assert_allclose(
            trace[path], values, rtol=tolerance(case), atol=tolerance(case) * scale, err_msg=path
        )
    assert set(expected) - {"steps/attempt"} - set(OF_CLIPPED) <= {path for path in expected if path in trace}
    assert all((path in trace) == bool(case.measured) for path in OF_CLIPPED)
    assert np.isfinite(trace["hg_norm"]).all() == case.has_hg


def tolerance(case: Case) -> float:
    if case.dtype == torch.float64:
        return 1e-9
    return 3e-2 if case.dtype == torch.bfloat16 or case.autocast or case.policy else 1e-4


@pytest.mark.parametrize(
    "case",
    [QUICK[-1], *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW if not case.has_hg)],
    ids=str,
)
def test_where_a_compiled_model_has_no_hg_the_reason_is_told_and_all_else_measured(runs: Runs, case: Case) -> None:
    trace = runs[case][1]
    assert "comes from torch.compile" in trace.manifest["measure"]["curvature"]["missing"]
    assert np.isfinite(trace["cosine"]).all()
