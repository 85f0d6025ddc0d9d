"""The processes of one launch: which of them this one is, and what they tell one another beside the training.

They talk through the store that ``torchrun`` (or ``MASTER_ADDR`` and ``MASTER_PORT``) gives them, which is there before
the script makes its process group and after it has taken it down, and which no training step waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from geomprobe.distributed.heartbeat import BEAT_S
from geomprobe.distributed.progress import ProgressMarker
from geomprobe.distributed.watchdog import Failure, Watchdog, holds_store
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
    """The processes of a launch, seen from one of them; `here` makes it.

    Attributes:
        rank: this process's number.
        size: how many there are.
        progress: where this process's training is, for the others to see.

    >>> Ranks().first, Ranks().alone
    (True, True)
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, patience: float = PATIENCE_S) -> None:
        self.rank, self.size = rank, size
        self._store, self._patience = store, patience
        self.progress = ProgressMarker()
        self._vigil: Watchdog | None = None
        self._listened: dict[str, bool] = {}  # calls, and whether they have come

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether it is the only one."""
        return self.size == 1

    def described(self) -> dict[str, Any]:
        """For the manifest: nothing where there is one process.

        >>> Ranks().described(), Ranks(1, 4).described()
        ({}, {'ranks': {'world_size': 4}})
        """
        return {} if self.alone else {"ranks": {"world_size": self.size}}

    def require_all(self, world_size: int) -> None:
        """Hold the group of processes that the script has made to be no larger than the launch.

        Raises:
            UsageError: it is.

        >>> Ranks().require_all(1)
        """
        if world_size > self.size:
            raise UsageError(
                f"the script has made a group of {world_size} processes, and geomprobe was started in each of them by "
                "itself. Start them together: torchrun --nproc-per-node N -m geomprobe record ..."
            )

    def said_by_first(self, name: str, value: Any = None) -> Any:
        """A value of rank 0's, on every rank.

        Args:
            name: what it is; once a pass.
            value: rank 0's, which JSON can hold.

        Raises:
            ElsewhereStopped: rank 0 failed, or did not say it in time.
        """
        if not self.alone and self.first:
            self._store.set(name, json.dumps(value))
        return value if self.first else json.loads(self._wait(name))

    def say(self, name: str, value: Any) -> None:
        """Tell the others a value of this rank's, without waiting for any of them."""
        if not self.alone:
            self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def said(self, name: str) -> list[Any]:
        """What each other rank has told by that name, in their order; waits for those who have not yet.

        Raises:
            ElsewhereStopped: one failed, or did not in time.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        return [json.loads(self._wait(f"{name}/{rank}")) for rank in others]

    def said_by_all(self, name: str, value: Any) -> list[Any]:
        """What each rank has told by that name, in their order, this one by this call; waits for all of them.

        Raises:
            ElsewhereStopped: one failed, or did not in time.

        >>> Ranks().said_by_all("host", "a")
        ['a']
        """
        self.say(name, value)
        others = self.said(name)
        return [*others[: self.rank], value, *others[self.rank :]]

    def least_said(self, name: str) -> int | None:
        """The least number that another rank has told by that name, 0 for one that has not; None without others."""
        numbers = self.so_far_said(name)
        return None if self.alone else min(numbers) if len(numbers) == self.size - 1 else 0

    def so_far_said(self, name: str) -> list[int]:
        """The numbers that other ranks have told by that name until now."""
        others = [f"{name}/{rank}" for rank in range(self.size) if rank != self.rank]
        return [int(json.loads(self._store.get(key))) for key in others if self._store.check([key])]

    def call(self, name: str) -> None:
        """Have every process `hear <hears>` a name from now on, within seconds."""
        self._listened[name] = True
        if not self.alone:
            self._store.set(f"call/{name}", "")

    def hears(self, name: str) -> bool:
        """Whether a process has called a name; costs nothing but the vigil's own questions."""
        return self._listened.setdefault(name, False)

    def hear(self) -> None:
        """Ask the store for calls; the vigil does it."""
        for name in [name for name, called in self._listened.items() if not called]:
            self._listened[name] = self._store.check([f"call/{name}"])

    def have_said(self, name: str) -> bool:
        """Whether all others have told something by that name."""
        return all(self._store.check([f"{name}/{rank}"]) for rank in range(self.size) if rank != self.rank)

    def tell(self, name: str, value: Any) -> None:
        """Say something for all, without waiting for any; what was said by that name before stands."""
        if not self._store.check([name]):
            self._store.set(name, json.dumps(value))

    def told(self, name: str) -> Any:
        """What was told for all by that name, or None so far."""
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def stop_if_another_failed(self) -> None:
        """Raise what the processes have to stop for.

        Raises:
            ElsewhereStopped: another has failed, or one has been found dead or holding the others up.
        """
        failure = self._vigil.failure if self._vigil is not None else None
        if failure is not None and failure.raised_by != self.rank:
            raise ElsewhereStopped(failure.told(self.rank), failure.code)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look out for failures of the others while inside; a process that waits for one in vain is ended."""
        if self.alone:
            yield
            return
        vigil = Watchdog(self._store, self.rank, self.size, self._patience, self.progress, self.hear)
        self._vigil = vigil
        vigil.start()
        try:
            yield
            self._part()
        except (Exception, Stopped) as error:
            if isinstance(error, Stopped) and error.together:
                self._part()
            elif not isinstance(error, ElsewhereStopped):
                self._blame(vigil, error)
            raise
        finally:
            vigil.stop()

    def _part(self) -> None:
        self.say("over", True)
        if self.first:  # the store may live in this process
            self.said("over")

    def _blame(self, vigil: Watchdog, error: BaseException) -> None:
        """Stop for what another process did, if that is why this one fails; else let the others stop for this."""
        failure, broken = vigil.failure, _from_broken_exchange(error)
        if failure is None and broken:
            failure = vigil.found_after_break()
        if failure is None:
            code = getattr(error, "exit_code", GeomprobeError.exit_code)
            vigil.tell(Failure(f"{type(error).__name__}: {error}", code, self.rank))
        if self.first and holds_store():
            time.sleep(2 * BEAT_S)  # so that the others hear of it
        if failure is not None and (broken or isinstance(error, Stopped)):
            raise ElsewhereStopped(failure.told(self.rank), failure.code) from error

    def _wait(self, name: str) -> bytes:
        # By asking again and again: a get that waits would keep the vigil from the store.
        while not self._store.check([name]):
            time.sleep(_ASK_S)
            self.stop_if_another_failed()
        found: bytes = self._store.get(name)
        return found


def _from_broken_exchange(error: BaseException | None) -> bool:
    """Whether an error comes of an exchange that broke, as it does where another process is gone."""
    from torch.distributed import DistError

    while error is not None and not isinstance(error, ReplayDiverged):
        if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def here(patience: float = PATIENCE_S) -> Ranks:
    """The processes of the launch that this one belongs to, as ``torchrun`` describes it in the environment.

    Args:
        patience: seconds that all of them may stand still.

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
