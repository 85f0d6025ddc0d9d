"""A run's summary for a reader: verdict, facts, numbers, the next command, and the commands that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomprobe.report.curves import without_file
from geomprobe.report.summary.summary import Summary, damage
from geomprobe.report.table import number, size, table
from geomprobe.trace.certificate import Certificate
from geomprobe.trace.printable import printable
from geomprobe.trace.schema import SEALING_PREFIX, STREAM_DIR


def render(summary: Summary) -> str:
    """The summary as a page of text: the verdict first, then the run, its columns and its files."""
    run = "\n".join(["run", *(f"  {name:<12} {fact}" for name, fact in facts(summary).items())])
    files = [[name, size(count)] for name, count in summary["files"].items()]
    return "\n\n".join([_head(summary), run, _columns(summary), table(["file", "size"], files, right=[1])])


def _head(summary: Summary) -> str:
    """What each pass left, and the certificate, loud where it is none."""
    lines = [summary["path"], *(f"  {name:<12} {state}" for name, state in _passes(summary).items())]
    trace = summary["trace"]
    if trace and "error" not in trace:
        first, *more = _certificate(trace)
        lines += [f"  certificate  {first}", *(f"               {line}" for line in more)]
        lines += [f"  absent       {line}" for line in absences(summary)]
    return "\n".join(lines)


def _passes(summary: Summary) -> dict[str, str]:
    found = {}
    for name in ("record", "trace"):
        if entry := summary[name]:
            epochs = f", {entry['num_epochs']} epochs" if entry.get("num_epochs") else ""
            found[name] = (
                printable(entry["error"])
                if "error" in entry
                else f"{entry['status']}, {entry['num_steps']} steps{epochs}"
            )
    return found


def _certificate(trace: Summary) -> list[str]:
    if not trace["certificate"]:
        return ["none: the replay has not finished"]
    certificate = Certificate.of(trace["certificate"])
    line = f"{certificate.counts}, w_T {'bitwise' if certificate.final_weights_equal else 'NOT'} equal"
    if trace["status"] == "complete":
        return [line]
    loud = "UNCERTIFIED: what follows is of a run that is not the recorded one"
    first = certificate.first_difference
    return [
        loud if trace["status"] == "uncertified" else trace["status"].upper(),
        line,
        *([f"first difference: {first}"] if first else []),
    ]


def absences(summary: Summary) -> list[str]:
    """A line for each reason for which a trace lacks numbers: how often, from which step, and why."""
    trace = summary["trace"] or {}
    found = [
        f"in {each['steps']} of {trace['num_steps']} steps, first {each['first']}: {each['reason']}"
        for each in trace.get("absences", [])
    ]
    missing = ((trace.get("measure") or {}).get("curvature") or {}).get("missing")
    return [*found, f"no Hg: {missing}"] if missing else found


def _columns(summary: Summary) -> str:
    """One line a column that holds numbers; the names of those that do not, below."""
    keys = ("first", "last", "minimum", "maximum", "mean")
    columns = _first(summary, "columns", "trace", "record")
    rows = [
        [c["name"], c["units"], *("-" if c[k] is None else number(c[k]) for k in keys), str(c["missing"])]
        for c in columns
        if c["measured"]
    ]
    empty = ", ".join(c["name"] for c in columns if not c["measured"])
    header = ["column", "units", "first", "last", "min", "max", "mean", "NaN"]
    text = table(header, rows, right=range(2, 8))
    return f"{text}\nnot measured: {empty}" if empty else text


def _first(summary: Summary, key: str, *passes: str) -> Any:
    return next(summary[name][key] for name in passes if summary[name] and key in summary[name])


def next_command(summary: Summary) -> str:
    """The command that takes this run further."""
    path, record, trace = without_file(Path(summary["path"])), summary["record"] or {}, summary["trace"] or {}
    if any((path / STREAM_DIR).glob(f"{SEALING_PREFIX}*")):
        return f"geomprobe replay {path}"  # which first finishes the sealing that was cut off
    status = trace.get("status")
    if status in ("complete", "uncertified"):
        return f"geomprobe verify {path}"
    if status == "diverged":
        return f"geomprobe replay {path} --force --uncertified"
    if status == "incomplete":
        return f"geomprobe replay {path} --resume"
    if record.get("status") == "complete":
        return f"geomprobe replay {path}"
    return f"geomprobe record -o {path} --resume"


def facts(summary: Summary) -> dict[str, str]:
    """What a run was, by name: script, optimizer, model and measurements. What is not known is left out.

    >>> manifest = {"seed": 0, "optimizer": {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0}]}}
    >>> record = {"num_parameters": 1200, "references": ["final"], "fingerprints": {"loss": 1}}
    >>> facts({"record": record, "trace": None, "manifest": manifest})
    {'seed': '0', 'optimizer': 'SGD lr 0.1', 'parameters': '1,200', 'references': 'final', 'fingerprints': 'loss 1'}
    """
    manifest, record, trace = summary["manifest"], summary["record"] or {}, summary["trace"] or {}
    script, model = manifest.get("script") or {}, manifest.get("model") or {}
    flag = "-m " if script.get("kind") == "module" else ""
    dtype = model.get("dtype") or ""
    # Only the replay has references that came from files.
    references = dict.fromkeys([*record.get("references", []), *trace.get("references", [])])
    found = {
        "script": f"{flag}{' '.join([script.get('path') or '', *(script.get('argv') or [])])}".strip(),
        "seed": manifest.get("seed"),
        "strict": manifest.get("strict"),
        "optimizer": _optimizer(manifest.get("optimizer") or {}),
        "model": f"{model.get('class') or ''} {'+'.join(dtype) if isinstance(dtype, list) else dtype}".strip(),
        **_updates(manifest.get("updates") or {}),
        "parameters": f"{_first(summary, 'num_parameters', 'record', 'trace'):,}",
        "references": ", ".join(references),
        "sketch": _sketch(manifest.get("sketch") or {}),
        "measured": _measured(trace),
        "software": ", ".join(f"{name} {v}" for name, v in (manifest.get("software") or {}).items() if v),
        "fingerprints": ", ".join(f"{name} {n}" for name, n in record.get("fingerprints", {}).items()),
    }
    return {name: printable(str(fact)) for name, fact in found.items() if fact not in (None, "")}


def _sketch(sketch: Mapping[str, Any]) -> str:
    """How large a recording's sketch is, and of which steps; empty where it has none.

    >>> _sketch({"size": 4096, "every": 5})
    '4,096 numbers of the weights and of the gradient, every 5 steps'
    """
    if not isinstance(size := sketch.get("size"), int):
        return ""
    every = sketch.get("every")
    steps = "each step" if every == 1 else f"every {every} steps"
    return f"{size:,} numbers of the weights and of the gradient, {steps}"


def _optimizer(optimizer: Mapping[str, Any]) -> str:
    shown = ("lr", "momentum", "betas", "weight_decay")
    groups = [
        ", ".join(f"{key} {json.dumps(group[key])}" for key in shown if group.get(key) not in (None, 0))
        for group in optimizer.get("groups") or []
    ]
    return f"{optimizer.get('class', '')} {'; '.join(groups)}".strip()


def _updates(updates: Mapping[str, Any]) -> dict[str, str]:
    """Which gradient G is, and how many attempts at a step led to one, where not all did."""
    if not updates.keys() >= {"gradient", "clipped_by", "attempted", "applied"}:
        return {}
    found = {"gradient": ", after ".join([updates["gradient"], *updates["clipped_by"]])}
    attempted, applied = updates["attempted"], updates["applied"]
    if attempted != applied:
        found["attempted"] = f"{attempted} steps, of which {attempted - applied} overflowed and {applied} were applied"
    return found


def _measured(trace: Summary) -> str:
    if "measure" not in trace:
        return ""
    options = trace["measure"]
    every = options.get("every") or 1
    rows = ["each step" if every == 1 else f"each {every}th step"]
    if tensors := len(trace["per_parameter"]):
        rows.append(f"and per parameter ({tensors} tensors)")
    if held_out := options.get("held_out_every"):
        rows.append(f"a held-out minibatch in 1 of {held_out} steps")
    if full := options.get("full_gradient_every"):
        rows.append(f"the full gradient after 1 of {full} epochs")
    return ", ".join(rows)


@dataclass(frozen=True)
class Verdict:
    """Whether a run's replay was the recorded run.

    Attributes:
        mark: ``"good"`` where the replay is proven to be the recorded run, ``"wait"`` where a pass is still to
            come, ``"bad"`` where something failed or differed.
        headline: the verdict in a few words.
        lines: the reasons.
        passes: the state of ``"record"`` and ``"trace"``.
        damage: what of the run is there and cannot be read; empty where nothing is.
    """

    mark: str
    headline: str
    lines: list[str]
    passes: dict[str, str]
    damage: str = ""


def verdict(summary: Summary) -> Verdict:
    """The verdict on a run that `summarize` has read.

    >>> found = {"steps_recorded": 3, "steps_compared": 2, "steps_equal": 1, "final_weights_equal": False}
    >>> first = {"step": 1, "component": "loss", "tensor": "loss"}
    >>> trace = {"status": "diverged", "num_steps": 1, "num_epochs": 0}
    >>> result = verdict({"record": None, "trace": {**trace, "certificate": {**found, "first_difference": first}}})
    >>> result.mark, result.headline, result.lines[1]
    ('bad', 'The replay diverged', 'First difference: step 1, loss, loss.')
    """
    trace = summary["trace"] or {}
    judged = _of_trace(trace) if "status" in trace else _of_record(summary["record"] or {})
    return Verdict(*judged, _passes(summary), damage(summary))


def _of_record(record: Summary) -> tuple[str, str, list[str]]:
    status = record.get("status")
    if status == "complete":
        return "wait", "Recorded, not replayed", ["Nothing is measured before the replay."]
    if status == "failed":
        reason = "The script ended with an error; what it did until then is kept."
        return "bad", "The recording failed", [reason]
    return "wait", "The recording has not finished", [f"{record['num_steps']} steps so far."]


def _of_trace(trace: Summary) -> tuple[str, str, list[str]]:
    certificate, status = Certificate.of(trace["certificate"]), trace["status"]
    lines = _compared(certificate) if trace["certificate"] else []
    if status == "incomplete":
        return "wait", "The replay has not finished", [f"{trace['num_steps']} steps so far.", *lines]
    if status == "uncertified":
        warning = "What follows is of a run that is not proven to be the recorded one."
        return "bad", "UNCERTIFIED", [warning, *lines]
    if status == "diverged":
        return "bad", "The replay diverged", lines
    if certificate.why_not(trace["num_steps"]):
        warning = f"The trace calls itself {status}, but its certificate does not say so."
        return "bad", "No valid certificate", [warning, *lines]
    return "good", "Certified: the recorded run, bit for bit", lines


def _compared(certificate: Certificate) -> list[str]:
    weights = "bitwise equal" if certificate.final_weights_equal else "NOT equal"
    lines = [
        f"Of {certificate.steps_recorded} recorded steps, {certificate.steps_compared} were compared and "
        f"{certificate.steps_equal} are equal; the final weights are {weights}."
    ]
    if certificate.first_difference:
        lines.append(f"First difference: {certificate.first_difference}.")
    if certificate.components:
        lines.append(f"Compared in each step: {', '.join(certificate.components)}.")
    return lines


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
    run = without_file(Path(summary["path"]).absolute())
    run = run.with_suffix("") if run.is_file() else run
    new = run.with_name(f"{run.name}-again")
    flag = ["-m"] if script["kind"] == "module" else []
    processes = (manifest.get("ranks") or {}).get("world_size") or 1
    program = ["torchrun", "--nproc-per-node", processes, "-m", "geomprobe"] if processes > 1 else ["geomprobe"]
    record = (manifest.get("recording") or {}).get("argv") or []
    replay = ((summary["trace"] or {}).get("measure") or {}).get("argv") or []
    lines = [
        ["cd", script.get("cwd") or "."],
        [*program, "record", "-o", new, *record, *flag, script.get("path") or "", *(script.get("argv") or [])],
        [*program, "replay", new, *replay],
        ["geomprobe", "diff", run, new],
    ]
    return [shlex.join(map(str, line)) for line in lines]
