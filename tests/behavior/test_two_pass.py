"""Recording and replaying any training gives an independent brute force's numbers, and disturbs no bit of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.cases import BATCH, CASES, PLAIN, SAMPLES, Case, Watch, train
from support.oracle import Oracle, brute_force, columns_of

import geomprobe
from geomprobe import Trace

SEED = 7

# Both sides sum exact products in float64, so they differ by float64's rounding of a few hundred terms only,
# whatever the parameters' dtype; the promise is 1e-6.
RELATIVE = 1e-9

OF_THE_HESSIAN = {"hg_norm", "g_hg", "corridor_residual", "relative_residual", "flow_drift", "g.Hg", "Hg.Hg"}

# From Python 3.12 on, forking a loader's workers warns of torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Probed(Watch):
    """A training with geomprobe's probe in it."""

    def attach(self, model: Any, optimizer: Any, **stateful: Any) -> Any:
        return geomprobe.attach(model, optimizer, **stateful)


@dataclass
class Both:
    """A case trained three times: without geomprobe, recorded, and replayed."""

    case: Case
    oracle: Oracle
    recorded: Watch
    replayed: Watch
    trace: Trace
    path: Path
    wanted: dict[str, np.ndarray]


def watched(case: Case, watch: Watch) -> Callable[[], None]:
    return lambda: train(case, watch)


def run_both(case: Case, path: Path, watch: type[Watch] = Probed) -> Both:
    oracle, recorded, replayed = brute_force(case, SEED), watch(), watch()
    geomprobe.record(watched(case, recorded), path, seed=SEED, reference_steps=case.reference_steps).close()
    trace = geomprobe.replay(watched(case, replayed), path, **case.replay)
    return Both(case, oracle, recorded, replayed, trace, path, columns_of(case, oracle.history))


@pytest.fixture(scope="module", params=CASES, ids=str)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return run_both(request.param, tmp_path_factory.mktemp("case") / "run")


def assert_columns(trace: Trace, wanted: dict[str, np.ndarray]) -> None:
    for path, values in wanted.items():
        np.testing.assert_allclose(trace[path], values, rtol=RELATIVE, err_msg=path)


def test_every_column_equals_the_brute_force(both: Both) -> None:
    assert_columns(both.trace, both.wanted)


def test_the_file_holds_those_columns_and_no_others(both: Both) -> None:
    with h5py.File(both.path / "trace.h5", "r") as file:
        found = datasets(file)
    left_out = {"step", *OF_THE_HESSIAN}  # every group names its dimension scale
    assert {path for path in found if path.split("/")[-1] not in left_out} == set(both.wanted) - {"steps/step"}


def datasets(group: Any, prefix: str = "") -> set[str]:
    """Paths of all datasets, under each of their names (h5py's own visit names each only once)."""
    found: set[str] = set()
    for name, item in group.items():
        found |= datasets(item, f"{prefix}{name}/") if isinstance(item, h5py.Group) else {prefix + name}
    return found


def test_the_certificate_says_all_of_all_steps(both: Both) -> None:
    steps, certificate = len(both.oracle.history.loss), both.trace.certificate
    compared = [certificate[key] for key in ("steps_recorded", "steps_compared", "steps_equal")]
    assert (both.trace.status, compared) == ("complete", [steps] * 3)
    assert certificate["final_weights_equal"] is True
    assert both.trace.num_parameters == sum(len(w) for w in both.oracle.history.final)


def test_neither_recording_nor_measuring_changes_a_bit_of_the_training(both: Both) -> None:
    assert both.oracle.final
    assert both.recorded.final == both.oracle.final
    assert both.replayed.final == both.oracle.final


def test_the_record_keeps_the_references_and_the_steps(both: Both) -> None:
    history = both.oracle.history
    references = {
        **history.references,
        **{f"step-{t}": history.weights[t] for t in both.case.reference_steps},
    }
    with h5py.File(both.path / "record.h5", "r") as file:
        assert set(file["references"]) == set(references)
        for name, vectors in references.items():
            for parameter, wanted in zip(history.parameters, vectors, strict=True):
                np.testing.assert_array_equal(stored(file[f"references/{name}/{parameter}"]), wanted)
        np.testing.assert_allclose(file["steps/loss"], history.loss, rtol=RELATIVE)
        np.testing.assert_array_equal(file["steps/epoch"], history.epoch)
        np.testing.assert_array_equal(file["steps/lr"], [groups[0]["lr"] for groups in history.groups])


def stored(dataset: Any) -> np.ndarray:
    """A stored parameter as float64; bfloat16, which NumPy lacks, by hand."""
    raw = dataset[()].reshape(-1)
    if dataset.attrs["torch_dtype"] == "bfloat16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)


def test_the_cases_do_what_their_names_say() -> None:
    cases = {str(case): case for case in CASES}
    tries = 2 * SAMPLES // BATCH
    for name, skipped in (("for-loop optimizer", 2), ("fused Adam", 2), ("fused SGD", 1)):
        (case,) = (case for key, case in cases.items() if name in key)
        oracle = brute_force(case, SEED)
        assert oracle.tries == tries
        assert len(oracle.history.loss) <= tries - skipped
    assert (
        cases["GradScaler, fused Adam, overflows at the start and later"]
        .optimizer([torch.nn.Parameter(torch.zeros(1))])
        .defaults["fused"]
    )
    heads = brute_force(cases["parameters without a gradient on some steps"], SEED).history
    assert {bool(g[2].any()) for g in heads.gradients} == {True, False}
    frozen = brute_force(cases["frozen in mid-run"], SEED).history
    assert [bool(g[0].any()) for g in frozen.gradients] == [True] * 4 + [False] * (tries - 4)
    clipped, free = (brute_force(case, SEED).history for case in (cases["clipping"], PLAIN))
    assert np.linalg.norm(np.concatenate(clipped.gradients[0])) == pytest.approx(0.3, rel=1e-5)
    assert np.linalg.norm(np.concatenate(free.gradients[0])) > 0.3


def test_two_pass_is_both_halves_and_draws_a_seed_where_none_is_given(tmp_path: Path) -> None:
    first, second = (geomprobe.two_pass(watched(PLAIN, Probed()), tmp_path / name) for name in "ab")
    assert (first.status, second.status) == ("complete", "complete")
    seeds = [trace.manifest["seed"] for trace in (first, second)]
    assert seeds[0] != seeds[1]
    wanted = columns_of(PLAIN, brute_force(PLAIN, seeds[0]).history)
    assert_columns(first, wanted)
    wanted["steps/cosine"][3] *= 1 + 2e-9  # the comparison itself would see that much
    with pytest.raises(AssertionError, match="steps/cosine"):
        assert_columns(first, wanted)
