"""Optional libraries: imported late, and without disturbing a recording."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.command_server import python
from support.paths import EXPERIMENTS
from workloads.libraries import library

from geomprobe.errors import UsageError


def run(code: str) -> str:
    """What code prints in a fresh Python."""
    env = {**os.environ, "PYTHONPATH": str(EXPERIMENTS)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=env)
    return done.stdout.strip()


def test_a_missing_library_is_an_error_that_names_the_extra() -> None:
    with pytest.raises(UsageError, match=r"nothing_of_the_kind is not installed: pip install 'geomprobe\[vision\]'"):
        library("nothing_of_the_kind.part", "vision")


def test_a_first_import_draws_no_random_numbers() -> None:
    code = """
import random, numpy, torch
def states():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
import workloads
before = states()
workloads.digits(train=True)
print(before == states())
"""
    assert python("-c", code, cwd=EXPERIMENTS).out == "True\n"


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = """
import sys
import workloads as w
assert "torch" not in sys.modules
for name in w.__all__:
    getattr(w, name)
print(sorted({"torchvision", "PIL", "sklearn", "scipy"} & set(sys.modules)))
"""
    assert run(code) == "[]"
