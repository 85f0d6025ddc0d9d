"""Checkpoints on disk: one torch.distributed.checkpoint folder a step, checked by digest, whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geomprobe.errors import RunError

FACTS = "geomprobe.json"

_BYTES = "tensors"  # the entry for all tensors' bytes, one after the other
_LAYOUT = "layout"  # and for their names, types and shapes, pickled
_REST = "rest"  # the entry for everything that is no tensor, pickled
_PREFIX = "step-"


@dataclass(frozen=True)
class Alike:
    """Tensors that several processes' checkpoints of one step have in common.

    Attributes:
        names: of these tensors.
        digest: SHA-256 of them.
        at: the checkpoint that holds them; None for this one.
    """

    names: tuple[str, ...]
    digest: str
    at: Path | None = None


Parted = Callable[[Path, Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Alike | None]]


def folder(checkpoints: Path, step: int) -> Path:
    """Where the state before step ``step`` lies.

    >>> folder(Path("checkpoints"), 12).name
    'step-00000012'
    """
    return checkpoints / f"{_PREFIX}{step:08d}"


def saved(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that were written to their end, in order.

    >>> saved(Path("nowhere"))
    []
    """
    return sorted(
        int(path.parent.name.removeprefix(_PREFIX)) for path in checkpoints.glob(f"{_PREFIX}*[0-9]/{FACTS}")
    )


def write(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    rest: bytes,
    facts: Mapping[str, Any],
    alike: Alike | None = None,
) -> Path:
    """Write a state aside, sync it, and rename it, so that a folder that has its name is whole.

    Args:
        checkpoints: the run's folder of checkpoints.
        step: names the folder; one that is there already is replaced.
        tensors: by name.
        rest: everything else, pickled.
        facts: what is to be known of the state without loading it; JSON.
        alike: tensors that another checkpoint has in common with this one, or holds for it.

    Returns:
        The new folder.

    Raises:
        RunError: the disk is full, or a tensor cannot be kept.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    target = folder(checkpoints, step)
    aside = target.with_name(f"{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    _quiet()
    try:
        save({**_joined(tensors), _REST: rest}, checkpoint_id=aside, no_dist=True)
        _describe(aside, facts, _told(alike, checkpoints))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _sync(checkpoints)
    except OSError as error:
        raise _unwritten(target, error) from error
    except CheckpointException as error:  # torch wraps whatever was raised, and derives it from BaseException
        cause, _ = next(iter(error.failures.values()))
        raise _unwritten(target, cause) from error
    return target


def read(path: Path) -> tuple[dict[str, Tensor], bytes]:
    """A state's tensors, on the CPU, and the rest, pickled.

    Args:
        path: what `write` returned; verify it first.

    Raises:
        RunError: it cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    _quiet()
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        state: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else b""
            for name, entry in stored.items()
        }
        load(state, checkpoint_id=path, no_dist=True)
    except (OSError, CheckpointException) as error:
        raise RunError(f"checkpoint {path} cannot be read: {error}") from error
    rest = state.pop(_REST)
    alike = _description(path)["alike"]
    if alike["at"] is None:
        return _parted(state), rest
    elsewhere, _ = read(path.parent / alike["at"])
    return {**{name: elsewhere[name] for name in alike["names"]}, **_parted(state)}, rest


def verify(path: Path) -> dict[str, Any]:
    """Hold every file of a checkpoint against the digest that was taken when it was written.

    Returns:
        Its facts.

    Raises:
        RunError: a file is missing, or a bit of it has changed; the message names it.
    """
    described = _description(path)
    for name, digest in described["files"].items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise RunError(f"checkpoint {path} is damaged: {name}: {error.strerror}") from error
        if found != digest:
            raise RunError(f"checkpoint {path} is damaged: {name} is not what was written")
    alike = described["alike"]
    if alike["at"] is not None:
        other = path.parent / alike["at"]
        if _description(other)["alike"]["digest"] != alike["digest"]:
            raise RunError(f"checkpoint {path} is damaged: {other.resolve()} does not hold what it left out")
    return described["facts"]


def facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without a look at its state.

    Raises:
        RunError: that is missing or damaged.
    """
    return _description(path)["facts"]


class Writer:
    """Writes checkpoints behind the training: the state is copied at once, and written by another thread.

    Args:
        checkpoints: the run's folder of checkpoints.
        written: called with the steps on disk after each checkpoint; gives those to remove.
        parted: called with a checkpoint's folder and its tensors; gives those to keep, and what others have of them.
    """

    def __init__(
        self, checkpoints: Path, written: Callable[[list[int]], list[int]], parted: Parted | None = None
    ) -> None:
        self._checkpoints, self._thin, self._parted = checkpoints, written, parted
        self._pool = ThreadPoolExecutor(1, "geomprobe-checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, step: int, tensors: Mapping[str, Tensor], rest: bytes, facts: Mapping[str, Any]) -> None:
        """Begin to write a state, once the one before it is written.

        Raises:
            RunError: the one before it could not be written.
        """
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._pending = self._pool.submit(self._write, step, copies, rest, dict(facts))

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

    def _write(self, step: int, tensors: Mapping[str, Tensor], rest: bytes, facts: Mapping[str, Any]) -> None:
        alike = None
        if self._parted is not None:
            tensors, alike = self._parted(folder(self._checkpoints, step), tensors)
        write(self._checkpoints, step, tensors, rest, facts, alike)
        for old in self._thin(saved(self._checkpoints)):
            remove(self._checkpoints, old)


def remove(checkpoints: Path, step: int) -> None:
    """Remove a checkpoint; one that is half removed is none."""
    (folder(checkpoints, step) / FACTS).unlink(missing_ok=True)
    shutil.rmtree(folder(checkpoints, step), ignore_errors=True)


def packed(rest: Any) -> bytes:
    """Pickle what is no tensor, at once, so that later changes do not reach it.

    Raises:
        RunError: it holds something that cannot be pickled.

    >>> unpacked(packed({"a": torch.ones(1)}))
    {'a': tensor([1.])}
    """
    buffer = io.BytesIO()
    try:
        torch.save(rest, buffer)
    except Exception as error:  # pickle raises whatever an object's own methods raise
        raise RunError(
            f"the training's state cannot be kept: {type(error).__name__}: {error}. Does an object given to attach "
            "hold something that cannot be pickled? Leave it out, or take that out of its state_dict."
        ) from error
    return buffer.getvalue()


def unpacked(rest: bytes) -> Any:
    """What `packed` was given."""
    return torch.load(io.BytesIO(rest), weights_only=False)


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All tensors as the bytes of one, since saving costs as much for each tensor as for a hundred thousand numbers."""
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    raw = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    return {_BYTES: torch.cat(raw) if raw else torch.empty(0, dtype=torch.uint8), _LAYOUT: packed(layout)}


def _parted(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What was `_joined`."""
    found, end = {}, 0
    for name, dtype, shape in unpacked(state[_LAYOUT]):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        # A copy, since a view of another type has to begin where its type may.
        found[name] = state[_BYTES][begin:end].clone().view(dtype).reshape(shape)
    return found


def _quiet() -> None:
    """Keep torch from warning that one process without a process group is meant, which it is."""
    # For good, since a context that puts the filters back is not one for threads.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _told(alike: Alike | None, checkpoints: Path) -> dict[str, Any]:
    if alike is None:
        return {"digest": None, "at": None}
    at = None if alike.at is None else os.path.relpath(alike.at, checkpoints)
    return {"digest": alike.digest, "at": at, "names": [] if at is None else alike.names}


def _describe(path: Path, facts: Mapping[str, Any], alike: Mapping[str, Any]) -> None:
    files = {str(file.relative_to(path)): _sha256(file) for file in sorted(path.iterdir())}
    text = json.dumps({"facts": dict(facts), "files": files, "alike": alike})
    with open(path / FACTS, "w") as file:
        json.dump({"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}, file)
        file.flush()
        os.fsync(file.fileno())


def _description(path: Path) -> dict[str, Any]:
    try:
        outer = json.loads((path / FACTS).read_text())
        if hashlib.sha256(outer["text"].encode()).hexdigest() != outer["sha256"]:
            raise ValueError
        found: dict[str, Any] = json.loads(outer["text"])
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read: {FACTS}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"checkpoint {path} is damaged: {FACTS} is not what was written") from error
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritten(target: Path, cause: BaseException) -> RunError:
    why = cause.strerror if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"
    return RunError(
        f"cannot write {target}: {why}. Checkpoints written before it are whole. Free space on that disk, or choose "
        "another, and go on with --resume."
    )
