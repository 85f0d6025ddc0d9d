"""The folders of a run whose optimizers' paths are measured one by one: ``RUN/optimizers/NAME``, each a run."""

from __future__ import annotations

import os
from pathlib import Path

from geomprobe.errors import RunError
from geomprobe.trace.schema import RECORD_FILE

OPTIMIZERS_DIR = "optimizers"


def path_folders(run: str | os.PathLike[str]) -> dict[str, Path]:
    """The run folders of a run's paths, by name; none where it is a run of one path.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> (run / "optimizers" / "Critic").mkdir(parents=True)
    >>> list(path_folders(run))
    ['Critic']
    """
    folder = Path(run) / OPTIMIZERS_DIR
    if (Path(run) / RECORD_FILE).exists() or folder.is_symlink() or not folder.is_dir():
        return {}
    return {each.name: each for each in sorted(folder.iterdir()) if each.is_dir() and not each.is_symlink()}


def path_folder(run: str | os.PathLike[str], name: str) -> Path:
    """The run folder of one path.

    Raises:
        RunError: there is none of that name.
    """
    folders = path_folders(run)
    if name not in folders:
        there = ", ".join(folders) or "no paths of its own: leave the optimizer out"
        raise RunError(f"{os.fspath(run)} has no path {name!r}; it has {there}")
    return folders[name]
