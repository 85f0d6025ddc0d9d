"""Read the weights of a model from a file that something else made, to measure the path against them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from geomprobe.errors import RunError, UsageError

_NESTINGS = ("state_dict", "model", "model_state_dict")
_SAVE = "Save the state_dict of the model that was recorded: torch.save(model.state_dict(), FILE)"


def read_weights(path: Path, names_and_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters of a model, by name, from a state_dict or a safetensors file.

    A torch file may hold the state_dict itself, or a dict with the state_dict under ``state_dict``, ``model`` or
    ``model_state_dict``. What is in the file besides the parameters is ignored. ``_orig_mod`` (torch.compile)
    anywhere in a name, and ``module.`` (DDP) before it, make no difference, on either side. No pickled code is
    ever run.

    Args:
        path: the file; ``.safetensors``, or else what ``torch.save`` wrote.
        names_and_shapes: the parameters wanted.

    Returns:
        Tensors on the host, in the file's own dtypes.

    Raises:
        RunError: the file cannot be read, or a parameter is missing, of another shape, not floating-point, or
            holds a value that is not finite.
        UsageError: safetensors is not installed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "best.pt"
    >>> torch.save({"epoch": 3, "state_dict": {"module.weight": torch.ones(1, 2)}}, path)
    >>> read_weights(path, {"weight": (1, 2)})
    {'weight': tensor([[1., 1.]])}
    """
    path = Path(path)
    if path.is_dir():
        raise RunError(
            f"{path} is a folder, and a reference is read from one file, because the index of a "
            "torch.distributed.checkpoint folder is pickled code. If you trust it, load it with "
            "torch.distributed.checkpoint.load, and torch.save(model.state_dict(), FILE)"
        )
    if not path.exists():
        raise RunError(f"{path} does not exist: there is no reference to read. Name a state_dict file")
    entries = _safetensors(path) if path.suffix == ".safetensors" else _state_dict(path, names_and_shapes)
    found = _matched(entries, names_and_shapes)
    for missing in (name for name in names_and_shapes if name not in found):
        raise _missing(path, missing, len(names_and_shapes) - len(found), entries, names_and_shapes)
    return {name: _checked(path, name, found[name], shape) for name, shape in names_and_shapes.items()}


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"{path}: safetensors is not installed: pip install 'geomprobe[safetensors]'") from error
    try:
        return dict(load_file(path))
    except Exception as error:
        raise _unreadable(path, error) from error


def _state_dict(path: Path, names: Iterable[str]) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that it then refuses, or of its own future
            whole = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch each raise their own
        raise _unreadable(path, error) from error
    if not isinstance(whole, Mapping):
        raise RunError(f"{path} holds a {type(whole).__name__}, not the weights of a model. {_SAVE}")
    if _matched(whole, names):
        return whole
    nested = [key for key in _NESTINGS if isinstance(whole.get(key), Mapping)]
    if len(nested) > 1:
        raise RunError(f"{path} holds weights under {' and '.join(nested)}: it is not clear which are meant. {_SAVE}")
    return whole[nested[0]] if nested else whole


def _unreadable(path: Path, error: Exception) -> RunError:
    if isinstance(error, UnpicklingError):  # torch's own words advise to run what the file holds
        code = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({code[1]})" if code else ""
        cause = f"it holds more than tensors{named}, or no tensors at all, and no pickled code is run"
    else:
        cause = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return RunError(f"{path} cannot be read as weights: {cause}. {_SAVE}")


def _matched(entries: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries that are wanted, by the names under which they are wanted."""
    wanted, keys = list(names), [key for key in entries if isinstance(key, str)]
    if all(name in entries for name in wanted):
        return {name: entries[name] for name in wanted}
    distinct = all(len({_unwrapped(name) for name in side}) == len(side) for side in (wanted, keys))
    bare = _unwrapped if distinct else str  # where two names would become one, names are what they are
    there = {bare(key): entries[key] for key in keys}
    return {name: there[bare(name)] for name in wanted if bare(name) in there}


def _unwrapped(name: str) -> str:
    components = [component for component in name.split(".") if component != "_orig_mod"]
    while components[:1] == ["module"] and len(components) > 1:
        del components[0]
    return ".".join(components)


def _missing(
    path: Path, name: str, count: int, entries: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> RunError:
    keys = [str(key) for key in entries]
    near = [key for key in keys if key.endswith(f".{name}") or name.endswith(f".{key}")] or keys
    return RunError(
        f"{path} has no {name} of shape {list(wanted[name])}: {count} of {len(wanted)} parameters are missing. "
        f"It has {', '.join(near[:5]) or 'nothing'}{', ...' if len(near) > 5 else ''}. {_SAVE}"
    )


def _checked(path: Path, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise RunError(
            f"{name} in {path} is {kind}, and weights are floating-point: there is no distance to it. "
            "Save the weights before they are quantized"
        )
    if tuple(value.shape) != tuple(shape):
        raise RunError(
            f"{name} in {path} has shape {list(value.shape)}, and the recorded model's has {list(shape)}: there is "
            f"no distance between them. {_SAVE}"
        )
    bad = int((~torch.isfinite(value if value.element_size() > 1 else value.float())).sum())
    if bad:
        raise RunError(
            f"{name} in {path} is not finite: {bad} of {value.numel()} values are NaN or infinite, so no distance to "
            "it exists. Name weights of a training that did not diverge"
        )
    return value.detach()
