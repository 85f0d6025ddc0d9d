"""Processes that know of one another as torchrun's do: by the environment, before they make a process group."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import geomprobe
from geomprobe.errors import Stopped
from support.ranks import context

LIMIT_S = 120.0
STEPS, EPOCHS, SAMPLES = 12, 2, 72


class Training:
    """A small regression, on as many processes as there are; each has its share of every batch."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options

    def __call__(self) -> None:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        data = TensorDataset(torch.randn(SAMPLES, 3), torch.randn(SAMPLES, 1))
        model: nn.Module = self.options.get("model", _perceptron)()
        model = model.double() if self.options.get("double") else model
        if size > 1:
            torch.distributed.init_process_group("gloo")
            wrap = DistributedDataParallel if self.kind == "DDP" else fully_shard
            model = wrap(model, **self.options.get("wrapped", {}))
        rank = torch.distributed.get_rank() if size > 1 else 0
        optimizer = self.options.get("optimizer", torch.optim.Adam)(model.parameters(), lr=0.05)
        sampler = DistributedSampler(data, size, rank, shuffle=False)
        loader = DataLoader(data, SAMPLES * EPOCHS // STEPS // size, sampler=sampler)
        if size == 1:  # a batch of what all the ranks have together
            loader = DataLoader(data, SAMPLES * EPOCHS // STEPS)
        probe = geomprobe.attach(model, optimizer)
        step = 0
        for _ in probe.epochs(EPOCHS):
            for x, y in probe.batches(loader):
                if (rank, step) == self.options.get("fault"):
                    torch.rand(1)
                time.sleep(self.options.get("pause", 0))
                if (rank, step) == self.options.get("place"):
                    self.options["trouble"]()
                dtype = next(model.parameters()).dtype
                loss = (model(x.to(dtype)) - y.to(dtype)).square().mean()
                optimizer.zero_grad()
                probe.backward(loss)
                optimizer.step()
                step += 1
        if size > 1:
            torch.distributed.destroy_process_group()


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1))


def start(size: int, job: Callable[..., Any], folder: Path, *arguments: Any) -> list[tuple[int | None, Any]]:
    """Run ``job(*arguments)`` on each rank; gives each one's exit code, and its result or what it raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context().Process(target=_rank, args=(rank, size, port, folder, job, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    hung = [_runs(process) for process in processes]
    for process in processes:
        process.kill()
    assert not any(hung)
    found = []
    for rank, process in enumerate(processes):
        process.join()
        path = folder / f"result.{rank}"
        found.append((process.exitcode, torch.load(path, weights_only=False) if path.exists() else None))
        path.unlink(missing_ok=True)
    return found


def _runs(process: Any) -> bool:
    """Whether a process lives, and is not held by SIGSTOP."""
    if not process.is_alive():
        return False
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has just ended
        return False
    return state != "T"


def _rank(rank: int, size: int, port: int, folder: Path, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        result = job(*arguments)
    except (geomprobe.GeomprobeError, Stopped) as error:
        torch.save((type(error).__name__, str(error)), folder / f"result.{rank}")
        os._exit(error.exit_code)
    except Exception:
        torch.save(traceback.format_exc(), folder / f"result.{rank}")
        os._exit(1)
    torch.save(result, folder / f"result.{rank}")


def recorded(training: Training, run: Path) -> None:
    geomprobe.record(training, run, seed=0).close()


def replayed(training: Training, run: Path, options: dict[str, Any]) -> None:
    geomprobe.replay(training, run, **options)


def both_passes(size: int, training: Training, run: Path, **options: Any) -> None:
    """Record and replay a training, each in processes of its own, to a good end."""
    for job, further in ((recorded, ()), (replayed, (options,))):
        codes = start(size, job, run.parent, training, run, *further)
        assert [code for code, _ in codes] == [0] * size, codes
