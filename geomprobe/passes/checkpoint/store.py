"""Checkpoints on disk: one file of ``torch.save`` a step, checked by digest before it is read, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from geomprobe.distributed.ranks import Ranks
from geomprobe.errors import GeomprobeError, RunError
from geomprobe.passes.checkpoint.plain_values import decode, encode
from geomprobe.trace.atomic_file import atomic_file, write_json
from geomprobe.trace.json_values import require_form
from geomprobe.trace.regular_file import open_regular, read_bytes

FACTS, STATE = "geomprobe.json", "state.pt"

_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}([0-9]{{8,16}})")
_SHARED = {"part": [str], "digest": str, "checkpoint": str}
_DESCRIPTION = {
    "sha256": str,
    "facts": dict,
    "shared": _SHARED,
}


@dataclass(frozen=True)
class SharedByFirst:
    """A part of the contents that is the same on every process of a run, so that only rank 0 writes it."""

    ranks: Ranks
    checkpoints: Path  # rank 0's folder of them
    part: tuple[str, ...] = ("training", "replicated")  # the keys that lead to it


def folder(checkpoints: Path, step: int) -> Path:
    """Where the state before step ``step`` is, or would be."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def saved(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that were written to their end, in order."""
    named = (_NAME.fullmatch(path.parent.name) for path in checkpoints.glob(f"{_PREFIX}*/{FACTS}"))
    return sorted(int(found[1]) for found in named if found)


def write(
    checkpoints: Path,
    step: int,
    contents: Mapping[str, Any],
    facts: Mapping[str, Any],
    shared: SharedByFirst | None = None,
) -> Path:
    """Write a state aside, sync it, and rename it, so that a folder that has its name is whole; gives the folder.

    Args:
        checkpoints: the run's folder of checkpoints.
        step: names the folder; one that is there already is replaced.
        contents: the state; see `encode` for what it may hold.
        facts: what can be read of the state without loading it; JSON.
        shared: what rank 0 writes for the other processes; it is waited for.

    Raises:
        RunError: the disk is full, or the state holds what cannot be kept.
    """
    return _write(checkpoints, step, encode(dict(contents)), facts, shared)


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint; no code in it is ever run.

    Raises:
        RunError: it is damaged, or cannot be read.
    """
    described = _description(path)
    contents = _load(path, described["sha256"])
    with nonsense_named(path):
        if (holder := _holder(path, described)) is not None:
            other, theirs = holder
            part = described["shared"]["part"]
            _at(contents, part[:-1])[part[-1]] = _at(_load(other, theirs["sha256"]), part)
        found: dict[str, Any] = decode(contents)
    return found


@contextmanager
def nonsense_named(path: Path) -> Iterator[None]:
    """Turn what a checkpoint's contents raise, where they are not those of a training, into an error that names it.

    Raises:
        RunError: they raised.
    """
    try:
        yield
    except GeomprobeError:
        raise
    except Exception as error:  # whatever stands where a state should
        raise RunError(
            f"checkpoint {path} is whole, but what it holds is not the state of this training "
            f"({type(error).__name__}: {error}). Remove it, and continue with --resume"
        ) from error


def verify(path: Path) -> dict[str, Any]:
    """Compare a checkpoint with the digests that were taken when it was written; gives its facts.

    Raises:
        RunError: a file is missing, or a bit of it has changed; the message names it.
    """
    described = _description(path)
    with _whole(path, described["sha256"]):
        pass
    _holder(path, described)
    found: dict[str, Any] = described["facts"]
    return found


def facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, read without its state.

    Raises:
        RunError: that is missing or damaged.
    """
    found: dict[str, Any] = _description(path)["facts"]
    return found


def too_many(steps: Sequence[int], keep: int | None) -> list[int]:
    """Which checkpoints go where ``keep`` may stay: those whose neighbors are closest, never the first or the last.

    >>> too_many([0, 10, 20, 30, 40, 50], 4)
    [10, 30]
    """
    left, gone = list(steps), []
    while keep is not None and len(left) > keep:
        i = min(range(1, len(left) - 1), key=lambda i: left[i + 1] - left[i - 1])
        gone.append(left.pop(i))
    return gone


