"""A pass that was cut off and goes on, or is done in pieces, gives the very file of one that nobody disturbed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import CASES, Alternating, Case, Watch, train
from support.same_file import assert_same

import geomprobe

SEED = 3

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# One of each kind of state; the others differ from these in what is measured, not in what is kept.
TELLING = {
    "scheduler",
    "dropout",
    "BatchNorm",
    "2 workers",
    "GradScaler, fused Adam, overflows at the start and later",
}


class Cut(BaseException):
    """Ends a training as a kill does: no handler of the script's sees it, and nothing is finished."""


class Probed(Watch):
    """A training with a probe in it, which may be cut off before the n-th try of a step."""

    def __init__(self, cut: int | None = None) -> None:
        super().__init__()
        self.left = cut

    def attach(self, model: Any, optimizer: Any, **stateful: Any) -> Any:
        return geomprobe.attach(model, optimizer, **stateful)

    def before_step(self, losses: list[torch.Tensor], scale: float = 1.0) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Cut


class Trained:
    """A case's training, which is cut off where that is said."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cut: int | None = None

    def __call__(self) -> None:
        cut, self.cut = self.cut, None
        train(self.case, Probed(cut))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Trained, Path]:
    training, path = Trained(request.param), tmp_path_factory.mktemp("whole") / "run"
    geomprobe.record(training, path, seed=SEED, **recording(request.param)).close()
    geomprobe.replay(training, path, **request.param.replay)
    return training, path


def recording(case: Case) -> dict[str, Any]:
    return {"checkpoint_every": "2steps", "reference_steps": case.reference_steps}


def of_each_kind() -> list[Any]:
    return [
        pytest.param(c, id=c.name, marks=() if c.name in TELLING else pytest.mark.slow)
        for c in CASES
        if c.model is not Alternating  # which keeps state where nobody looks
    ]


@pytest.mark.parametrize("whole", of_each_kind(), indirect=True)
def test_a_recording_that_was_cut_off_twice_becomes_the_undisturbed_one(whole, tmp_path: Path) -> None:
    training, path = whole
    run = tmp_path / "run"
    for after in (5, 4):  # in mid-epoch, and from there across the end of an epoch
        training.cut = after
        with pytest.raises(Cut):
            geomprobe.record(training, run, seed=SEED, resume=True, **recording(training.case))
        assert not (run / "record.h5").exists()
    geomprobe.record(training, run, resume=True).close()
    assert_same(run / "record.h5", path / "record.h5")
    assert not (run / "stream").exists()


@pytest.mark.parametrize("whole", of_each_kind(), indirect=True)
def test_a_replay_in_segments_and_one_that_was_cut_off_give_the_serial_trace(whole, tmp_path: Path) -> None:
    training, path = whole
    run = copy_of(path, tmp_path)
    options = training.case.replay
    for number in (2, 3, 1):
        trace = geomprobe.replay(training, run, segment=(number, 3), **options)
    assert trace.status == "complete"
    assert_same(run / "trace.h5", path / "trace.h5")

    (run / "trace.h5").unlink()
    training.cut = 7
    with pytest.raises(Cut):
        geomprobe.replay(training, run, **options)
    geomprobe.replay(training, run, resume=True, **options)
    assert_same(run / "trace.h5", path / "trace.h5")


def copy_of(path: Path, folder: Path) -> Path:
    """A run that has been recorded, and not replayed."""
    run = folder / "run"
    shutil.copytree(path, run)
    (run / "trace.h5").unlink(missing_ok=True)
    return run
