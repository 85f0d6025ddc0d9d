"""Processes end with exit code 0 and without a word, also where a script leaves its process group behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = """
import torch
from torch import distributed as dist
import geomprobe

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = geomprobe.attach(model, optimizer)
for _ in range(3):
    optimizer.zero_grad()
    probe.backward(model(torch.randn(2, 3)).sum())
    optimizer.step()
# Threads of gloo's free these tensors while the interpreter ends.
for _ in range(3):
    dist.all_reduce(torch.ones(1_000_000), async_op=True)
import atexit, sys
atexit.register(print, "a function of atexit's", file=sys.stderr)
if "fail" in sys.argv:
    raise ValueError("of the script's own")
"""


def run(folder: Path, *command: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_a_script_that_leaves_its_group_is_recorded_and_its_processes_end_in_order(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    for i in range(8):
        for code, said in run(tmp_path, "-m", "geomprobe", "record", "-o", f"run{i}", "train.py"):
            assert code == 0, said
            assert "terminate called" not in said


def test_exit_code_and_functions_at_exit_are_kept(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    for code, said in run(tmp_path, "-m", "geomprobe", "record", "-o", "run", "train.py", "fail"):
        assert code == 1, said
        assert "of the script's own" in said
        assert "a function of atexit's" in said
        assert "terminate called" not in said
    for code, said in run(tmp_path, "-m", "geomprobe", "record", "--nonsense"):
        assert code == 2, said