class Writer:
    """Writes checkpoints behind the training: the state is copied at once, and another thread writes it.

    Args:
        checkpoints: the run's folder of checkpoints.
        keep: how many stay there at most, spread evenly over the steps; None for all.
        shared: what rank 0 writes for all processes.
    """

    def __init__(self, checkpoints: Path, keep: int | None, shared: SharedByFirst | None = None) -> None:
        self._checkpoints, self._keep, self._shared = checkpoints, keep, shared
        self._pool = ThreadPoolExecutor(1, "geomprobe-checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, step: int, contents: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Copy a state, once the one before it is written, and begin to write it.

        Raises:
            RunError: the one before it could not be written, or this one holds what cannot be kept.
        """
        self.wait()
        self._pending = self._pool.submit(self._run, step, encode(dict(contents)), dict(facts))

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            RunError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            RunError: the last one could not be written.
        """
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _run(self, step: int, plain: dict[str, Any], facts: Mapping[str, Any]) -> None:
        _write(self._checkpoints, step, plain, facts, self._shared)
        for old in too_many(saved(self._checkpoints), self._keep):
            remove(self._checkpoints, old)


def remove(checkpoints: Path, step: int) -> None:
    """Remove a checkpoint; one that is half removed is none."""
    (folder(checkpoints, step) / FACTS).unlink(missing_ok=True)
    shutil.rmtree(folder(checkpoints, step), ignore_errors=True)


class _DigestedFile:
    """What ``torch.save`` writes to: digests what goes by, and keeps the disk's own error, which torch would hide."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        return len(data)

    def flush(self) -> None:
        """For torch, which calls it; closing the file does it."""

    def hexdigest(self) -> str:
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()


def _write(
    checkpoints: Path,
    step: int,
    plain: dict[str, Any],
    facts: Mapping[str, Any],
    shared: SharedByFirst | None,
) -> Path:
    target = folder(checkpoints, step)
    described: dict[str, Any] = {"facts": dict(facts), "shared": None}
    if shared is not None:
        digest = _digest(_at(plain, shared.part))
        if shared.ranks.broadcast(target.name, digest) == digest:
            at = None
            if not shared.ranks.first:
                at = os.path.relpath(shared.checkpoints / target.name, checkpoints)
                _at(plain, shared.part[:-1])[shared.part[-1]] = None
            described["shared"] = {"part": shared.part, "digest": digest, "checkpoint": at}
    aside = target.with_name(f"{target.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with atomic_file(aside / STATE) as path, open(path, "wb") as file:
            digested = _DigestedFile(file)
            torch.save(plain, digested)  # type: ignore[arg-type]
            described["sha256"] = digested.hexdigest()
        text = json.dumps(described)
        write_json(aside / FACTS, {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text})
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        descriptor = os.open(checkpoints, os.O_RDONLY)
        os.fsync(descriptor)  # or a crash of the machine could undo the renaming
        os.close(descriptor)
    except OSError as error:
        raise RunError(
            f"cannot write {target}: {error.strerror}. Checkpoints written before it are whole. Free space on that "
            "disk, or choose another, and continue with --resume."
        ) from error
    return target


def _description(path: Path) -> dict[str, Any]:
    try:
        outer = json.loads(read_bytes(path / FACTS))
        if hashlib.sha256(outer["text"].encode()).hexdigest() != outer["sha256"]:
            raise ValueError
        found: dict[str, Any] = require_form(json.loads(outer["text"]), dict, FACTS)
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read: {FACTS}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"checkpoint {path} is damaged: {FACTS} is not what was written") from error
    if "sha256" not in found:
        raise RunError(
            f"checkpoint {path} was written by an older geomprobe, in a format that this one does not read. Use that "
            "version, or record again with --force"
        )
    require_form(found, _DESCRIPTION, f"checkpoint {path}")
    shared = found.get("shared")
    if found.get("facts") is None or (shared is not None and shared.keys() != _SHARED.keys()):
        raise RunError(f"checkpoint {path} is damaged: {FACTS} is not what a pass writes")
    # What it leaves out is in rank 0's checkpoint of the same step, and nowhere else.
    if shared is not None and shared["checkpoint"] not in (None, f"../{path.name}"):
        raise RunError(f"checkpoint {path} is damaged: {shared['checkpoint']} does not hold what it left out")
    return {"shared": None, **found}


def _holder(path: Path, described: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that has what this one leaves out, and its description; None where this one is complete."""
    shared = described["shared"]
    if shared is None or shared["checkpoint"] is None:
        return None
    other = path.parent / shared["checkpoint"]
    found = _description(other)
    theirs = found["shared"] or {}
    if theirs.get("checkpoint", "") is not None or theirs["digest"] != shared["digest"]:
        raise RunError(f"checkpoint {path} is damaged: {other.resolve()} does not hold what it left out")
    return other, found


@contextmanager
def _whole(path: Path, digest: str) -> Iterator[IO[bytes]]:
    """The file of a checkpoint, open, with the digest that it was written with."""
    try:
        with os.fdopen(open_regular(path / STATE), "rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
            if found.hexdigest() != digest:
                raise RunError(f"checkpoint {path} is damaged: {STATE} is not what was written")
            file.seek(0)
            yield file
    except OSError as error:
        raise RunError(f"checkpoint {path} is damaged: {STATE}: {error.strerror}") from error


def _load(path: Path, digest: str) -> dict[str, Any]:
    with _whole(path, digest) as file:
        try:
            with torch.sparse.check_sparse_tensor_invariants():
                found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch each raise their own
            raise RunError(
                f"checkpoint {path} cannot be read: {STATE} holds more than tensors and plain values, and no pickled "
                "code is run"
            ) from error
    return found


def _at(contents: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        contents = contents[key]
    return contents


def _digest(plain: Any) -> str:
    """SHA-256 of a nest as `encode` makes it, keys and shapes included."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                take(item)
        else:
            digest.update(repr(value).encode())

    take(plain)
    return digest.hexdigest()
