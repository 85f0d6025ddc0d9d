"""One training of the papers: its command lines, its folder, and making it by recording and replaying."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import geomprobe
from geomprobe.errors import GeomprobeError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
"""The training scripts."""

Option = str | int | float | bool


DATA = {
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
    "wikitext2": "WikiText-2",
    "vaihingen": "Vaihingen",
    "stdlib": "Python's library",
}


class RunFailed(GeomprobeError):
    """A training could not be recorded, or its replay is not certified."""


@dataclass(frozen=True)
class Run:
    """A training script with its arguments: two that are equal share one folder, and are made once.

    Attributes:
        script: its file, in this repository's ``scripts/examples``.
        options: its options, by their names with underscores; True and False stand for ``--x`` and ``--no-x``.
        seed: of the recording.
        reference_steps: steps before which the weights are kept as further references.
        hg: whether the replay takes Hg, which costs as much as the rest of it or more.
    """

    script: str
    options: Mapping[str, Option]
    seed: int = 0
    reference_steps: tuple[int, ...] = ()
    hg: bool = False

    @property
    def arguments(self) -> list[str]:
        """The options as they are typed.

        >>> Run("train.py", {"batch_size": 64, "augment": False}).arguments
        ['--batch-size', '64', '--no-augment']
        """
        words = []
        for name, value in self.options.items():
            dashed = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{dashed}")
            else:
                words += [f"--{dashed}", str(value)]
        return words

    @property
    def data_set(self) -> str:
        """The data set's name.

        >>> Run("language.py", {}).data_set
        'WikiText-2'
        """
        default = {"language.py": "wikitext2", "segmentation.py": "vaihingen"}.get(self.script, "")
        given = self.options.get("dataset", self.options.get("corpus", default))
        return DATA.get(str(given), str(given))

    @property
    def name(self) -> str:
        """The folder's name: what is trained, and a digest of all that the run depends on."""
        facts = [self.script, self.arguments, self.seed, self.reference_steps, self.hg]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        chosen = [self.options[key] for key in ("model", "optimizer") if key in self.options]
        return "-".join([Path(self.script).stem, *map(str, chosen), digest])

    def commands(self, folder: Path) -> list[list[str]]:
        """The two passes' command lines; both continue where they were stopped."""
        geomprobe_command = [sys.executable, "-m", "geomprobe"]
        record = ["record", "-o", str(folder), "--resume", "--seed", str(self.seed)]
        if self.reference_steps:
            record += ["--reference-steps", ",".join(map(str, self.reference_steps))]
        replay = ["replay", str(folder), "--resume", *([] if self.hg else ["--no-curvature"])]
        script = [str(EXAMPLES / self.script), *self.arguments]
        return [[*geomprobe_command, *record, *script], [*geomprobe_command, *replay]]


def log_of(folder: Path) -> Path:
    """The file of what a run's script prints."""
    return folder.with_name(f"{folder.name}.log")


def certified(folder: Path) -> bool:
    """Whether a run is complete: sealed, and proven to be the recorded one.

    >>> certified(Path("no-such-run"))
    False
    """
    sealed = (folder / "trace.h5").exists() and not (folder / "stream").exists()
    return sealed and geomprobe.open_trace(folder).status == "complete"


def make(run: Run, root: Path, environment: Mapping[str, str]) -> Path:
    """The folder of a certified run under ``root``: recorded and replayed, or what is left of either.

    Raises:
        RunFailed: a pass ended with an error, which it has printed, or without a certificate.
    """
    folder = root / run.name
    if certified(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    surroundings = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    for command in run.commands(folder):
        with log_of(folder).open("a") as log:
            code = subprocess.run(command, env=surroundings, stdout=log, check=False).returncode
        if code:
            raise RunFailed(
                f"{folder}: geomprobe {command[3]} of {run.script} {' '.join(run.arguments)} ended with exit code "
                f"{code}; its messages are above. The same command continues from what there is."
            )
    if not certified(folder):
        status = geomprobe.open_trace(folder).status
        raise RunFailed(f"{folder}: its replay is not certified but {status}; see geomprobe inspect {folder}")
    return folder


def make_all(runs: Iterable[Run], root: Path, environment: Mapping[str, str], jobs: int) -> dict[str, Path]:
    """The folders of certified runs by their names, made ``jobs`` at a time, each once.

    Raises:
        RunFailed: the first that failed; those that run beside it are let finish, others are not begun.
    """
    wanted = {run.name: run for run in runs}
    failed = Event()

    def unless_failed(run: Run) -> Path:
        if failed.is_set():  # the pool begins the next one before the failure of the last is seen below
            return root / run.name
        try:
            return make(run, root, environment)
        except RunFailed:
            failed.set()
            raise

    pool = ThreadPoolExecutor(jobs)
    try:
        return dict(zip(wanted, pool.map(unless_failed, wanted.values()), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
