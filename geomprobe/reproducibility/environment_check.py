"""Whether the environment of a recording is the one at hand, as far as it can move bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomprobe.errors import EnvironmentMismatch
from geomprobe.reproducibility.environment import file_digest

UNCERTIFIED = " (`replay --uncertified` goes on without a certificate.)"

_NOTHING = {"replay": "nothing was replayed", "go on": "nothing was done"}

# Sections of the manifest whose every entry must be equal for a replay to be the same run.
# "host" and "measure" are there to read; they change no bits of the training.
BINDING_SECTIONS = ("seed", "strict", "script", "sources", "software", "hardware", "environment", "flags")
FIRST_STEP_SECTIONS = ("flags", "optimizer", "model", "loader", "ranks")


def require_same_start(
    recorded: Mapping[str, Any], manifest: Mapping[str, Any], run: Path, doing: str
) -> None:
    """Refuse to replay a run, or to go on with it, where the script or the environment has changed.

    Args:
        recorded: the manifest of the recording.
        manifest: what is known now, before the script runs.
        run: what was recorded.
        doing: what is refused: ``"replay"`` or ``"go on"``.

    Raises:
        EnvironmentMismatch: naming what changed.
    """
    before, now = recorded["script"], manifest["script"]
    changed = changed_sources(recorded.get("sources", {}), Path(now.get("root") or "."))
    if before["sha256"] != now["sha256"] and before["path"] == now["path"]:
        changed = [
            now["path"],
            *(name for name in changed if Path(now["root"] or ".", name) != Path(now["path"])),
        ]
    if changed and before.get("root") == now.get("root"):
        raise EnvironmentMismatch(
            f"{', '.join(changed)} changed since {run} was recorded, so to {doing} would make another run: "
            f"{_NOTHING[doing]}. Restore the recorded version, or record anew."
            f"{UNCERTIFIED if doing == 'replay' else ''}"
        )
    sections = tuple(s for s in BINDING_SECTIONS if s not in FIRST_STEP_SECTIONS and s != "sources")
    require_same(recorded, manifest, sections, run, doing)


def changed_sources(recorded: Mapping[str, str], root: Path) -> list[str]:
    """Recorded files that are gone or different below ``root``."""
    return [name for name, digest in recorded.items() if file_digest(root / name) != digest]


def first_mismatch(
    recorded: Mapping[str, Any], present: Mapping[str, Any], sections: tuple[str, ...]
) -> tuple[str, Any, Any] | None:
    """The first entry of ``sections`` whose value differs: its dotted name and both values.

    >>> first_mismatch({"flags": {"threads": 2}}, {"flags": {"threads": 1}}, ("flags",))
    ('flags.threads', 2, 1)
    """
    for section in sections:
        if section in recorded or section in present:
            found = _difference(section, recorded.get(section), present.get(section))
            if found is not None:
                return found
    return None


def _difference(name: str, recorded: Any, present: Any) -> tuple[str, Any, Any] | None:
    if isinstance(recorded, Mapping) and isinstance(present, Mapping):
        pairs = [(f"{name}.{key}", recorded.get(key), present.get(key)) for key in {**recorded, **present}]
    elif isinstance(recorded, list) and isinstance(present, list) and len(recorded) == len(present):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(recorded, present, strict=True))]
    else:
        return None if recorded == present else (name, recorded, present)
    return next((found for pair in pairs if (found := _difference(*pair)) is not None), None)


def require_same_kind(recorded: Mapping[str, Any], present: Mapping[str, Any], what: Path) -> None:
    """Refuse another optimizer than the one that a checkpoint is of; its hyperparameters may have moved on.

    Args:
        recorded: the manifest's section ``optimizer``.
        present: the same of this process.
        what: the checkpoint.

    Raises:
        EnvironmentMismatch: its class or the sizes of its groups differ.
    """
    before, now = (
        (section["class"], [group["num_parameters"] for group in section["groups"]])
        for section in (recorded, present)
    )
    if before != now:
        raise EnvironmentMismatch(
            f"{what} is of {before[0]} with groups of {before[1]} tensors, and here is {now[0]} with {now[1]}: nothing "
            "was done. Build the same optimizer, or record anew."
        )


def require_same(
    recorded: Mapping[str, Any],
    present: Mapping[str, Any],
    sections: tuple[str, ...],
    run: Path,
    doing: str = "replay",
) -> None:
    """Refuse to replay a run, or to go on with it, in an environment that differs from the recording's.

    Args:
        recorded: the manifest of the recording.
        present: what is found now.
        sections: which sections count.
        run: what was recorded.
        doing: what is refused: ``"replay"`` or ``"go on"``.

    Raises:
        EnvironmentMismatch: naming the entry and both values.
    """
    found = first_mismatch(recorded, present, sections)
    if found is None:
        return
    name, before, now = found
    raise EnvironmentMismatch(
        f"{run} was recorded with {name} = {before!r}, but here it is {now!r}, which can change bits: "
        f"{_NOTHING[doing]}. Restore {name} to {before!r} and {doing} again, or record anew with "
        f"`geomprobe record`.{UNCERTIFIED if doing == 'replay' else ''}"
    )
