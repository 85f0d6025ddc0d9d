"""Record and replay every path of a script whose optimizers train different models: a pass for each of them.

A pass measures one path. So each path has a run folder of its own in ``RUN/optimizers``, which holds just what
``record --optimizer`` of that path alone gives. The first recording finds out which optimizers step. All have one seed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from geomprobe.errors import RunError, UsageError
from geomprobe.passes.options import ALL, FIRST, RecordOptions, ReplayOptions, require_same_options
from geomprobe.trace.path_folders import OPTIMIZERS_DIR, path_folders
from geomprobe.trace.printable import show
from geomprobe.trace.record import open_record
from geomprobe.trace.run_folder import RunFolder

_UNNAMED = "being-recorded"  # no class has that name
_MOST = 32


def record(folder: Path, options: RecordOptions, command: Sequence[str]) -> int:
    """Record the path of each optimizer that steps, and give the exit code of the first recording that fails, or 0.

    ``command`` is the script with its arguments, or ``-m`` and a module with its own.

    Raises:
        UsageError: the folder holds something, or the run is of several processes.
        RunError: an optimizer steps that cannot be chosen.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(f"--optimizer {ALL} is of one process: give each path a launch and a folder of its own.")
    _require_free(folder, options)
    if options.force:
        for each in path_folders(folder).values():
            with RunFolder(each).recording(force=True):  # which empties runs, and nothing else
                pass
            each.rmdir()
    while (number := _next(folder)) is not None:
        recorded = {path.name: path for path in path_folders(folder).values() if path.name != _UNNAMED}
        own = folder / OPTIMIZERS_DIR / _UNNAMED
        begun = [_manifest(path) for path in recorded.values()][:1]
        seed = begun[0]["seed"] if begun else options.seed
        chosen = replace(options, optimizer=number, seed=seed, force=False)
        for then in begun:
            same = replace(chosen, optimizer=then["recording"]["optimizer"])
            require_same_options(f"{folder} was recorded", {**then, **then["recording"]}, same.asked())
        arguments = ["record", "-o", str(own), *chosen.argv(), *command]
        if code := _run(arguments):
            return code
        manifest = _manifest(own)
        if begun and manifest["script"] != begun[0]["script"]:
            raise RunError(f"{own} is of another script than the other paths in {folder}: start over with --force")
        name = re.sub(r"\W", "_", manifest["paths"]["name"])
        named = own.rename(own.with_name(f"{name}-{number}" if name in recorded else name))
        show(f"It is the path of {named.name}, and its folder is now {named}.")
    names = list(path_folders(folder))
    show(f"Wrote {folder}/{OPTIMIZERS_DIR}: {len(names)} paths, each a run by itself: {', '.join(names)}.")
    show(f"Next: geomprobe replay {folder}", file=sys.stderr)
    return 0


def replay(folder: Path, options: ReplayOptions, further: Sequence[str]) -> int:
    """Replay each path, and give the exit code of the first replay that fails, or 0.

    ``further`` are arguments of the command, beside the options, that each of them gets.
    """
    for each in path_folders(folder).values():
        if code := _run(["replay", str(each), *options.argv(), *further]):
            return code
    return 0


def _require_free(folder: Path, options: RecordOptions) -> None:
    found = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    if folder.exists() and (not folder.is_dir() or set(found) - {OPTIMIZERS_DIR}):
        raise UsageError(f"{folder} holds something else than paths: nothing was recorded. Choose another folder.")
    if found and not (options.force or options.resume):
        raise UsageError(
            f"{folder} exists and is not empty: nothing was recorded. Choose another folder, or pass --resume to go on "
            "with a recording that was cut off, or --force to replace it."
        )


def _next(folder: Path) -> str | None:
    """Which path to record next; None where all are."""
    done = [_manifest(path)["paths"] for path in path_folders(folder).values() if path.name != _UNNAMED]
    if not done:
        return FIRST
    measured = {number for each in done for number in each["measured"]}
    left = [number for each in done for number in each["stepped"] if number not in measured]
    if len(left) > _MOST:
        raise RunError(
            f"{folder}: {len(left)} or more optimizers step beside that of {OPTIMIZERS_DIR}/{done[0]['name']}, as "
            "where a script makes one in each of its steps. Record the paths that you want by --optimizer NAME."
        )
    if -1 in left:
        raise RunError(
            f"{folder}: an optimizer steps that was copied from another, so it has no number to choose it by. Make it "
            "by its class, or call geomprobe.attach(model, optimizer) on the one to measure."
        )
    return str(left[0]) if left else None


def _manifest(path: Path) -> dict[str, Any]:
    with open_record(path) as recorded:
        if recorded.status != "complete" or "stepped" not in recorded.manifest.get("paths", {}):
            raise RunError(f"{path} is no recording of one of several paths. Remove it, or start over with --force")
        return recorded.manifest


def _run(arguments: Sequence[str]) -> int:
    """Run a command of geomprobe to its end, and give its exit code; SIGTERM is passed on to it."""
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    sys.stdout.flush()
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        started.append(subprocess.Popen([sys.executable, "-m", "geomprobe", *arguments]))
        return started[0].wait()
    finally:
        for process in started:
            process.wait()  # an interrupt in a terminal reaches it by itself
        signal.signal(signal.SIGTERM, before)
