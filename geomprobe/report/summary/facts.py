"""What a run was: its script, optimizer, model and measurements, as a few short lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from geomprobe.report.summary.summary import Summary


def facts(summary: Summary) -> dict[str, str]:
    """What is known of a run, by name; what is not known is left out.

    >>> manifest = {"seed": 0, "optimizer": {"class": "SGD", "groups": [{"lr": 0.1, "momentum": 0}]}}
    >>> record = {"num_parameters": 1200, "references": ["final"], "fingerprints": {"loss": 1}}
    >>> facts({"record": record, "trace": None, "manifest": manifest})
    {'seed': '0', 'optimizer': 'SGD lr 0.1', 'parameters': '1,200', 'references': 'final', 'fingerprints': 'loss 1'}
    """
    manifest = summary["manifest"]
    found = {
        "script": _script(manifest.get("script") or {}),
        "seed": manifest.get("seed"),
        "strict": manifest.get("strict"),
        "optimizer": _optimizer(manifest.get("optimizer") or {}),
        "model": _model(manifest.get("model") or {}),
        **_updates(manifest.get("updates") or {}),
        "parameters": f"{_of_either(summary, 'num_parameters'):,}",
        "references": ", ".join(_references(summary)),
        "measured": _measured(summary["trace"] or {}),
        "software": ", ".join(f"{name} {v}" for name, v in (manifest.get("software") or {}).items() if v),
        "fingerprints": _fingerprints(summary["record"] or {}),
    }
    return {name: str(fact) for name, fact in found.items() if fact not in (None, "")}


def _script(script: Mapping[str, Any]) -> str:
    flag = "-m " if script.get("kind") == "module" else ""
    return f"{flag}{' '.join([script.get('path', ''), *script.get('argv', [])])}".strip()


def _of_either(summary: Summary, key: str) -> Any:
    return next(each[key] for each in (summary["record"], summary["trace"]) if each and key in each)


def _references(summary: Summary) -> list[str]:
    """Those of the recording, and those that only the replay had, from files."""
    kept = [
        name for each in (summary["record"], summary["trace"]) for name in (each or {}).get("references", [])
    ]
    return list(dict.fromkeys(kept))


def _optimizer(optimizer: Mapping[str, Any]) -> str:
    shown = ("lr", "momentum", "betas", "weight_decay")
    groups = [
        ", ".join(f"{key} {json.dumps(group[key])}" for key in shown if group.get(key) not in (None, 0))
        for group in optimizer.get("groups", [])
    ]
    return f"{optimizer.get('class', '')} {'; '.join(groups)}".strip()


def _model(model: Mapping[str, Any]) -> str:
    dtype = model.get("dtype", "")
    return f"{model.get('class') or ''} {'+'.join(dtype) if isinstance(dtype, list) else dtype}".strip()


def _updates(updates: Mapping[str, Any]) -> dict[str, str]:
    """Which gradient G is, and how many attempts at a step led to one, where not all did."""
    if not updates:
        return {}
    found = {"gradient": ", after ".join([updates["gradient"], *updates["clipped_by"]])}
    attempted, applied = updates["attempted"], updates["applied"]
    if attempted != applied:
        found["attempted"] = (
            f"{attempted} steps, of which {attempted - applied} overflowed and {applied} were applied"
        )
    return found


def _measured(trace: Summary) -> str:
    if "measure" not in trace:
        return ""
    options = trace["measure"]
    every = options.get("every", 1)
    rows = ["each step" if every == 1 else f"each {every}th step"]
    if tensors := len(trace["per_parameter"]):
        rows.append(f"and per parameter ({tensors} tensors)")
    if held_out := options.get("held_out_every"):
        rows.append(f"a held-out minibatch in 1 of {held_out} steps")
    if full := options.get("full_gradient_every"):
        rows.append(f"the full gradient after 1 of {full} epochs")
    return ", ".join(rows)


def _fingerprints(record: Summary) -> str:
    return ", ".join(f"{name} {count}" for name, count in record.get("fingerprints", {}).items())
