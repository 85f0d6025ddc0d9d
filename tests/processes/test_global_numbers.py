"""Every measured number under DDP and FSDP2, against one process, float64 and dense Hessians."""

from __future__ import annotations

from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import torch
from support import ranks
from support.global_oracle import brute_force
from support.shared_training import Case, Path, both_passes
from torch.distributed.fsdp import FSDPModule

from geomprobe.measure.curvature.step_curvature import StepCurvature

CASES = [
    Case("ddp", model="norm"),
    Case("ddp", parts=3, sync_each=False, clip=True),
    Case("ddp", parts=3),
    Case("ddp", closure=True, parts=2),
    Case("ddp static", parts=2, per_rank=True, per_parameter=True),
    Case("ddp", parts=3, sync_each=False, clip=True, curvature=False, per_rank=True),
    Case("ddp views", dtype=torch.float32, every=2),
    Case("ddp unused", model="sometimes"),
    Case("ddp sum", clip=True),
    Case("ddp", scale=1024.0, parts=2, per_rank=True),
    Case("fsdp", parts=3, sync_each=False, clip=True),
    Case("fsdp", parts=3),
    Case("fsdp", closure=True, parts=2),
    Case("fsdp kept", dtype=torch.float32, every=2),
    Case("fsdp sum", optimizer="adam"),
    *([Case("fsdp unused", model="sometimes")] if hasattr(FSDPModule, "set_reduce_scatter_unused_params") else []),
    Case("fsdp", scale=1024.0, parts=2),
]
EVERYWHERE = [
    Case("ddp"),
    Case("ddp", optimizer="adam", per_parameter=True),
    Case("fsdp"),
    Case("fsdp", optimizer="adam", per_parameter=True),
]
PLAIN = [Case("ddp", curvature=False), Case("fsdp", curvature=False)]
MESHES = [
    Case("hsdp", parts=3, sync_each=False),
    Case("hsdp", optimizer="adam", per_parameter=True),
    Case("hsdp", curvature=False),
]
QUICK = {1: PLAIN, 2: EVERYWHERE + PLAIN + CASES, 3: EVERYWHERE, 4: MESHES}
SLOW = {1: EVERYWHERE, 3: CASES, 4: EVERYWHERE + [Case("ddp static", parts=2), Case("fsdp", closure=True)]}

Found = dict[tuple[int, Case], list[tuple[Path, Path]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Found:
    """What each rank saw of each case, without measuring and with it; of the slow cases only where they are run."""
    results: Found = {}
    slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    for world in sorted({*QUICK, *SLOW}):
        cases = QUICK.get(world, []) + (SLOW.get(world, []) if slow else [])
        of_ranks = ranks.run(world, both_passes, Folder(tmp_path_factory.mktemp("ranks")), cases)
        results |= {(world, case): [of[i] for of in of_ranks] for i, case in enumerate(cases)}
    return results


def named(case: Any) -> str:
    if not isinstance(case, Case):
        return str(case)
    said = [case.wrapper, case.model, case.optimizer, f"{case.parts} parts"]
    return "-".join(said + [n for n in ("closure", "clip", "per_parameter", "per_rank") if getattr(case, n)])


RUNS = pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, marks=marks)
        for worlds, marks in ((QUICK, ()), (SLOW, pytest.mark.slow))
        for world, cases in worlds.items()
        for case in cases
    ],
    ids=named,
)


@RUNS
def test_every_column_is_that_of_one_process_on_the_global_batch(found: Found, world: int, case: Case) -> None:
    expected = brute_force(case, world)
    path = found[world, case][0][1]
    rows = np.array(path.rows)
    tolerance = 1e-9 if case.dtype == torch.float64 else 2e-4
    assert len(rows) == len(expected["loss"])
    for name, values in zip(path.columns, rows.T, strict=True):
        name = name.replace("parameters/module.", "parameters/")
        every = len(values) if name == "steps/sharpness" else case.every
        measured = np.arange(len(values)) % every == 0
        assert np.isnan(values[~measured]).all(), name
        scale = np.abs(expected[name]).max()
        limit = 1e-3 if name == "steps/sharpness" else tolerance
        np.testing.assert_allclose(
            values[measured], expected[name][measured], rtol=limit, atol=limit * scale, err_msg=name
        )
    factor = world if case.wrapper.endswith("sum") else 1
    np.testing.assert_allclose(np.array(path.losses) * factor, expected["loss"], rtol=tolerance)
    assert path.missing is None


@RUNS
def test_every_rank_has_the_same_row(found: Found, world: int, case: Case) -> None:
    rows = [np.array(path.rows) for _, path in found[world, case]]
    for row in rows:
        np.testing.assert_array_equal(row, rows[0])


@RUNS
def test_measuring_leaves_the_trajectory_and_its_exchanges_as_they_are(found: Found, world: int, case: Case) -> None:
    for plain, path in found[world, case]:
        assert torch.equal(plain.final, path.final)
        assert plain.beside == path.beside


@pytest.mark.parametrize(
    ("world", "case", "count"),
    [(1, PLAIN[0], 0), (1, PLAIN[1], 0), (2, PLAIN[0], 1), (2, PLAIN[1], 9 + 1), (4, MESHES[2], 9 + 1)],
    ids=named,
)
def test_a_row_takes_one_all_reduce_of_its_sums_and_the_loss(found: Found, world: int, case: Case, count: int) -> None:
    for _, path in found[world, case]:
        assert path.sent[1:] == [[("all_reduce", 8 * count)] if count else []] * 4


def test_hg_takes_one_exchange_of_its_own_size_and_two_of_one_number(found: Found) -> None:
    weights = 4 * 5 + 4 + 3 * 4 + 3 + 1
    reasons = len(StepCurvature.ABSENT)  # for which Hg may be left out
    for case, sums in ((Case("ddp"), 1 + reasons), (Case("fsdp"), 9 + 2 + 1 + reasons)):
        for _, path in found[3, case]:
            expected = [3 * 8, 8, 8 * weights, 8 * sums]
            assert [[size for _, size in sent] for sent in path.sent[1:]] == [expected] * 4
