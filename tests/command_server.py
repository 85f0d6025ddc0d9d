"""Runs geomprobe's command lines in forks of one process that has imported torch: a fraction of a second each.

result = run("record", "-o", "run", "train.py", cwd=folder)     # waits: exit code, output, errors
command = start("replay", "run", cwd=folder)                    # does not: it has a pid to kill
result = command.wait()
"""

import atexit
import ctypes
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60

# What the passes import on their way; torch imports Inductor where deterministic algorithms are switched on.
IMPORTED = (
    "geomprobe.cli.record",
    "geomprobe.cli.replay",
    "geomprobe.cli.inspect",
    "geomprobe.cli.launch",
    "geomprobe.passes",
    "numpy.ma",
    "torch._inductor",
    "torch.distributed.checkpoint.state_dict_saver",
)


@dataclass(frozen=True)
class Result:
    """How a command ended; ``code`` is negative where a signal killed it, and None where it had to be."""

    code: int | None
    out: str
    err: str


class Command:
    """A command line that runs in a fork of the server."""

    def __init__(self, server, argv, cwd, env):
        self._server = server
        self._folder = Path(tempfile.mkdtemp())
        out, err = (str(self._folder / name) for name in ("out", "err"))
        arguments = [str(argument) for argument in argv]
        request = {"argv": arguments, "cwd": str(cwd), "env": env or {}, "out": out, "err": err}
        self.pid = server.ask(request)

    def wait(self, timeout_s=TIMEOUT_S):
        """The result; a command that takes longer than ``timeout_s`` is killed, and has no exit code."""
        code = self._server.ask({"wait": self.pid, "timeout_s": timeout_s})
        out, err = ((self._folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self._folder)
        return Result(code, out, err)


class Server:
    """The process that forks, and the pipe to it."""

    def __init__(self):
        package = Path(__file__).parents[1]
        env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        env |= {
            "PYTHONHASHSEED": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }  # so that no command restarts itself
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env
        )

    def ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@functools.cache
def server():
    started = Server()
    atexit.register(started.close)
    return started


def start(*argv, cwd, env=None):
    """Start ``geomprobe`` with arguments; returns at once."""
    return Command(server(), argv, cwd, env)


def run(*argv, cwd, env=None):
    """Run ``geomprobe`` with arguments to its end."""
    return start(*argv, cwd=cwd, env=env).wait()


def serve():
    """Answer requests until standard input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    main = importlib.import_module("geomprobe.cli").main
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["timeout_s"])
        elif (answer := os.fork()) == 0:
            become(request)
            leave(main, request["argv"])
        print(json.dumps(answer), file=answers, flush=True)


def become(request):
    """Make this process look like one that was started for the request."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate((os.devnull, request["out"], request["err"])):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])


def leave(main, argv):
    """Run a command and exit as it says, with what Python and C libraries do at exit, such as HDF5.

    Only taking torch's modules apart is left out, which takes a second.
    """
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(code or 0)


def wait(pid, timeout_s):
    """The exit code of a fork, None if it had to be killed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    serve()
