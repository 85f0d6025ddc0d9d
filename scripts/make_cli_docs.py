"""Write docs/cli.md from the commands' own --help; with --check, fail where it is out of date.

python scripts/make_cli_docs.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = "# The command line\n\nMade by `python scripts/make_cli_docs.py` from each command's `--help`.\n"


def rendered() -> str:
    """The page."""
    os.environ["COLUMNS"] = "100"  # argparse wraps to the terminal
    from geomprobe.cli import build_parser

    parser = build_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    pages = [f"\n## geomprobe\n\n```\n{parser.format_help().rstrip()}\n```\n"]
    pages += [
        f"\n## geomprobe {name}\n\n```\n{verb.format_help().rstrip()}\n```\n" for name, verb in verbs.choices.items()
    ]
    return HEAD + "".join(pages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    if not parser.parse_args().check:
        TARGET.write_text(rendered())
        print(f"Wrote {TARGET}")
        return 0
    if TARGET.read_text() == rendered():
        return 0
    print(f"{TARGET} is out of date: run python scripts/make_cli_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
