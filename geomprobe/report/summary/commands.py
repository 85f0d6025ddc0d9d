"""The commands that make a run again, from what its manifests say."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomprobe.report.summary.summary import Summary
from geomprobe.trace.schema import RECORD_FILE, TRACE_FILE

_FLAGS = {"finite_step": "--finite-step", "per_parameter": "--per-parameter", "compiled": "--compile"}


def again(summary: Summary) -> list[str]:
    """Shell lines that record and replay the run anew, beside the old one, and compare the two.

    None for a run of a Python function, or one whose manifest names no script.

    >>> script = {"kind": "script", "path": "train.py", "argv": ["--name", "a b"], "cwd": "/home/her"}
    >>> manifest = {"seed": 0, "strict": False, "script": script}
    >>> for line in again({"path": "/runs/a", "manifest": manifest, "trace": None}):
    ...     print(line)
    cd /home/her
    geomprobe record -o /runs/a-again --seed 0 --no-strict train.py --name 'a b'
    geomprobe replay /runs/a-again
    geomprobe diff /runs/a /runs/a-again
    """
    manifest = summary["manifest"]
    script = manifest.get("script") or {}
    if script.get("kind") not in ("script", "module"):
        return []
    run = _folder(summary)
    new = run.with_name(f"{run.name}-again")
    flag = ["-m"] if script["kind"] == "module" else []
    record = [*_record_options(manifest), *flag, script["path"], *script.get("argv", [])]
    lines = [
        ["cd", script.get("cwd") or "."],
        ["geomprobe", "record", "-o", str(new), *record],
        ["geomprobe", "replay", str(new), *_replay_options(summary["trace"] or {})],
        ["geomprobe", "diff", str(run), str(new)],
    ]
    return [shlex.join(map(str, line)) for line in lines]


def _folder(summary: Summary) -> Path:
    """The run's folder, wherever one stands when the lines are run."""
    path = Path(summary["path"]).absolute()
    if path.name in (RECORD_FILE, TRACE_FILE):
        return path.parent
    return path.with_suffix("") if path.is_file() else path


def _record_options(manifest: Mapping[str, Any]) -> list[str]:
    seed, kept = manifest.get("seed"), manifest.get("recording") or {}
    options = [] if seed is None else ["--seed", str(seed)]
    options += ["--no-strict"] * (manifest.get("strict") is False)
    for name, flag in (("reference_steps", "--reference-steps"), ("ema", "--ema")):
        if kept.get(name):
            options += [flag, ",".join(map(str, kept[name]))]
    return options + ["--average"] * bool(kept.get("average"))


def _replay_options(trace: Summary) -> list[str]:
    """What the replay was asked for; of a reference from a file, only the name is known."""
    measure = trace.get("measure") or {}
    asked = measure.get("options") or {
        **measure,
        "curvature_every": (measure.get("curvature") or {}).get("every", 1),
    }
    options = ["--every", str(asked["every"])] if asked.get("every", 1) != 1 else []
    curvature = asked.get("curvature_every", 1)
    if curvature != 1:
        options += ["--curvature-every", str(curvature)] if curvature else ["--no-curvature"]
    if asked.get("sharpness_every"):
        options += ["--sharpness-every", str(asked["sharpness_every"])]
    options += [flag for name, flag in _FLAGS.items() if asked.get(name)]
    for name in asked.get("files") or {}:
        options += ["--reference", f"{name}=FILE"]
    return options + ["--uncertified"] * (trace.get("status") == "uncertified")
