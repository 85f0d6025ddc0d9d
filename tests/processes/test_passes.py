"""Runs of several processes are recorded and replayed as one, and a rank that fails or differs is named."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from support.command_server import python
from support.launches import STEPS, Training, both_passes, replayed, start

import geomprobe
from geomprobe import open_trace
from geomprobe.report.verify.verify import verify
from geomprobe.trace.record import open_record

COLUMNS = ("loss", "grad_norm", "distance", "rsi", "eb", "cosine", "lolr", "clr", "hg_norm", "g_hg")


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("DDP", 2),
        ("FSDP2", 3),
        *(pytest.param("DDP", size, marks=pytest.mark.slow) for size in (3, 4)),
        *(pytest.param("FSDP2", size, marks=pytest.mark.slow) for size in (2, 4)),
    ],
)
def test_a_run_of_several_processes_measures_what_one_process_would_on_the_global_batch(
    tmp_path: Path, kind: str, size: int
) -> None:
    training = Training(kind, double=True)
    both_passes(size, training, tmp_path / "run")
    trace = open_trace(tmp_path / "run")
    assert trace.status == "complete"
    assert [trace.certificate[name] for name in ("steps_recorded", "steps_equal")] == [STEPS, STEPS]
    assert trace.certificate["final_weights_equal"]
    found = trace.manifest["ranks"]
    assert (found["kind"], found["world_size"]) == (kind, size)

    geomprobe.two_pass(Training(kind, double=True), tmp_path / "one", seed=0)
    alone = open_trace(tmp_path / "one")
    for name in COLUMNS:
        np.testing.assert_allclose(trace[name], alone[name], rtol=1e-7, err_msg=name)


def test_each_rank_keeps_fingerprints_of_its_own_and_its_shards(tmp_path: Path) -> None:
    both_passes(3, Training("FSDP2"), tmp_path / "run")
    with h5py.File(tmp_path / "run" / "record.h5") as file:
        prints = [
            file["fingerprints/weights"][:],
            *(file[f"ranks/{r}/fingerprints/weights"][:] for r in (1, 2)),
        ]
        assert len({table.tobytes() for table in prints}) == 3
        shards = [file[f"{where}references/final/0.weight"].shape for where in ("", "ranks/1/", "ranks/2/")]
        assert shards == [(3, 3), (3, 3), (1, 3)]
    assert not (tmp_path / "run" / "stream").exists()


def test_each_rank_s_own_gradient_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    both_passes(2, Training("DDP", double=True), tmp_path / "run", per_rank=True)
    trace = open_trace(tmp_path / "run")
    own = [trace[f"ranks/{rank}/g.d"] for rank in (0, 1)]
    assert not np.allclose(*own)
    np.testing.assert_allclose(np.mean(own, axis=0), trace["inner_products/g.d"], rtol=1e-9)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_differs_is_named_with_its_step_and_stops_them_all(tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    both_passes(2, Training("DDP"), run)
    (run / "trace.h5").unlink()
    codes = start(2, replayed, tmp_path, Training("DDP", fault=(rank, 7)), run, {})
    assert all(code for code, _ in codes)
    code, (kind, text) = codes[rank]
    assert (code, kind) == (3, "ReplayDiverged")
    assert f"on rank {rank} differed from its recording at step 7 of 12: first the rng" in text
    assert not (run / "trace.h5").exists() or open_trace(run).status == "diverged"


def test_another_number_of_processes_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    both_passes(2, Training("DDP"), run)
    kept = (run / "trace.h5").read_bytes()
    for code, (kind, text) in start(3, replayed, tmp_path, Training("DDP"), run, {}):
        assert (code, kind) == (1, "EnvironmentMismatch")
        assert "was recorded by 2 processes, and here are 3" in text
    assert (run / "trace.h5").read_bytes() == kept


PASSES = ["record", "-o", "run", "--seed", "0", "train.py"], ["replay", "run"]


@pytest.mark.parametrize("passes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_starts_both_passes(tmp_path: Path, passes: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from support.launches import Training\nTraining('DDP')()\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "geomprobe"]
    fresh = {"PYTHONHASHSEED": None, "CUBLAS_WORKSPACE_CONFIG": None}  # the passes set these themselves
    for command in PASSES[:passes]:
        done = python(*torchrun, *command, cwd=tmp_path, env=fresh, timeout_s=240)
        assert done.code == 0, done.err
        assert done.out.count("Wrote") == 1
    with open_record(tmp_path / "run") as record:
        assert (record.status, record.num_steps) == ("complete", STEPS)
    if passes == 2:
        assert verify(open_trace(tmp_path / "run")).broken == ()
