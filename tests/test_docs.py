"""The documents name what there is: every command, option and column."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from geomprobe.cli import VERBS, build_parser
from geomprobe.trace.schema import ASKED_FOR, INNER_PRODUCTS, STEP_COLUMNS

ROOT = Path(__file__).parent.parent


def verbs() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_in_the_command_line_reference(verb):
    page = (
        (ROOT / "docs" / "cli.md").read_text().partition(f"\n## geomprobe {verb}\n")[2].partition("\n## ")[0]
    )
    options = [name for action in verbs()[verb]._actions for name in action.option_strings]
    assert page
    assert [name for name in options if name not in page] == []


@pytest.mark.skipif(
    sys.version_info[:2] not in ((3, 11), (3, 12)), reason="argparse words its help by version"
)
def test_the_command_line_reference_is_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "make_cli_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_explains_every_column():
    readme = (ROOT / "README.md").read_text()
    assert [column.name for column in STEP_COLUMNS if f"`{column.name}`" not in readme] == []


def test_the_docs_explain_every_other_column():
    docs = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    names = [column.name for column in (*INNER_PRODUCTS, *ASKED_FOR)] + ["same"]
    assert [name for name in names if f"`{name}" not in docs] == []


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_between_documents_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
