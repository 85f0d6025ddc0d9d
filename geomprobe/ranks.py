"""The processes of one launch: which of them this one is, and what they tell one another beside the training.

They talk through the store that ``torchrun`` (or ``MASTER_ADDR`` and ``MASTER_PORT``) gives them, which is there before
the script makes its process group and after it has taken it down, and which no training step waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from geomprobe.errors import GeomprobeError, RunError, UsageError

PATIENCE_S = 1800.0  # as gloo's own; how long one process waits for another
_POLL_S = 1.0
_ASK_S = 0.02
_GRACE_S = 10.0  # for a process to stop by itself, when another has failed

_passes = 0  # of this process; every process of a launch goes through the same ones


class ElsewhereStopped(GeomprobeError):
    """Another process of the run has failed, and this one stops with it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Ranks:
    """The processes of a launch, seen from one of them; `here` makes it.

    Attributes:
        rank: this process's number.
        size: how many there are.

    >>> Ranks().first, Ranks().alone
    (True, True)
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._failed: dict[str, Any] | None = None
        self._over = threading.Event()

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
            RunError: rank 0 did not say it in time.
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
            RunError: one did not in time; the message names it.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        return [json.loads(self._wait(f"{name}/{rank}")) for rank in others]

    def least_said(self, name: str) -> int | None:
        """The least number that another rank has told by that name, 0 for one that has not; None without others."""
        others = [f"{name}/{rank}" for rank in range(self.size) if rank != self.rank]
        numbers = [int(json.loads(self._store.get(key))) if self._store.check([key]) else 0 for key in others]
        return min(numbers, default=None)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process stops, and why."""
        if self.alone or self._failed is not None:
            return
        text = f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", GeomprobeError.exit_code)
        self._store.set("failed", json.dumps({"rank": self.rank, "text": text, "code": code}))

    def stop_if_another_failed(self) -> None:
        """Raise what another process has stopped for.

        Raises:
            ElsewhereStopped: one has.
        """
        if self._failed is not None and self._failed["rank"] != self.rank:
            rank, text, code = (self._failed[key] for key in ("rank", "text", "code"))
            raise ElsewhereStopped(f"rank {self.rank} stops because rank {rank} did: {text}", code)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look out for failures of the others while inside; a process that waits for one in vain is ended."""
        if self.alone:
            yield
            return
        watch = threading.Thread(target=self._watch, name="geomprobe-ranks", daemon=True)
        watch.start()
        try:
            yield
            self.say("over", True)
            if self.first:  # the store may live in this process
                self.said("over")
        except Exception as error:
            if not isinstance(error, ElsewhereStopped):
                self.fail(error)
            raise
        finally:
            self._over.set()
            watch.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            with contextlib.suppress(Exception):  # the store goes with the process that holds it
                if self._store.check(["failed"]):
                    self._failed = json.loads(self._store.get("failed"))
            if self._failed is not None and self._failed["rank"] != self.rank:
                break
        if self._failed is None or self._over.wait(_GRACE_S):
            return
        # The main thread waits inside a collective that will not end; what is committed is safe.
        print(
            f"geomprobe: rank {self.rank} ends: rank {self._failed['rank']} stopped: {self._failed['text']}",
            flush=True,
        )
        os._exit(self._failed["code"])

    def _wait(self, name: str) -> bytes:
        # By asking again and again: a get that waits would keep the watch from the store.
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if self._store.check([name]):
                    found: bytes = self._store.get(name)
                    return found
            except Exception as error:  # of torch's own kinds, which differ by version
                raise RunError(
                    f"rank {self.rank} stops: the store that the ranks share is gone: {error}"
                ) from error
            time.sleep(_ASK_S)
            self.stop_if_another_failed()
        who = name.rpartition("/")[2] if "/" in name else "0"
        raise RunError(
            f"rank {self.rank} waited {PATIENCE_S:g} s for {name!r} of rank {who}, which did not come. Did that "
            "process die, or was it started with other arguments? Start all of them anew."
        )


def here(patience: float = PATIENCE_S) -> Ranks:
    """The processes of the launch that this one belongs to, as ``torchrun`` describes it in the environment.

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
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=PATIENCE_S))))
    except (ValueError, RuntimeError) as error:
        raise RunError(
            f"WORLD_SIZE is {size}, but the processes cannot find one another: {error}. Start them with torchrun."
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"geomprobe/{attempt}/{_passes}", store)
    shared.set_timeout(timedelta(seconds=PATIENCE_S))
    return Ranks(rank, size, shared)
