"""A run of several processes that was cut off goes on, and is replayed in pieces, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.launches import start
from support.resumed_training import Resumable, recorded, recorded_cold, replayed
from support.same_file import assert_same

from geomprobe import open_trace
from geomprobe.distributed.ranks import Ranks
from geomprobe.distributed.step_barrier import StepBarrier
from geomprobe.errors import RunError
from geomprobe.passes.checkpoint import store as checkpoint
from geomprobe.report.verify.verify import verify
from geomprobe.trace.record import open_record

KINDS: dict[str, Any] = {
    "DDP": lambda **happening: Resumable("DDP", **happening),
    "DDP static": lambda **happening: Resumable("DDP", static_graph=True, **happening),
    "FSDP2": lambda **happening: Resumable("FSDP2", **happening),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Undisturbed recordings, and their traces, made when first asked for."""
    made: dict[Any, Path] = {}

    def whole(kind: str, size: int) -> Path:
        if (kind, size) not in made:
            run = tmp_path_factory.mktemp("whole") / "run"
            held(start(size, recorded, run.parent, KINDS[kind](), run, {}))
            shutil.copytree(run, run.with_name("recorded"))
            held(start(size, replayed, run.parent, KINDS[kind](), run, {}))
            made[kind, size] = run
        return made[kind, size]

    return whole


def held(codes: list[tuple[int | None, Any]]) -> list[Any]:
    assert not any(code for code, _ in codes), codes
    return [result for _, result in codes]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("DDP", 3),  # two ranks cannot see the order of a sum
        *(pytest.param("DDP", size, marks=pytest.mark.slow) for size in (2, 4)),
        *(pytest.param("DDP static", size, marks=pytest.mark.slow) for size in (3, 4)),
        *(pytest.param("FSDP2", size, marks=pytest.mark.slow) for size in (2, 3, 4)),
    ],
)
def test_a_run_begun_in_the_middle_is_the_same_run(wholes: Any, tmp_path: Path, kind: str, size: int) -> None:
    whole, cut = wholes(kind, size), tmp_path / "cut"
    codes = start(size, recorded, tmp_path, KINDS[kind](at=(1, 9), do="die"), cut, {})
    assert all(code for code, _ in codes)
    assert not (cut / "record.h5").exists()
    begun = held(start(size, recorded, tmp_path, KINDS[kind](), cut, {"resume": True}))
    assert set(begun) <= {6, 8}
    assert len(set(begun)) == 1
    assert_same(cut / "record.h5", whole / "record.h5")
    for number in (3, 1, 2):
        held(start(size, replayed, tmp_path, KINDS[kind](), cut, {"segment": (number, 3)}))
    assert_same(cut / "trace.h5", whole / "trace.h5")
    trace = open_trace(cut)
    assert (trace.status, trace.certificate["steps_equal"]) == ("complete", 12)
    assert not (cut / "stream").exists()
    assert verify(trace).broken == ()


