"""Reading a trace needs no torch: held in fresh processes, and so is the check itself."""

import subprocess
import sys
from pathlib import Path

from support.part_cases import write_part

import geomprobe.trace

MODULES = sorted(f"geomprobe.trace.{path.stem}" for path in Path(geomprobe.trace.__file__).parent.glob("[!_]*.py"))
WATCH = "import sys; assert 'torch' not in sys.modules, 'torch was imported'"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_no_module_of_the_trace_room_imports_torch():
    assert "geomprobe.trace.reader" in MODULES
    done = run(f"import {', '.join(MODULES)}; {WATCH}")
    assert done.returncode == 0, done.stderr


def test_opening_a_live_trace_does_not_import_torch(tmp_path):
    path = write_part(tmp_path / "p.h5")
    done = run(f"import geomprobe; trace = geomprobe.open_trace({str(path)!r}); trace['cosine']; {WATCH}")
    assert done.returncode == 0, done.stderr


def test_the_check_would_notice(tmp_path):
    (tmp_path / "torch.py").touch()
    assert (
        "torch was imported" in run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; {WATCH}").stderr
    )
