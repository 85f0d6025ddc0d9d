"""Imported last before forks: what would cost each of them half a second."""

import gc
import importlib.util

import torch

# The compiled read, which comes from numba's cache.
if importlib.util.find_spec("numba") is not None:
    from geomprobe.kernels.numba_kernel import NumbaKernel

    for dtype in (torch.float32, torch.float64):
        NumbaKernel([1], dtype, dtype, 1, torch.device("cpu"))

# What there is by now stays, and a collection that looked at it would copy its memory into each fork.
gc.collect()
gc.freeze()
