"""The library that kills a process at its k-th write, built where that can be."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("kill_shim.c")


def kill_shim(folder: Path) -> Path:
    """Build it in a folder; skips the test where there is no way to."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    shim = folder / "kill_shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, SOURCE], check=True)
    return shim
