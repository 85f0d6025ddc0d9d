"""Runs a function in several processes that know of one another through gloo, and brings back what each returns."""

from __future__ import annotations

import functools
import multiprocessing
import os
import traceback
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from stress.command_forks import IMPORTED

# Forks of a process that has imported everything start in a tenth of a second.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *IMPORTED,
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "geomprobe.measure.measurement",
        "support.shared_training",
    ]
)
_LIMIT_S = 120.0


@functools.cache
def context() -> Any:
    """What makes processes by forks of that process, which is started now: it would not find tests/ by itself."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1])):
        forkserver.ensure_running()
    return _CONTEXT


def run(world_size: int, job: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """``job(*arguments)`` on each of ``world_size`` ranks; its results in their order."""
    name = uuid.uuid4().hex
    ranks = [
        context().Process(target=_rank, args=(rank, world_size, folder / name, job, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_LIMIT_S)
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    said = []
    for rank in range(world_size):
        path = folder / f"{name}.{rank}"
        said.append(torch.load(path, weights_only=False) if path.exists() else (False, "no result"))
    failed = [f"rank {rank}: {text}" for rank, (held, text) in enumerate(said) if not held]
    assert not failed, f"hung: {hung}\n" + "\n".join(map(str, failed))
    return [result for _, result in said]


def _rank(rank: int, world_size: int, store: Path, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        said = (True, job(*arguments))
    except BaseException:
        said = (False, traceback.format_exc())
    torch.save(said, store.with_name(f"{store.name}.{rank}"))
    if said[0]:
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
