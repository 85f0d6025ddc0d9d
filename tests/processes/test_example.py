"""The worked example of several processes: one and more of them train alike, and are recorded and replayed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from geomprobe import open_trace

SCRIPT = Path(__file__).parents[2] / "scripts/examples/distributed.py"
SMALL = [
    "--modules",
    "email",
    "json",
    "--vocabulary",
    "100",
    "--features",
    "8",
    "--layers",
    "1",
    "--epochs",
    "2",
]


def launched(processes: int, *command: str) -> str:
    """What a command says, run by as many processes."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    done = subprocess.run([sys.executable, *torchrun, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_alike_on_one_process_and_on_several() -> None:
    options = [str(SCRIPT), *SMALL]
    losses = [
        [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", launched(processes, *options, *kind))]
        for processes, kind in ((1, []), (2, ["--parallel", "ddp"]), (2, ["--parallel", "fsdp2"]))
    ]
    assert len(losses[0]) == 2
    assert losses[0][1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)  # dropout differs
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_both_passes_of_it_hold(tmp_path: Path, parallel: str) -> None:
    run = str(tmp_path / "run")
    record = ["record", "-o", run, "--seed", "0", str(SCRIPT), "--parallel", parallel, *SMALL]
    launched(2, "-m", "geomprobe", *record)
    launched(2, "-m", "geomprobe", "replay", run)
    trace = open_trace(run)
    assert trace.status == "complete"
    assert np.isfinite(trace["hg_norm"]).all()
    assert np.unique(trace["epoch"]).tolist() == [0, 1]
