"""Processes end with exit code 0 and without a word, also where a script leaves its process group behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Frees the tensors of its last exchanges in gloo's threads while the interpreter ends, unless these are waited for.
LEAVING = """
import torch
from torch import distributed as dist
from geomprobe.distributed.ranks import end_process_group

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
model(torch.ones(2, 3)).sum().backward()
for _ in range(3):
    dist.all_reduce(torch.ones(1_000_000), async_op=True)
del model
end_process_group()
"""

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
for _ in range(3):
    dist.all_reduce(torch.ones(1_000_000), async_op=True)
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
@pytest.mark.parametrize("times", [8])
def test_threads_of_a_process_group_end_before_the_interpreter(tmp_path: Path, times: int) -> None:
    for _ in range(times):
        for code, said in run(tmp_path, "-c", LEAVING):
            assert code == 0, said
            assert "terminate called" not in said


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_script_that_leaves_its_group_is_recorded_and_its_processes_end_in_order(tmp_path: Path, times: int) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    for i in range(times):
        for code, said in run(tmp_path, "-m", "geomprobe", "record", "-o", f"run{i}", "train.py"):
            assert code == 0, said
            assert "terminate called" not in said
