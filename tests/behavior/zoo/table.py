"""Print the table of the zoo: ``PYTHONPATH=tests python -m behavior.zoo.table``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from behavior.zoo.witness import Loop, all_loops, examine
from geomprobe.errors import GeomprobeError


def cells(loop: Loop, folder: Path) -> tuple[str, str]:
    """The columns that are right, and those that are absent, and why; what is wrong, if anything is."""
    try:
        verdict = examine(loop, folder)
    except GeomprobeError as error:
        return "", f"refused: {str(error).partition('.')[0]}" + ("" if loop.refused else " **unexpectedly**")
    except Exception as error:  # the rest of the table is wanted all the same
        return "", f"**CRASH** {type(error).__name__}: {error}"
    absent: dict[str, list[str]] = {}
    for column, reasons in verdict.absent.items():
        absent.setdefault("; ".join(sorted(reasons)), []).append(column)
    notes = [", ".join(names) + (f" ({why})" if why else "") for why, names in absent.items()]
    notes += [f"**WRONG** {line}" for line in verdict.wrong]
    return (f"all {len(verdict.right)}" if not notes else str(len(verdict.right))), "; ".join(notes)


def main() -> None:
    """Run every loop whose name holds one of the arguments, or all of them."""
    chosen = [each for each in all_loops().values() if not sys.argv[1:] or any(a in each.name for a in sys.argv[1:])]
    print("| loop | what it does | columns right | absent, and why |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for each in chosen:
            right, absent = cells(each, Path(folder) / each.name)
            print(f"| {each.family}: {each.name} | {each.what} | {right} | {absent} |".replace("||", "&#124;&#124;"))


if __name__ == "__main__":
    main()