def test_without_the_warm_up_other_sums_are_found_before_a_row_is_written(tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    start(3, recorded, tmp_path, KINDS["DDP"](at=(1, 9), do="die"), cut, {})
    codes = start(3, recorded_cold, tmp_path, KINDS["DDP"](), cut, {"resume": True})
    assert [code for code, _ in codes] == [1, 1, 1]
    assert any("sums would come in another order" in text for _, (_, text) in codes)


@pytest.mark.parametrize("kind", ["DDP", pytest.param("FSDP2", marks=pytest.mark.slow)])
def test_all_ranks_stop_at_one_step_when_a_queue_asks_one_of_them(wholes: Any, tmp_path: Path, kind: str) -> None:
    whole, cut = wholes(kind, 2 if kind == "FSDP2" else 3), tmp_path / "cut"
    size = 2 if kind == "FSDP2" else 3
    asked = KINDS[kind](at=(1, 3), do="stop", pace_s=0.05)  # the training goes on while the others hear of it
    codes = start(size, recorded, tmp_path, asked, cut, {})
    assert [code for code, _ in codes] == [75] * size, codes
    step = checkpoint.saved(cut / "checkpoints")[-1]
    assert checkpoint.saved(cut / "checkpoints" / "rank-0001")[-1] == step
    assert 3 < step < 12
    begun = held(start(size, recorded, tmp_path, KINDS[kind](), cut, {"resume": True}))
    assert begun == [step] * size
    assert_same(cut / "record.h5", whole / "record.h5")


def test_a_checkpoint_that_one_rank_has_lost_is_passed_over_by_all(wholes: Any, tmp_path: Path) -> None:
    whole, cut = wholes("FSDP2", 2), tmp_path / "cut"
    start(2, recorded, tmp_path, KINDS["FSDP2"](at=(0, 9), do="die"), cut, {})
    latest = checkpoint.saved(cut / "checkpoints" / "rank-0001")[-1]
    flip_a_bit(next(checkpoint.folder(cut / "checkpoints" / "rank-0001", latest).glob("state.pt")))
    begun = held(start(2, recorded, tmp_path, KINDS["FSDP2"](), cut, {"resume": True}))
    assert set(begun) == {latest - 2}
    assert_same(cut / "record.h5", whole / "record.h5")


def test_replicas_keep_the_weights_once(wholes: Any) -> None:
    whole = wholes("DDP", 3)
    first, second = (
        whole / "checkpoints" / "step-00000008",
        whole / "checkpoints" / "rank-0001" / "step-00000008",
    )
    states = [checkpoint.read(path)["training"] for path in (first, second)]
    of_first, of_second = (state["replicated"]["weights"]["module.0.0.weight"] for state in states)
    assert torch.equal(of_first, of_second)
    of_first, of_second = (state["buffers"]["module.0.1.running_mean"]["values"] for state in states)
    assert not torch.equal(of_first, of_second)
    sizes = [sum(file.stat().st_size for file in path.glob("state.pt")) for path in (first, second)]
    assert sizes[1] < sizes[0]
    facts = json.loads((first / checkpoint.FACTS).read_text())
    (first / checkpoint.FACTS).unlink()
    try:
        with pytest.raises(RunError, match="cannot be read"):
            checkpoint.verify(second)
    finally:
        (first / checkpoint.FACTS).write_text(json.dumps(facts))
    assert checkpoint.verify(second)["position"] == [0, 1, 0, 2]


@pytest.mark.slow
def test_a_rank_that_drifts_in_a_segment_is_named_and_the_other_segments_stay(wholes: Any, tmp_path: Path) -> None:
    whole, run = wholes("DDP", 3), tmp_path / "run"
    shutil.copytree(whole.with_name("recorded"), run)
    held(start(3, replayed, tmp_path, KINDS["DDP"](), run, {"segment": (1, 2)}))
    codes = start(3, replayed, tmp_path, KINDS["DDP"](at=(2, 10), do="drift"), run, {"segment": (2, 2)})
    code, (kind, text) = codes[2]
    assert (code, kind) == (3, "ReplayDiverged")
    assert "on rank 2 differed from its recording at step 10 of 12: first the weights" in text
    held(start(3, replayed, tmp_path, KINDS["DDP"](), run, {"resume": True}))
    assert_same(run / "trace.h5", whole / "trace.h5")


def test_another_number_of_processes_does_not_go_on_with_a_recording(tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    start(2, recorded, tmp_path, KINDS["DDP"](at=(0, 5), do="die"), cut, {})
    kept = {path for path in cut.rglob("*.h5") if path.is_file()}
    ends = start(3, recorded, tmp_path, KINDS["DDP"](), cut, {"resume": True})
    assert "EnvironmentMismatch" in {kind for _, (kind, _) in ends}
    for code, (kind, text) in ends:  # a slow rank may hear of another's refusal before it refuses by itself
        assert code == 1
        assert kind in ("EnvironmentMismatch", "ElsewhereStopped")
        assert "was recorded by 2 processes, and here are 3" in text or "which holds at" in text
    assert kept
    assert kept <= set(cut.rglob("*.h5"))


def test_shards_of_a_reference_are_of_one_step_whatever_each_rank_finds_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held(start(2, recorded, tmp_path, KINDS["FSDP2"](do="choose"), run, {"reference_steps": [6]}))
    for rank in (0, 1):
        with open_record(run, rank) as record:
            assert "of-one" not in record.references
            best, then = (record.reference(name) for name in ("best", "step-6"))
            assert all(np.array_equal(best[name][0], then[name][0]) for name in then)
    with open_record(run) as record:
        assert record.manifest["references_left_out"] == ["of-one"]


def flip_a_bit(path: Path) -> None:
    held_bytes = bytearray(path.read_bytes())
    held_bytes[len(held_bytes) // 2] ^= 1
    path.write_bytes(held_bytes)


def in_step(asking: int, at: int, stops: int) -> list[list[int]]:
    """Two ranks go through steps in turn; one wants something before a step. Gives the steps it is done at."""
    store = torch.distributed.HashStore()
    ranks = [Ranks(rank, 2, store) for rank in (0, 1)]
    meetings = [StepBarrier(each, "stop") for each in ranks]
    done: list[list[int]] = [[], []]
    for step in range(stops):
        for rank, meeting in enumerate(meetings):
            if (rank, step) == (asking, at):
                meeting.call()
            if meeting.due(step):
                done[rank].append(step)
    return done


@pytest.mark.parametrize("asking", [0, 1])
@pytest.mark.parametrize("at", [0, 3])
def test_whoever_asks_all_do_it_once_before_the_same_step(asking: int, at: int) -> None:
    done = in_step(asking, at, stops=10)
    assert len(done[0]) == 1
    assert done[0] == done[1]
    assert at < done[0][0] <= at + 3


def test_a_rank_that_has_passed_the_others_says_so() -> None:
    store = torch.distributed.HashStore()
    ranks = [Ranks(rank, 2, store) for rank in (0, 1)]
    first, second = (StepBarrier(each, "stop") for each in ranks)
    first.call()
    second.due(5)
    second.due(6)
    first.due(2)  # names step 3
    with pytest.raises(RunError, match="rank 1 is before step 7, and the others do `stop` before step 3"):
        second.due(7)
