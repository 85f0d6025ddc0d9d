"""Make the table of the zoo: ``PYTHONPATH=tests python -m behavior.zoo.table > docs/zoo.md``, half a second a loop.

Words after it choose the loops whose names hold one of them. ``--jobs N`` lets N processes share them. What was found
of each goes to standard error at once. The exit code is 1 where a number is wrong, or a loop crashes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from behavior.zoo.witness import Loop, Verdict, all_loops, examine
from geomprobe.errors import GeomprobeError
from geomprobe.trace.absence import ABSENCES

START = """# The zoo of training loops

Made by `PYTHONPATH=tests python -m behavior.zoo.table > docs/zoo.md`. Each line is a training loop of
`tests/behavior/zoo`, with a truth of its own in float64, found without geomprobe
([how](right-or-absent.md#how-it-is-tested)). Each cell of each column was compared with it in every row.

{counts}

- **right**: how many of the {most} columns are the truth in every row: `epoch`, `loss`, `lr`, `grad_norm`, `distance`,
  `grad_dot_offset`, `rsi`, `eb`, `cosine`, `lolr`, `clr`, `hg_norm`, `g_hg`, and `optimizer` where several step. A
  column that has no truth in a loop, as the epoch of a loop without epochs, does not count.
- **absent**: columns with NaN in at least one row, and the numbers of the reasons
  [why](right-or-absent.md#where-it-is-said). `Hg` is both `hg_norm` and `g_hg`. Their other rows are right.
"""


class Line(NamedTuple):
    """What became of one loop: ``kind`` is ``right``, ``absent``, ``refused`` or ``wrong``."""

    loop: str
    kind: str
    cells: str


def line_of(name: str) -> Line:
    """Examine a loop."""
    loop = all_loops()[name]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            found = _told(examine(loop, Path(folder) / "run"))
    except GeomprobeError as error:
        expected = loop.refused is not None and re.search(loop.refused, str(error))
        reason = re.sub(r"/\S*/run\b", "the run", str(error)).partition(". ")[0]
        found = ("refused", f"| | refused: {reason}") if expected else ("wrong", f"| | **REFUSED** {error}")
    except Exception as error:  # the rest of the table is wanted all the same
        found = "wrong", f"| | **CRASH** {type(error).__name__}: {error}"
    print(f"{name}: {found[0]}", file=sys.stderr, flush=True)
    return Line(name, *found)


def _told(verdict: Verdict) -> tuple[str, str]:
    numbers = {absence.reason: absence.number for absence in ABSENCES}
    absent: dict[tuple[int, ...], list[str]] = {}
    for column, reasons in verdict.absent.items():
        absent.setdefault(tuple(sorted(numbers[reason] for reason in reasons)), []).append(column)
    notes = []
    for why, columns in absent.items():
        names = ", ".join(columns).replace("hg_norm, g_hg", "Hg")
        notes.append(f"{names}: {', '.join(map(str, why))}" if why else f"{names}: no such column")
    notes += [f"**WRONG** {line}" for line in verdict.wrong]
    kind = "wrong" if verdict.wrong else "absent" if notes else "right"
    return kind, f"| {len(verdict.right)} | {'; '.join(notes)}"


def page(loops: Sequence[Loop], lines: Sequence[Line]) -> str:
    """The page: how many loops are of each kind, and a table for each family."""
    count = {kind: sum(line.kind == kind for line in lines) for kind in ("right", "absent", "refused", "wrong")}
    counts = (
        f"**{len(lines)} loops: {count['wrong']} wrong.** In {count['right']} every column is right, in "
        f"{count['absent']} what is there is right and the rest is absent, and {count['refused']} are refused by name."
    )
    text = [START.format(counts=counts, most=14)]
    of = {line.loop: line for line in lines}
    for family, members in itertools.groupby(sorted(loops, key=lambda each: each.family), lambda each: each.family):
        text.append(f"\n## {family[0].upper()}{family[1:]}\n\n| loop | right | absent, and why |\n|---|---|---|")
        text += [f"| `{each.name}`: {_cell(each.what)} {_escaped(of[each.name].cells)} |" for each in members]
    return "\n".join(text)


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "&#124;")


def _escaped(text: str) -> str:
    """As it is read in a table of Markdown, where ``_`` and ``*`` may be marks and ``<`` a tag."""
    return re.sub(r"\s+", " ", text).replace("<", "&lt;").replace("__", r"\_\_")


def main() -> int:
    """Examine the loops that are wanted, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    loops = [each for each in all_loops().values() if not asked.words or any(a in each.name for a in asked.words)]
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        lines = list(pool.map(line_of, (each.name for each in loops)))
    print(page(loops, lines))
    return int(any(line.kind == "wrong" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
