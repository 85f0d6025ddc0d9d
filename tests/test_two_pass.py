"""Recording and replaying any training gives an independent brute force's numbers, and disturbs no bit of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cases import CASES, COMPILED, PLAIN, Case, Watch, train
from oracle import Oracle, brute_force

import geomprobe
from geomprobe import Trace

SEED = 7

# Both sides sum exact products in float64, so they differ by float64's rounding of a few hundred terms only;
# the promise is 1e-6.
RELATIVE = 1e-9

# Steps of the Hessian's columns, which a replay without curvature leaves out.
OF_THE_HESSIAN = {
    "steps/hg_norm",
    "steps/g_hg",
    "steps/corridor_residual",
    "steps/relative_residual",
    "steps/flow_drift",
    "inner_products/g.Hg",
    "inner_products/Hg.Hg",
}


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


def probed(case: Case, watch: Watch) -> Callable[[], None]:
    return lambda: train(case, watch)


def run_both(case: Case, path: Path) -> Both:
    oracle, recorded, replayed = brute_force(case, SEED), Probed(), Probed()
    geomprobe.record(probed(case, recorded), path, seed=SEED, reference_steps=case.reference_steps).close()
    trace = geomprobe.replay(probed(case, replayed), path, **case.replay)
    return Both(case, oracle, recorded, replayed, trace, path)


@pytest.fixture(scope="module", params=[*CASES, COMPILED], ids=str)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return run_both(request.param, tmp_path_factory.mktemp("case") / "run")


def test_every_column_equals_the_brute_force(both: Both) -> None:
    wanted = both.oracle.columns(both.case)
    for path, values in wanted.items():
        np.testing.assert_allclose(both.trace[path], values, rtol=RELATIVE, err_msg=path)


def datasets(group: Any, prefix: str = "") -> set[str]:
    """Paths of all datasets, under each of their names (h5py's own visit names each only once)."""
    found: set[str] = set()
    for name, item in group.items():
        found |= datasets(item, f"{prefix}{name}/") if isinstance(item, h5py.Group) else {prefix + name}
    return found


def test_the_file_holds_those_columns_and_no_others(both: Both) -> None:
    with h5py.File(both.path / "trace.h5", "r") as file:
        found = datasets(file)
    scales = {path for path in found if path.endswith("/step")} - {"steps/step"}
    assert found - scales - OF_THE_HESSIAN == set(both.oracle.columns(both.case))


def test_the_certificate_says_all_of_all_steps(both: Both) -> None:
    steps, certificate = len(both.oracle.loss), both.trace.certificate
    held = [certificate[key] for key in ("steps_recorded", "steps_compared", "steps_equal")]
    assert (both.trace.status, held) == ("complete", [steps] * 3)
    assert certificate["final_weights_equal"] is True
    assert both.trace.num_parameters == sum(len(w) for w in both.oracle.final_weights)


def test_neither_recording_nor_measuring_changes_a_bit_of_the_training(both: Both) -> None:
    assert both.oracle.final
    assert both.recorded.final == both.oracle.final
    assert both.replayed.final == both.oracle.final
