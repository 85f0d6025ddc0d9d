"""Run a user's script or module inside a pass, as Python itself would."""

from __future__ import annotations

import argparse
import hashlib
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from geomprobe.errors import GeomprobeError, UsageError
from geomprobe.trace.json_values import require_entries
from geomprobe.trace.printable import printable, show
from geomprobe.trace.schema import RECORD_FILE, STREAM_DIR

# Read by Python and cuBLAS at start-up only.
START_UP = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class ScriptFailed(GeomprobeError):
    """The user's script raised, or exited with a code other than 0."""


def described(script: str, argv: Sequence[str], *, module: bool, cwd: Path | None = None) -> dict[str, Any]:
    """What is run, for the manifest: kind, absolute path (or module name), arguments, folder and digest.

    ``script`` is a path or the name of a ``module``; it runs in ``cwd``, by default the present folder.

    Raises:
        UsageError: the script or module does not exist.
    """
    cwd = Path.cwd() if cwd is None else cwd
    path = _module_file(script, cwd) if module else (cwd / script).resolve()
    if path is None or not path.is_file():
        raise UsageError(f"{script}: there is no such {'module' if module else 'script'} in {cwd}.")
    return {
        "kind": "module" if module else "script",
        "path": script if module else str(path),
        "argv": list(argv),
        "cwd": str(cwd),
        "root": str(cwd if module else path.parent),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def present(script: Mapping[str, Any], run: str) -> dict[str, Any]:
    """A recorded script as it is now.

    Raises:
        UsageError: it is a Python function, or its folder is gone.
    """
    require_entries({"script": script}, ["script.kind", "script.path"], run)
    if script["kind"] == "function":
        raise UsageError(
            f"{run} was recorded by geomprobe.record({script['path']}, ...) in Python, so there is no script to "
            "run. Replay it in Python too: geomprobe.replay(train, ...)."
        )
    require_entries({"script": script}, ["script.cwd", "script.argv"], run)
    if any("\0" in word for word in (script["path"], script["cwd"], *script["argv"])):
        raise UsageError(f"{run} names a script that no command line can name; nothing was replayed.")
    cwd = Path(script["cwd"])
    if not cwd.is_dir():
        raise UsageError(f"{run} was recorded in {cwd}, which is gone. Restore it; nothing was replayed.")
    return described(script["path"], script["argv"], module=script["kind"] == "module", cwd=cwd)


def require_trust(run: str | os.PathLike[str], trust: bool) -> None:
    """Refuse to run what a folder of another user names, unless the command says that she is trusted.

    Root can run anything as you by itself, so what is root's is trusted.

    Raises:
        UsageError: the folder, or a file in it that names the script, is another user's.
    """
    folder = Path(run)
    for path in (folder, folder / RECORD_FILE, folder / STREAM_DIR, *(folder / STREAM_DIR).glob("*")):
        try:
            owner = path.lstat().st_uid
        except OSError:  # it is not there
            continue
        if owner not in (os.geteuid(), 0) and not trust:
            raise UsageError(
                f"{path} belongs to another user (number {owner}), and this command would run, as you, the script that "
                f"the folder names. `geomprobe inspect {folder}` shows which. If you trust its owner, add --trust."
            )


def announce(verb: str, script: Mapping[str, Any]) -> None:
    """Say on standard error which command is about to be run, since a folder may name any."""
    flag = ["-m"] if script["kind"] == "module" else []
    words = shlex.join(["python", *flag, script["path"], *script["argv"]])
    if first_rank():
        show(f"geomprobe {verb}: runs, in {printable(script['cwd'])}: {printable(words)}", file=sys.stderr)


def _module_file(name: str, cwd: Path) -> Path | None:
    """The file that ``python -m name`` runs, found without importing the packages that it lies in."""
    where: Sequence[str] | None = [str(cwd), *sys.path]
    for end in (*(i for i, letter in enumerate(name) if letter == "."), len(name)):
        spec = PathFinder.find_spec(name[:end], where) if where is not None else None
        if spec is None:
            return None
        where = spec.submodule_search_locations
    if where is not None:
        return _module_file(f"{name}.__main__", cwd)
    return Path(spec.origin) if spec is not None and spec.origin else None


def runner(script: Mapping[str, Any]) -> Callable[[], None]:
    """A function that runs what `described` describes, as ``__main__``, in its folder.

    Raises (when called):
        ScriptFailed: the script raised, which has been shown, or exited with another code than 0.
        GeomprobeError: whatever a pass raises inside the script.
    """

    def run() -> None:
        os.chdir(script["cwd"])
        sys.argv = [script["path"], *script["argv"]]
        sys.path[0:0] = [script["root"]]
        try:
            if script["kind"] == "module":
                runpy.run_module(script["path"], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script["path"], run_name="__main__")
        except GeomprobeError:
            raise
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise ScriptFailed(f"{script['path']} exited with {stop.code!r}.") from stop
        except Exception as error:
            _show(error)
            raise ScriptFailed(f"{script['path']} raised {type(error).__name__}: {error}") from error

    return run


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """Help that shows the name of an argument that takes the rest of the line, where argparse shows only dots."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.REMAINDER:
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


def add_trust(parser: Any) -> None:
    """Declare the option by which another user's folder is trusted."""
    parser.add_argument("--trust", action="store_true", help="run the script that another user's run folder names")


def first_rank() -> bool:
    """Whether this is the process that reports, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def restart_with(variables: Mapping[str, str]) -> None:
    """Start this very command again with ``variables`` set, where one of them is not set yet.

    Some settings act only before Python and the libraries start. A variable that is set to something else
    is left as the user wants it.
    """
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    if missing:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})


def _show(error: Exception) -> None:
    """The script's own traceback, without the frames of the launcher above it."""
    frame = error.__traceback__
    own = (__file__, runpy.__file__, "<frozen runpy>")
    while frame is not None and frame.tb_next and frame.tb_frame.f_code.co_filename in own:
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame)
