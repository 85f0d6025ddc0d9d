"""The commands that make a run again: what its manifests say of the script, the options and the processes."""

from __future__ import annotations

import shlex
from pathlib import Path

from geomprobe.report.summary.summary import Summary
from geomprobe.trace.schema import RECORD_FILE, TRACE_FILE


def again(summary: Summary) -> list[str]:
    """Shell lines that record and replay the run once more, beside the old one, and compare the two.

    None for a run of a Python function, or one whose manifest names no script.

    >>> script = {"kind": "script", "path": "train.py", "argv": ["--name", "a b"], "cwd": "/home/her"}
    >>> manifest = {"script": script, "recording": {"argv": ["--seed", "0"]}, "ranks": {"world_size": 2}}
    >>> trace = {"measure": {"argv": ["--every", "10"]}}
    >>> for line in again({"path": "/runs/a", "manifest": manifest, "trace": trace}):
    ...     print(line)
    cd /home/her
    torchrun --nproc-per-node 2 -m geomprobe record -o /runs/a-again --seed 0 train.py --name 'a b'
    torchrun --nproc-per-node 2 -m geomprobe replay /runs/a-again --every 10
    geomprobe diff /runs/a /runs/a-again
    """
    manifest = summary["manifest"]
    script = manifest.get("script") or {}
    if script.get("kind") not in ("script", "module"):
        return []
    run = _folder(summary)
    new = run.with_name(f"{run.name}-again")
    flag = ["-m"] if script["kind"] == "module" else []
    processes = (manifest.get("ranks") or {}).get("world_size", 1)
    program = (
        ["torchrun", "--nproc-per-node", processes, "-m", "geomprobe"] if processes > 1 else ["geomprobe"]
    )
    record = (manifest.get("recording") or {}).get("argv") or []
    replay = ((summary["trace"] or {}).get("measure") or {}).get("argv") or []
    lines = [
        ["cd", script.get("cwd") or "."],
        [*program, "record", "-o", new, *record, *flag, script["path"], *script.get("argv", [])],
        [*program, "replay", new, *replay],
        ["geomprobe", "diff", run, new],
    ]
    return [shlex.join(map(str, line)) for line in lines]


def _folder(summary: Summary) -> Path:
    """The run's folder, wherever one stands when the lines are run."""
    path = Path(summary["path"]).absolute()
    if path.name in (RECORD_FILE, TRACE_FILE):
        return path.parent
    return path.with_suffix("") if path.is_file() else path
