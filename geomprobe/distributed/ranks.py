"""The processes of one launch, seen from one of them: who it is, what they publish, and what stops them all.

They exchange small values through the key-value store that ``torchrun`` (or ``MASTER_ADDR`` and ``MASTER_PORT``) gives
them. It is there before the script makes its process group and after it has destroyed it, and no training step waits
for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from geomprobe.distributed.progress import ProgressMarker
from geomprobe.distributed.watchdog import BEAT_S, Failure, Watchdog, holds_store
from geomprobe.errors import GeomprobeError, ReplayDiverged, RunError, Stopped, UsageError

PATIENCE_S = 1800.0  # as gloo's own; how long one process waits for another
_ASK_S = 0.02

_passes = 0  # of this process; every process of a launch goes through the same ones


class ElsewhereStopped(GeomprobeError):
    """Another process of the run has failed or is gone, and this one stops with it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Ranks:
    """The processes of a launch, seen from one of them; `here` makes it, once a pass.

    Values that are exchanged are JSON. A key is used once a pass, but for what `publish` replaces.
    What waits for another process raises `ElsewhereStopped` if one fails meanwhile.

    Attributes:
        rank: this process's number.
        size: how many there are.
        first: whether this is the process that writes what is written once.
        alone: whether it is the only one.
        progress: where this process's training stands, for the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, patience: float = PATIENCE_S) -> None:
        self.rank, self.size = rank, size
        self.first, self.alone = rank == 0, size == 1
        self.progress = ProgressMarker()
        self._store, self._patience = store, patience
        self._own: dict[str, Any] = {}  # what this process has published
        self._flags: dict[str, bool] = {}  # those that this process has asked for or set
        self._watchdog: Watchdog | None = None

    def described(self) -> dict[str, Any]:
        """For the manifest: nothing where there is one process."""
        return {} if self.alone else {"ranks": {"world_size": self.size}}

    def require_all(self, world_size: int) -> None:
        """Refuse a process group of the script that is larger than the launch.

        Raises:
            UsageError: it is.
        """
        if world_size > self.size:
            raise UsageError(
                f"the script has made a group of {world_size} processes, and geomprobe was started in each of them by "
                "itself. Start them together: torchrun --nproc-per-node N -m geomprobe record ..."
            )

    # What the processes exchange

    def broadcast(self, key: str, value: Any = None) -> Any:
        """Rank 0's value, on every rank; the others wait for it."""
        if self.first:
            self.publish(key, value)
            return value
        return self._value_of(0, key)

    def all_gather(self, key: str, value: Any) -> list[Any]:
        """Every rank's value, by rank; waits for all of them."""
        self.publish(key, value)
        return [value if rank == self.rank else self._value_of(rank, key) for rank in range(self.size)]

    def publish(self, key: str, value: Any) -> None:
        """Let the others read a value of this rank's, in the place of an earlier one, without waiting for them."""
        self._own[key] = value
        if not self.alone:
            self._store.set(f"{key}/{self.rank}", json.dumps(value))

    def published(self, key: str) -> dict[int, Any]:
        """What the ranks have published so far, by rank; those that have not yet are missing."""
        found = {self.rank: self._own[key]} if key in self._own else {}
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"{key}/{rank}"]):
                found[rank] = json.loads(self._store.get(f"{key}/{rank}"))
        return found

    def set_flag(self, key: str) -> None:
        """Raise a flag, which every process sees from its next beat on, within seconds."""
        self._flags[key] = True
        if not self.alone:
            self._store.set(f"flag/{key}", "")

    def flag(self, key: str) -> bool:
        """Whether a process has set a flag; a training step asks this, so the watchdog has looked it up before."""
        if self._flags.setdefault(key, False) or self._watchdog is not None or self.alone:
            return self._flags[key]
        self._look_up_flags()
        return self._flags[key]

    def _look_up_flags(self) -> None:
        for key in [key for key, is_set in self._flags.items() if not is_set]:
            self._flags[key] = self._store.check([f"flag/{key}"])

    def _value_of(self, rank: int, key: str) -> Any:
        # By asking again and again: a get that waits would keep the watchdog's thread from the store.
        while not self._store.check([f"{key}/{rank}"]):
            time.sleep(_ASK_S)
            self.stop_if_another_failed()
        return json.loads(self._store.get(f"{key}/{rank}"))

    # Supervision

    def stop_if_another_failed(self) -> None:
        """Raise what the processes have to stop for; costs nothing, so that each event of a step can ask.

        Raises:
            ElsewhereStopped: another has failed, or one has been found dead or holding the others up.
        """
        failure = self._watchdog.failure if self._watchdog is not None else None
        if failure is not None and failure.raised_by != self.rank:
            raise ElsewhereStopped(failure.as_seen_by(self.rank), failure.code)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Run a pass: what fails in here stops all processes, and a process that waits for a failed one is ended."""
        if self.alone:
            yield
            return
        self._watchdog = watchdog = Watchdog(
            self._store, self.rank, self.size, self._patience, self.progress, self._look_up_flags
        )
        watchdog.start()
        try:
            yield
            self._leave_together()
        except (Exception, Stopped) as error:
            if isinstance(error, Stopped) and error.together:
                self._leave_together()
            elif not isinstance(error, ElsewhereStopped):
                self._report(error, watchdog)
            raise
        finally:
            watchdog.stop()

    def _leave_together(self) -> None:
        self.publish("over", True)
        if self.first:  # the store may live in this process
            for rank in range(1, self.size):
                self._value_of(rank, "over")

    def _report(self, error: BaseException, watchdog: Watchdog) -> None:
        """Stop all for an error of this process; but where it only follows from another's failure, name that one."""
        broken = _is_broken_exchange(error)
        cause = watchdog.failure or (watchdog.found_after_break() if broken else None)
        if cause is None:
            code = getattr(error, "exit_code", GeomprobeError.exit_code)
            watchdog.report(Failure(f"{type(error).__name__}: {error}", code, self.rank))
            _write_for_torchrun(error)
        if self.first and holds_store():
            time.sleep(2 * BEAT_S)  # so that the others can still read it
        if cause is not None and (broken or isinstance(error, Stopped)):
            raise ElsewhereStopped(cause.as_seen_by(self.rank), cause.code) from error


def _is_broken_exchange(error: BaseException | None) -> bool:
    """Whether an error comes of an exchange that broke, as it does where another process is gone."""
    from torch.distributed import DistError

    while error is not None and not isinstance(error, ReplayDiverged):
        if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_for_torchrun(error: BaseException) -> None:
    """Write the error where torchrun looks for it, as its decorator ``record`` does, for its report of the root cause.

    The decorator itself stands around a whole process, would also write what others' failures made of this one, and
    turns on faulthandler in the user's process.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with contextlib.suppress(OSError):
            get_error_handler().record_exception(error)


def here(patience: float = PATIENCE_S) -> Ranks:
    """The processes of the launch that this one belongs to, as ``torchrun`` describes it in the environment.

    ``patience`` is the number of seconds that all of them may stand still.

    Raises:
        RunError: the store that they share cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        return Ranks()
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    global _passes
    _passes += 1
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience))))
    except (ValueError, RuntimeError) as error:
        raise RunError(
            f"WORLD_SIZE is {size}, but the processes cannot find one another: {error}. Start them with torchrun."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"geomprobe/{attempt}/{_passes}", store)
    shared.set_timeout(timedelta(seconds=patience))
    return Ranks(rank, size, shared, patience)
