"""What the JSON texts of a run may hold: the manifest, the certificate, the plan of a sealing.

A form says what a value must be. A type is that of the value. A tuple has the forms that it may have. A list with one
form is a list of such values. A dictionary has forms by key: an entry that is not there, or is null, fits. A set lists
the values. A `range` is of whole numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from geomprobe.errors import RunError

COUNT = range(1 << 53)
LARGEST_SKETCH = 1 << 16
"""Numbers of each vector: 1 MiB a step for both."""
_DEEPEST = 32
_AT_LEAST_ONE = range(1, 1 << 53)

STATUSES = {
    "geomprobe-trace": {"complete", "incomplete", "diverged", "uncertified"},
    "geomprobe-record": {"complete", "incomplete", "failed"},
}

MANIFEST: dict[str, Any] = {
    "geomprobe": str,
    "seed": COUNT,
    "strict": bool,
    "script": {
        "kind": {"script", "module", "function"},
        "path": str,
        "argv": [str],
        "cwd": str,
        "root": str,
        "sha256": str,
    },
    "recording": {"argv": [str], "no_checkpoints": str, "checkpoint_every": str},
    "software": dict,
    "sources": dict,
    "hardware": {"devices": list},
    "environment": {"PYTHONHASHSEED": str, "CUBLAS_WORKSPACE_CONFIG": str},
    "flags": {"num_threads": _AT_LEAST_ONE},
    "host": {"OMP_NUM_THREADS": str},
    "optimizer": {"class": str, "groups": [dict]},
    "model": {"class": str, "dtype": (str, [str]), "num_parameters": COUNT, "parameters": [str]},
    "updates": {"gradient": str, "clipped_by": [str], "attempted": COUNT, "applied": COUNT, "scaled": bool},
    "measure": {
        "argv": [str],
        "every": _AT_LEAST_ONE,
        "held_out_every": COUNT,
        "full_gradient_every": COUNT,
        "files": dict,
    },
    "paths": {"name": str, "measured": [range(-1, 1 << 53)], "stepped": [range(-1, 1 << 53)]},
    "ranks": {"kind": str, "world_size": range(1, 1 << 16)},
    "missed_reference_steps": [COUNT],
    "optimizer_state_steps": {"first": COUNT, "every": _AT_LEAST_ONE},
    "final_optimizer_state": [int],
    "sketch": {
        "size": range(1, LARGEST_SKETCH + 1),
        "every": _AT_LEAST_ONE,
        "seed": COUNT,
        "sharded": bool,
        "shapes": [[COUNT]],
    },
}
"""The entries of a manifest that something reads; what else is in it is only shown."""

REPLAYED = (
    *("script.kind", "script.path", "seed", "strict", "environment", "host", "hardware.devices"),
    *("flags.num_threads", "recording.argv", "model.num_parameters", "optimizer.class", "optimizer.groups"),
)
"""The entries that a manifest must have where its run is to be made again."""

CERTIFICATE: dict[str, Any] = {
    "steps_recorded": COUNT,
    "steps_compared": COUNT,
    "steps_equal": COUNT,
    "final_weights_equal": bool,
    "components": [str],
    "first_difference": {"step": COUNT, "component": str, "tensor": str, "rank": COUNT},
    "steps_attempted": COUNT,
}


def require_form(value: Any, form: Any, what: str) -> Any:
    """The value, where it has the form; ``what`` names it.

    Raises:
        RunError: it has another one; the message names the entry.

    >>> require_form({"steps_equal": -1}, CERTIFICATE, "certificate")
    Traceback (most recent call last):
        ...
    geomprobe.errors.RunError: certificate.steps_equal is damaged: it is -1
    """
    if any(level > _DEEPEST for level in _levels(value)):
        raise RunError(f"{what} is damaged: it is nested more than {_DEEPEST} deep")
    if (misfit := _misfit(value, form, what)) is not None:
        shown = repr(misfit[1])
        raise RunError(f"{misfit[0]} is damaged: it is {shown if len(shown) < 60 else f'{shown[:57]}...'}")
    return value


def manifest_of_text(text: Any) -> dict[str, Any]:
    """The manifest in the text of a file's attribute.

    Raises:
        RunError: it is no JSON text, or not what a pass writes.
    """
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RunError("manifest is damaged: it is no JSON text") from error
    if not isinstance(found, dict):
        raise RunError("manifest is damaged: it is no JSON object")
    checked: dict[str, Any] = require_form(found, MANIFEST, "manifest")
    return checked


def require_entries(manifest: Mapping[str, Any], names: Iterable[str], run: object) -> None:
    """Refuse to make a run again whose manifest, of the form `MANIFEST`, lacks one of some entries.

    Raises:
        RunError: it lacks one; the message names it.

    >>> require_entries({"seed": 0, "script": {}}, ["seed", "script.path"], "runs/a")
    Traceback (most recent call last):
        ...
    geomprobe.errors.RunError: runs/a cannot be made again: its manifest lacks script.path. Record it once more
    """
    for name in names:
        section, _, key = name.partition(".")
        found = manifest.get(section)
        if found is None or (key and found.get(key) is None):
            raise RunError(f"{run} cannot be made again: its manifest lacks {name}. Record it once more")


def _misfit(value: Any, form: Any, what: str) -> tuple[str, Any] | None:
    """The first entry that does not fit, with its name; None where all fit."""
    inner: Iterator[tuple[str, Any, Any]] = iter(())
    if isinstance(form, tuple):
        fits = any(_misfit(value, each, what) is None for each in form)
    elif isinstance(form, dict):
        fits = isinstance(value, dict)
        inner = (
            (f"{what}.{key}", value[key], each) for key, each in form.items() if fits and value.get(key) is not None
        )
    elif isinstance(form, list):
        fits = isinstance(value, list)
        inner = ((f"{what}[{i}]", item, form[0]) for i, item in enumerate(value if fits else ()))
    elif isinstance(form, (set, range)):
        fits = type(value) is (str if isinstance(form, set) else int) and value in form
    else:
        fits = type(value) is form
    if not fits:
        return what, value
    return next(filter(None, (_misfit(each, its, name) for name, each, its in inner)), None)


def _levels(value: Any) -> Iterator[int]:
    """How deep each value lies in a nest; without recursion, so that no depth is too much."""
    waiting = [(value, 0)]
    while waiting:
        inner, level = waiting.pop()
        yield level
        if level <= _DEEPEST and isinstance(inner, (list, dict)):
            waiting += [(each, level + 1) for each in (inner.values() if isinstance(inner, dict) else inner)]
