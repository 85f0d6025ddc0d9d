"""The whole training state as a torch.distributed.checkpoint folder, one a step."""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geomprobe.determinism import capture_rng
from geomprobe.errors import RunError
from geomprobe.probe import Probe


def folder(checkpoints: Path, step: int) -> Path:
    """Where the state before step ``step`` lies.

    >>> folder(Path("checkpoints"), 12).name
    'step-00000012'
    """
    return checkpoints / f"step-{step:08d}"


def save(checkpoints: Path, probe: Probe) -> Path:
    """Write the probe's whole state: model, buffers, optimizer, every attached object and the RNG streams.

    The folder is written aside and renamed, so one that has its name is whole.

    Args:
        checkpoints: the run's folder of checkpoints.
        probe: whose state; its step names the folder.

    Returns:
        The new folder.

    Raises:
        RunError: the disk is full, or the state holds something that cannot be kept.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save as write

    target = folder(checkpoints, probe.step)
    aside = target.with_name(f"{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _quiet():
            write(_state(probe), checkpoint_id=aside, no_dist=True)
        aside.rename(target)
    except OSError as error:
        raise _unwritten(target, error) from error
    except CheckpointException as error:  # torch wraps whatever was raised, and derives it from BaseException
        cause, _ = next(iter(error.failures.values()))
        raise _unwritten(target, cause) from error
    return target


def _unwritten(target: Path, cause: BaseException) -> RunError:
    if isinstance(cause, OSError):
        return RunError(
            f"cannot write {target}: {cause.strerror}. Free space on that disk, or choose another, and run the pass "
            "again."
        )
    return RunError(
        f"cannot write {target}: {type(cause).__name__}: {cause}. Does an object given to attach hold something "
        "that cannot be pickled? Leave it out, or take that out of its state_dict."
    )


def load(path: Path, probe: Probe) -> dict[str, Any]:
    """Read a checkpoint of a probe's model and optimizer back.

    Args:
        path: what `save` returned.
        probe: one on an equal model and optimizer; it shapes what is read and is not changed.

    Returns:
        ``model``, ``optimizer``, ``stateful`` and ``rng``, as `save` found them.

    Raises:
        RunError: the checkpoint holds state of the optimizer, and the probe's has none yet to shape it.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    state = copy.deepcopy(_state(probe))  # it is read in place
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    if not state["optimizer"]["state"] and any(name.startswith("optimizer.state.") for name in stored):
        raise RunError(
            f"{path} holds the state of an optimizer that had stepped, and {type(probe.optimizer).__name__} has "
            "not, so there is nothing to read it into. Let it step once first."
        )
    with _quiet():
        read(state, checkpoint_id=path, no_dist=True)
    return state


def _state(probe: Probe) -> dict[str, Any]:
    rng = capture_rng()
    return {
        "model": probe.model.state_dict() if probe.model is not None else dict(probe.parameters),
        "optimizer": probe.optimizer.state_dict(),
        "stateful": {name: thing.state_dict() for name, thing in probe.stateful.items()},
        "rng": {"python": rng.python, "numpy": rng.numpy, "torch": rng.torch, "cuda": list(rng.cuda)},
        "step": probe.step,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # One process without a process group is meant here; torch warns that it assumes as much.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
