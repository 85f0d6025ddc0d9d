"""The run directory: which files a run has, who may write them, and what is left when a pass is over."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from geomprobe.errors import UsageError
from geomprobe.trace.regular_file import require_own_folder
from geomprobe.trace.run_lock import locked
from geomprobe.trace.schema import RECORD_FILE, STREAM_DIR, TRACE_FILE, Kind, reference_file

CHECKPOINTS_DIR = "checkpoints"
LOCK = "lock"
PROOF_PREFIX = "proof-"
RANK_PREFIX = "rank-"


class RunFolder:
    """Paths of one run and the lock that keeps a second writer out.

    >>> RunFolder("runs/a").trace.name
    'trace.h5'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # a script may change the working directory
        self.record = self.path / RECORD_FILE
        self.trace = self.path / TRACE_FILE
        self.stream = self.path / STREAM_DIR
        self.checkpoints = self.path / CHECKPOINTS_DIR

    @contextlib.contextmanager
    def recording(self, force: bool) -> Iterator[None]:
        """Hold the run for a new recording; with ``force`` an earlier one is removed first.

        Raises:
            UsageError: the folder holds something already and ``force`` is not set.
            RunError: another process is writing there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; name a folder to record into.")
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if occupied and not force:
            raise UsageError(
                f"{self.path} exists and is not empty: nothing was recorded. Choose another folder, or pass "
                "--resume to go on with a recording that was cut off, or --force to replace it."
            )
        if occupied and not self._is_run():
            raise UsageError(f"{self.path} is no run of geomprobe: --force will not empty it. Choose another.")
        with self.writing():
            if not force and (self.record.exists() or self._parts()):  # another was faster
                raise UsageError(f"{self.path} has just been recorded by another process. Choose another folder.")
            self._remove(self.trace, self.record, self.checkpoints, *self._left_over())
            with self._dropped_if_empty():
                yield

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Hold the run to go on with a pass that was cut off; what ended without holding is put away.

        Raises:
            UsageError: the folder holds something that is no run.
            RunError: another process is writing there.
        """
        if self.path.exists() and any(self.path.iterdir()) and not self._is_run():
            raise UsageError(f"{self.path} is no run of geomprobe, so there is nothing to go on with.")
        with self.writing(), self._dropped_if_empty():
            self._remove(*self.path.glob(".*.h5.new"), *self.checkpoints.rglob("*.part"))
            yield

    @contextlib.contextmanager
    def replaying(self, force: bool) -> Iterator[None]:
        """Hold the run for a replay; with ``force`` an earlier trace is removed first.

        Raises:
            UsageError: there is a trace already and ``force`` is not set.
            RunError: another process is writing there.
        """
        earlier = [path for path in (self.trace, *self._parts("trace-")) if path.exists()]
        if earlier and not force:
            raise UsageError(
                f"{earlier[0]} exists: nothing was replayed. `geomprobe inspect {self.path}` shows what is in "
                "it; pass --resume to go on with a replay that was cut off, or --force to replace it."
            )
        with self.writing():
            self._remove(self.trace, *self._left_over())
            yield

    @contextlib.contextmanager
    def segment(self, first_step: int) -> Iterator[None]:
        """Hold one segment of a replay, beside others that hold theirs.

        Raises:
            RunError: another process is writing this segment, or all of the run.
        """
        with self.writing(shared=True), self._held(f"{LOCK}-{first_step:08d}", fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield

    @contextlib.contextmanager
    def sealing(self) -> Iterator[None]:
        """Wait until no other process asks whether all segments are there."""
        with self._held(f"{LOCK}-sealing", fcntl.LOCK_EX):
            yield

    def of_rank(self, rank: int) -> RunFolder:
        """The run as one of several processes writes it: each has folders of its own in those of rank 0."""
        if rank == 0:
            return self
        own, folder = RunFolder(self.path), f"{RANK_PREFIX}{rank:04d}"
        own.stream, own.checkpoints = self.stream / folder, self.checkpoints / folder
        return own

    def part(self, kind: Kind, first_step: int) -> Path:
        """Where a pass streams its rows from ``first_step`` on."""
        return self.stream / f"{kind}-{first_step:08d}.h5"

    def parts(self, kind: Kind) -> list[Path]:
        """The parts that a pass has begun, by first step."""
        named = re.compile(rf"{kind}-[0-9]{{8,16}}\.h5")
        return sorted(path for path in self.stream.glob("*.h5") if named.fullmatch(path.name))

    def proof(self, kind: Kind, step: int) -> Path:
        """What a process leaves that found the state before ``step``, in which it ended, to be the recorded one."""
        return self.stream / f"{PROOF_PREFIX}{kind}-{step:08d}.json"

    def stored_reference(self, name: str) -> Path:
        """Where recording keeps a reference until it is sealed."""
        return self.stream / reference_file(name)

    def clear_stream(self) -> None:
        """Remove what has been sealed."""
        self._remove(*self._parts())

    def _is_run(self) -> bool:
        own = [self.record, self.trace, self.stream / LOCK]
        return any(path.exists() for path in own) or bool(self._parts("record-") + self._parts("trace-"))

    def _parts(self, prefix: str = "") -> list[Path]:
        return sorted(p for p in self.stream.glob(f"{prefix}*") if not p.name.startswith(LOCK))

    def _left_over(self) -> list[Path]:
        """Parts, and files written aside, of a pass that was killed, even after it had sealed them."""
        return [*self._parts(), *self.path.glob(".*.h5.new")]

    @staticmethod
    def _remove(*paths: Path) -> None:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, shared: bool = False) -> Iterator[None]:
        """Lock the run, with whatever is in it, so that no other process writes there.

        Args:
            shared: let others that hold it so in.

        Raises:
            RunError: another process is writing there.
        """
        require_own_folder(self.checkpoints)
        with self._held(LOCK, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
            yield

    @contextlib.contextmanager
    def _dropped_if_empty(self) -> Iterator[None]:
        try:
            yield
        finally:
            if not self.record.exists() and not self._parts():  # the script never took a step
                self._remove(self.checkpoints)

    def _held(self, name: str, how: int) -> contextlib.AbstractContextManager[None]:
        return locked(self.stream / name, how, self.path)
