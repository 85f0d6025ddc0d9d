"""Whether a run's replay was the recorded run, as a headline and the lines that bear it out."""

from __future__ import annotations

from dataclasses import dataclass

from geomprobe.report.summary.summary import Summary


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run first.

    Attributes:
        mark: ``"good"`` where the replay is proven to be the recorded run, ``"wait"`` where a pass is still to
            come, ``"bad"`` where something failed or differed.
        headline: the verdict in a few words.
        lines: what bears it out.
        passes: the state of ``"record"`` and ``"trace"``.
    """

    mark: str
    headline: str
    lines: list[str]
    passes: dict[str, str]


def verdict(summary: Summary) -> Verdict:
    """The verdict on a run of which `summarize` told.

    >>> said = {"steps_recorded": 3, "steps_compared": 2, "steps_equal": 1, "final_weights_equal": False}
    >>> first = {"step": 1, "component": "loss", "tensor": "loss"}
    >>> trace = {"status": "diverged", "num_steps": 1, "num_epochs": 0}
    >>> found = verdict({"record": None, "trace": {**trace, "certificate": {**said, "first_difference": first}}})
    >>> found.mark, found.headline, found.lines[1]
    ('bad', 'The replay diverged', 'First difference: step 1, loss, loss.')
    """
    trace, record = summary["trace"] or {}, summary["record"] or {}
    mark, headline, lines = _of_trace(trace) if "status" in trace else _of_record(record)
    passes = {
        name: each.get("error") or _steps(each)
        for name, each in (("record", record), ("trace", trace))
        if each
    }
    return Verdict(mark, headline, lines, passes)


def _steps(entry: Summary) -> str:
    epochs = f", {entry['num_epochs']} epochs" if entry["num_epochs"] else ""
    return f"{entry['status']}, {entry['num_steps']} steps{epochs}"


def _of_record(record: Summary) -> tuple[str, str, list[str]]:
    status = record.get("status")
    if status == "complete":
        return "wait", "Recorded, not replayed", ["Nothing is measured before the replay."]
    if status == "failed":
        return (
            "bad",
            "The recording failed",
            ["The script ended with an error; what it did until then is kept."],
        )
    return "wait", "The recording has not finished", [f"{record['num_steps']} steps so far."]


def _of_trace(trace: Summary) -> tuple[str, str, list[str]]:
    said, status = trace["certificate"], trace["status"]
    lines = _compared(said)
    if status == "incomplete":
        return "wait", "The replay has not finished", [f"{trace['num_steps']} steps so far.", *lines]
    if status == "uncertified":
        warning = "What follows is of a run that is not proven to be the recorded one."
        return "bad", "UNCERTIFIED", [warning, *lines]
    if status == "diverged":
        return "bad", "The replay diverged", lines
    if not _holds(said):
        warning = f"The trace calls itself {status}, but its certificate does not say so."
        return "bad", "No valid certificate", [warning, *lines]
    return "good", "Certified: the recorded run, bit for bit", lines


def _holds(said: Summary) -> bool:
    recorded = said.get("steps_recorded")
    whole = recorded is not None and said.get("steps_compared") == recorded == said.get("steps_equal")
    return whole and bool(said.get("final_weights_equal")) and not said.get("first_difference")


def _compared(said: Summary) -> list[str]:
    """The certificate in sentences; none where there is none."""
    if not said:
        return []
    weights = "bitwise equal" if said.get("final_weights_equal") else "NOT equal"
    lines = [
        f"Of {said.get('steps_recorded')} recorded steps, {said.get('steps_compared')} were compared and "
        f"{said.get('steps_equal')} are equal; the final weights are {weights}."
    ]
    first = said.get("first_difference")
    if first:
        lines.append(f"First difference: step {first['step']}, {first['component']}, {first['tensor']}.")
    if said.get("components"):
        lines.append(f"Compared in each step: {', '.join(said['components'])}.")
    return lines
