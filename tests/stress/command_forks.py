"""Run command lines of Python in forks of a process that has imported torch: a fraction of a second each.

prepare()                                                   # once, before anything uses torch
pid = begin(["-m", "geomprobe", "record", "-o", "run", "train.py"], folder, out, err)
code = ended(pid, timeout_s=60)
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import h5py

from geomprobe.cli import VERBS

# Read at start-up, so a command that lacks them would start itself again; one thread, since more do not survive a fork.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}

# What the passes import on their way; torch imports Inductor where deterministic algorithms are switched on.
IMPORTED = (
    *(f"geomprobe.cli.{verb}" for verb in VERBS),
    "geomprobe.cli.jobs",
    "geomprobe.cli.every_path",
    "geomprobe.cli.launch",
    "geomprobe.passes.api",
    "h5py._hl.dims",
    "numpy.ma",
    "torch._inductor",
    "torch.distributed.checkpoint.state_dict_saver",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.utils.data",
    "torch.utils.serialization.config",
    "stress.before_forks",
)


def prepare() -> None:
    """Import what the commands need."""
    os.environ.update(ENVIRONMENT)
    for name in IMPORTED:
        importlib.import_module(name)


def begin(
    argv: Sequence[str],
    cwd: str | Path,
    out: str | Path,
    err: str | Path,
    env: Mapping[str, str | None] | None = None,
    first: Callable[[], None] | None = None,
) -> int:
    """Start ``python`` with arguments in a fork.

    Args:
        argv: the arguments: ``-m MODULE``, ``-c CODE`` or the path of a script, and what follows it.
        cwd: the folder to run in.
        out: file for standard output.
        err: file for standard error.
        env: environment variables to set, or to remove where None.
        first: called in the fork, before the command.

    Returns:
        The number of its process.
    """
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try:
            _become(cwd, out, err, env or {})
            if first is not None:
                first()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        _leave(argv)
    return pid


def ended(pid: int, timeout_s: float) -> int | None:
    """The exit code of a fork, negative where a signal killed it; None where it took too long and had to be killed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become(cwd: str | Path, out: str | Path, err: str | Path, env: Mapping[str, str | None]) -> None:
    """Make this process look like one that was started for the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate((os.devnull, out, err)):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _leave(argv: Sequence[str]) -> None:
    """Run a command line and exit as it says, with what Python, C and HDF5 do at exit.

    Only taking torch apart is left out, its modules and its libraries, which takes a second.
    """
    code: int | str | None = 0
    try:
        _run(*argv)
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(h5py.h5.__file__).H5close()
    ctypes.CDLL(None).fflush(None)
    os._exit(code or 0)


def _run(first: str, *rest: str) -> None:
    """Do what ``python FIRST REST`` does, in a ``__main__`` of its own."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-c":
        code, *arguments = rest
        sys.argv, sys.path[0] = ["-c", *arguments], ""
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        module, *arguments = rest
        sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
