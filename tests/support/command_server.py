"""Runs command lines in forks of one process that has imported torch: a fraction of a second each.

result = run("record", "-o", "run", "train.py", cwd=folder)     # geomprobe's; waits: exit code, output, errors
command = start("replay", "run", cwd=folder)                    # does not wait: it has a pid to kill
result = command.wait()
result = python("-c", "import torch; print(torch.ones(1))", cwd=folder)

A test takes a fresh Python only where the start itself, what is imported or the end of the interpreter counts.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import json
import os
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """How a command ended; ``code`` is negative where a signal killed it, and None where it had to be."""

    code: int | None
    out: str
    err: str


class Command:
    """A command line of Python that runs in a fork of the server; ``err``: a terminal to write errors to."""

    def __init__(self, server, argv, cwd, env=None, kill_at=0, err=None):
        self._server = server
        self._folder = Path(tempfile.mkdtemp())
        out, own_err = (self._folder / name for name in ("out", "err"))
        own_err.touch()
        arguments = [str(argument) for argument in argv]
        request = {"argv": arguments, "cwd": str(cwd), "env": env or {}, "out": str(out)}
        self.err = Path(err or own_err)
        self.pid = server.ask({**request, "err": str(self.err), "kill_at": kill_at})

    def wait(self, timeout_s=TIMEOUT_S):
        """The result; a command that takes longer than ``timeout_s`` is killed, and has no exit code."""
        code = self._server.ask({"wait": self.pid, "timeout_s": timeout_s})
        out, err = ((self._folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self._folder)
        return Result(code, out, err)


class Server:
    """The process that forks, and the pipe to it.

    Args:
        preload: a library to load into it, such as the one that `arm` wants.
    """

    def __init__(self, preload=None):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        if preload is not None:
            env["LD_PRELOAD"] = str(preload)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env)

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
    return Command(server(), ["-m", "geomprobe", *argv], cwd, env)


def run(*argv, cwd, env=None):
    """Run ``geomprobe`` with arguments to its end."""
    return start(*argv, cwd=cwd, env=env).wait()


def python(*argv, cwd=".", env=None, timeout_s=TIMEOUT_S):
    """Run ``python`` with arguments to its end."""
    return Command(server(), argv, Path(cwd).resolve(), env).wait(timeout_s)


# What a shell finds as `python` or `geomprobe`. Its output goes where this process's own would.
_SHIM = """#!{python} -IS
import json, os, socket, sys
out, err = (f"/proc/{{os.getpid()}}/fd/{{number}}" for number in (1, 2))
request = {{"argv": {words} + sys.argv[1:], "cwd": os.getcwd(), "env": {{}}, "out": out, "err": err, "kill_at": 0}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    connection.sendall(json.dumps(request).encode() + b"\\n")
    sys.exit(json.loads(connection.makefile().readline()))
"""


class _ForShims(socketserver.StreamRequestHandler):
    def handle(self):
        pid = server().ask(json.loads(self.rfile.readline()))
        code = server().ask({"wait": pid, "timeout_s": TIMEOUT_S})
        self.wfile.write(f"{1 if code is None else code}\n".encode())


@contextlib.contextmanager
def shims():
    """A folder with a `python` and a `geomprobe` for the PATH of a shell, which run in forks of the server."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        for name, words in (("python", []), ("geomprobe", ["-m", "geomprobe"])):
            shim = Path(folder) / name
            shim.write_text(_SHIM.format(python=sys.executable, words=words, address=address))
            shim.chmod(0o755)
        with socketserver.UnixStreamServer(address, _ForShims) as listening:
            thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield folder
            finally:
                listening.shutdown()
                thread.join()


def serve():
    """Answer requests until standard input ends."""
    forks = importlib.import_module("stress.command_forks")
    forks.prepare()
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = forks.ended(request["wait"], request["timeout_s"])
        else:
            kill_at = request.pop("kill_at")
            answer = forks.begin(**request, first=functools.partial(arm, kill_at) if kill_at else None)
        print(json.dumps(answer), file=answers, flush=True)


def arm(kill_at):
    """Let the preloaded library kill this process at its k-th write, or else say how many it made."""
    library = ctypes.CDLL(None)
    library.kill_at_write(ctypes.c_long(kill_at), 0)
    atexit.register(lambda: print(library.writes_seen(), "writes", file=sys.stderr))


if __name__ == "__main__":
    serve()
