"""What a replay of several processes is asked for beside the trace: references from files, or no certificate."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.launches import STEPS, Training, recorded, replayed, start
from torch import nn

from geomprobe import open_trace
from geomprobe.passes.references.loaded import from_numpy
from geomprobe.trace.record import open_record

SIZE = 2


@pytest.fixture(scope="module", params=["FSDP2", pytest.param("DDP", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording."""
    path = tmp_path_factory.mktemp("recorded") / request.param
    codes = start(SIZE, recorded, path.parent, Training(path.name, double=True), path)
    assert [code for code, _ in codes] == [0] * SIZE, codes
    return path


def whole_final(run: Path) -> dict[str, torch.Tensor]:
    """The final iterate, from what each rank has of it."""
    shards: dict[str, list[torch.Tensor]] = {}
    for rank in range(SIZE if run.name == "FSDP2" else 1):
        with open_record(run, rank) as record:
            for name, raw in record.reference("final").items():
                shards.setdefault(name, []).append(from_numpy(*raw))
    return {name: torch.cat(parts) for name, parts in shards.items()}


def test_weights_from_a_file_are_a_reference_under_every_layout(run: Path, tmp_path: Path) -> None:
    torch.save(whole_final(run), tmp_path / "same.pt")
    torch.save({name: w + 1.0 for name, w in whole_final(run).items()}, tmp_path / "off.pt")
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    files = {"same": tmp_path / "same.pt", "off": tmp_path / "off.pt"}
    codes = start(SIZE, replayed, tmp_path, Training(run.name, double=True), copy, {"references": files})
    assert [code for code, _ in codes] == [0] * SIZE, codes
    trace = open_trace(copy)
    for column in ("distance", "rsi", "cosine", "lolr"):
        assert np.array_equal(trace[f"references/same/{column}"], trace[column])
    last = trace["references/off/distance"][-1]
    size = sum(w.numel() for w in whole_final(run).values())
    step = trace["distance"][-1]  # w_{T-1} is a step away from w_T, and w_T as far from the other as there are weights
    assert abs(last - size**0.5) <= step


def test_an_uncertified_replay_marks_what_any_rank_finds_different(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    training = Training(run.name, double=True, fault=(1, 7))
    codes = start(SIZE, replayed, tmp_path, training, copy, {"uncertified": True})
    assert [code for code, _ in codes] == [0] * SIZE, codes
    trace = open_trace(copy)
    assert trace.status == "uncertified"
    assert trace["same"].tolist() == [1.0] * 7 + [0.0] * (STEPS - 7)
    assert trace.certificate["steps_equal"] == 7
    first = trace.certificate["first_difference"]
    assert (first["step"], first["component"], first["rank"]) == (7, "rng", 1)


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def test_the_rank_that_explains_the_gradient_of_all_is_the_one_to_blame(tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = start(SIZE, recorded, tmp_path, Training("DDP", model=with_dropout), run)
    assert [code for code, _ in codes] == [0] * SIZE, codes
    training = Training("DDP", model=with_dropout, fault=(1, 7))
    codes = start(SIZE, replayed, tmp_path, training, run, {"uncertified": True})
    assert [code for code, _ in codes] == [0] * SIZE, codes
    first = open_trace(run).certificate["first_difference"]
    assert (first["step"], first["component"], first["rank"]) == (7, "rng", 1)


def test_a_file_of_other_weights_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    torch.save({name: w[:1] for name, w in whole_final(run).items()}, tmp_path / "other.pt")
    codes = start(
        SIZE,
        replayed,
        tmp_path,
        Training(run.name, double=True),
        copy,
        {"references": {"other": tmp_path / "other.pt"}},
    )
    assert [code for code, _ in codes] == [1] * SIZE, codes
    assert any("other.pt" in text and "shape" in text for _, (_, text) in codes)
    assert not (copy / "trace.h5").exists()
