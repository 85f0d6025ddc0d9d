"""The compiled loops in threads, after a fork, and where their cache cannot be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from support.reads import DTYPES, assert_read, normal

from geomprobe.kernels import numba_kernel
from geomprobe.kernels.fused_read import FusedRead, Reading

SHAPES = [(700, 900), (10,), (333, 1000), (8192,)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read(dtype: torch.dtype = torch.float32) -> Reading:
    w, g, star = (normal(SHAPES, dtype, seed) for seed in range(3))
    return FusedRead(w, {"final": star}, per_parameter=True, backend="numba").read(g)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(read(dtype))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True) if a is not None and b is not None)


@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    w, g = normal(SHAPES, torch.float32, 0), normal(SHAPES, torch.float32, 1)
    fused = FusedRead(w, backend="numba")
    expected = [found.tolist() for found in fused.read(g) if found is not None]
    assert numba_kernel._pool.cache_info().currsize == 1
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends it if it waits for a thread that is not there
        found = [found.tolist() for found in fused.read(g) if found is not None]
        os._exit(0 if found == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [found.tolist() for found in fused.read(g) if found is not None] == expected


def test_a_small_model_is_read_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr(numba_kernel, "_pool", refuse)
    w, g = normal([(200, 300)], torch.float32, 0), normal([(200, 300)], torch.float32, 1)
    assert_read(FusedRead(w, per_parameter=True, backend="numba").read(g), w, g)


CODE = """
import torch
from geomprobe.kernels.fused_read import FusedRead
w, g = torch.arange(20000.0), torch.ones(20000)
reading = FusedRead([w]).read([g])
print(FusedRead([w]).backend, reading.weights.item(), reading.sums.tolist())
"""


def in_a_process(package: Path, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE],
        env={**kept, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
        cwd=package,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_code_is_kept_on_disk_and_found_again(tmp_path: Path) -> None:
    first = in_a_process(ROOT, NUMBA_CACHE_DIR=str(tmp_path))
    kept = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.nb*"))
    assert kept
    assert in_a_process(ROOT, NUMBA_CACHE_DIR=str(tmp_path)) == first
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.nb*")) == kept


def test_where_no_cache_can_be_written_the_loop_is_compiled_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **_: object) -> Callable[[object], object]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(numba_kernel, "njit", njit)
    numba_kernel.Loop(lambda *values: calls.append(values))(1, 2)
    assert calls == [(1, 2)]


@pytest.mark.slow
def test_it_compiles_anew_where_no_cache_can_be_written(tmp_path: Path) -> None:
    expected = in_a_process(ROOT)
    file = tmp_path / "file"
    file.touch()
    # Folders below a file cannot be made, not even by root.
    nowhere = str(file / "cache")
    assert in_a_process(ROOT, NUMBA_CACHE_DIR=nowhere) == expected


def test_a_full_disk_costs_the_cache_and_not_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    loop = numba_kernel.Loop(lambda *values: calls.append(values))
    loop._compiled = full
    monkeypatch.setattr(numba_kernel, "njit", lambda **_: lambda function: function)
    loop(1, 2)
    assert calls == [(1, 2)]
