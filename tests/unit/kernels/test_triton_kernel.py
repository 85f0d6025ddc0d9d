"""The CUDA kernel: in Triton's interpreter on a CPU, compiled ahead for two GPUs, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT
from support.reads import DTYPES, SHAPES, assert_read, normal

from geomprobe.kernels.fused_read import FusedRead

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = """
import torch
from support.reads import SHAPES, assert_read, normal
from geomprobe.kernels.fused_read import FusedRead

shapes = SHAPES[:{last}]
for dtype, star_dtype in {pairs}:
    w, g, a, b = (normal(shapes, kind, seed) for seed, kind in enumerate([dtype, dtype, star_dtype, star_dtype]))
    gradients = [None if i == 5 else x for i, x in enumerate(g)]
    fused = FusedRead(w, {{"final": a, "b": b}}, per_parameter=True, backend="triton")
    reading, numba = fused.read(gradients), FusedRead(w, backend="numba").read(gradients)
    assert_read(reading, w, gradients, a, b)
    assert torch.equal(reading.weights, numba.weights)
    assert torch.equal(reading.gradients, numba.gradients)
    again = fused.read([None if x is None else x.clone() for x in gradients])
    assert torch.equal(again.sums, reading.sums)
    without = fused.read(gradients, sums=False)
    assert torch.equal(without.gradients, reading.gradients)
    torch.testing.assert_close(without.norms, reading.norms, rtol=1e-13, atol=0)
    g[-1][-1] = torch.nan
    assert fused.read(g).sums[-1].isnan().tolist() == [True, True, False] + 2 * [True, False, False]
print("read")
"""


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("dtype", "last"),
    [(torch.bfloat16, 7), *(pytest.param(dtype, None, marks=pytest.mark.slow) for dtype in DTYPES)],
    ids=str,
)
def test_the_interpreter_reads_what_the_other_backends_read(dtype: torch.dtype, last: int | None) -> None:
    pairs = [(dtype, dtype), (dtype, torch.float32)] if dtype is torch.bfloat16 else [(dtype, dtype)]
    if last is not None:
        pairs = pairs[1:]
    assert run(INTERPRETED.format(pairs=pairs, last=last), TRITON_INTERPRET="1") == "read\n"


COMPILED = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from geomprobe.kernels import triton_kernel as kernel

def compiled(function, pointers, constants, **options):
    types = {{**pointers, **dict.fromkeys(constants, "constexpr")}}
    values = {{(function.arg_names.index(name),): value for name, value in constants.items()}}
    target = GPUTarget("cuda", {capability}, 32)
    return triton.compile(ASTSource(function, types, values), target=target, options=options).asm

integers = dict.fromkeys(["table", "chunks", "marks", "digests", "columns"], "*i64")
for dtype, star_dtype in [(tl.float32, tl.float32), (tl.bfloat16, tl.float32), (tl.float64, tl.float64)]:
    constants = {{"TYPE": dtype, "STAR_TYPE": star_dtype, "SIZE": dtype.primitive_bitwidth // 8}}
    constants |= {{"CHUNK": kernel.CHUNK, "STEP": kernel.STEP, "WIDTH": kernel.WIDTH}}
    for references in (0, 2):
        constants["REFERENCES"] = references
        asm = compiled(kernel._read, {{**integers, "parts": "*fp64"}}, constants, num_warps=8)
        assert asm["cubin"] and ".target sm_{capability}" in asm["ptx"]
integers = dict.fromkeys(["bounds", "marks", "digests", "columns", "found"], "*i64")
constants = {{"PRODUCTS": 9, "LANES": 256, "WIDTH": kernel.WIDTH}}
asm = compiled(kernel._add, {{**integers, "parts": "*fp64", "products": "*fp64"}}, constants)
assert asm["cubin"]
print("compiled")
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_it_compiles_without_a_device(capability: int) -> None:
    if sys.platform != "linux":
        pytest.skip("Triton compiles for CUDA on Linux")
    assert run(COMPILED.format(capability=capability)) == "compiled\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_reads_what_the_cpu_reads_and_never_waits(dtype: torch.dtype) -> None:
    w, g, star = ([x.cuda() for x in normal(SHAPES, dtype, seed)] for seed in range(3))
    fused = FusedRead(w, {"final": star}, per_parameter=True)
    assert fused.backend == "triton"
    fused.read(g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        reading = fused.read([x.clone() for x in g])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu = [[x.cpu() for x in tensors] for tensors in (w, g, star)]
    assert_read(reading, *cpu)
