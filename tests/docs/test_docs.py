"""The documents name what there is: every command, option, column and public name; and what they name is there."""

from __future__ import annotations

import argparse
import ast
import importlib
import runpy
import sys

import pytest
from support.command_server import python
from support.documents import PAGES, ROOT, anchors, blocks, commands, links, relative

from geomprobe.cli import VERBS, build_parser
from geomprobe.trace.schema import ASKED_FOR, INNER_PRODUCTS, STEP_COLUMNS

every_page = pytest.mark.parametrize("page", PAGES, ids=relative)


def verbs() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_in_the_command_line_reference(verb):
    page = (ROOT / "docs" / "cli.md").read_text().partition(f"\n## geomprobe {verb}\n")[2].partition("\n## ")[0]
    options = [name for action in verbs()[verb]._actions for name in action.option_strings]
    assert page
    assert [name for name in options if name not in page] == []


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 11), (3, 12)), reason="argparse words its help by version")
def test_the_command_line_reference_is_up_to_date():
    done = python(ROOT / "scripts" / "make_cli_docs.py", "--check")
    assert done.code == 0, done.err


def test_the_readme_explains_every_column():
    readme = (ROOT / "README.md").read_text()
    assert [column.name for column in STEP_COLUMNS if f"`{column.name}`" not in readme] == []


def test_the_docs_explain_every_other_column():
    docs = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    names = [column.name for column in (*INNER_PRODUCTS, *ASKED_FOR)] + ["same"]
    assert [name for name in names if f"`{name}" not in docs] == []


@every_page
def test_links_between_documents_lead_to_a_page_and_a_heading(page):
    lost = []
    for file, anchor in links(page.read_text()):
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(f"{file}#{anchor}")
    assert lost == []


def test_the_site_has_every_page():
    named = {page.resolve() for page in (ROOT / "docs" / "index.md", *_in_toctrees(PAGES))}
    assert [relative(page) for page in PAGES if page not in named] == []


def _in_toctrees(pages):
    for page in pages:
        trees = [block.text for block in blocks(page.read_text()) if block.info == "{toctree}"]
        for line in "".join(trees).splitlines():
            if line and not line.startswith(":"):
                yield ((page.parent / (line.partition("<")[2].rstrip(">") or line)).with_suffix(".md").resolve())


@pytest.mark.parametrize("module", ["geomprobe", "geomprobe.corridor"])
def test_the_api_has_every_public_name(module):
    page = (ROOT / "docs" / "api" / f"{module.rpartition('.')[2]}.md").read_text()
    listed = page.partition(f".. automodule:: {module}\n   :members:")[2].partition("\n")
    assert listed[1]
    if names := listed[0].replace(",", " ").split():  # else all that __all__ names
        elsewhere = {"GeomprobeError", "ReplayDiverged", "Trace"}  # on the pages of their own modules
        assert set(importlib.import_module(module).__all__) == {*names, *elsewhere}


@every_page
def test_blocks_of_python_are_python(page):
    for info, text in blocks(page.read_text()):
        if info.startswith("python"):
            ast.parse(text)


@every_page
def test_command_lines_of_geomprobe_are_ones_that_its_parser_takes(page, capsys):
    refused = []
    for command in commands(page.read_text()):
        if command[0] == "geomprobe":
            try:
                asked = build_parser().parse_args(_whole(command[1:]))
                assert not (asked.verb == "record" and not (asked.script or asked.module or asked.resume))
            except SystemExit:
                refused.append(" ".join(command))
    assert refused == [], capsys.readouterr().err


def _whole(words: list[str]) -> list[str]:
    """Where a page leaves the rest of a line out, with "...", some rest."""
    return [*words[:-1], "-o", "runs/a", "train.py"] if words[-1] == "..." else words


def test_command_lines_of_scripts_are_ones_that_their_parsers_take(monkeypatch, capsys):
    refused = [line for line in sorted(_script_lines()) if not _takes(line.split(), monkeypatch)]
    assert refused == [], capsys.readouterr().err


def _script_lines() -> set[str]:
    lines = set()
    for command in (each for page in PAGES for each in commands(page.read_text())):
        first = next((i for i, word in enumerate(command) if word.startswith("scripts/")), None)
        if first is not None:
            lines.add(" ".join(command[first:]))
    return lines


class _Parsed(Exception):
    """The script has come as far as its arguments."""


def _takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    script = ROOT / words[0]
    if script.suffix == ".sh":
        return script.exists()
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser, args=None, namespace=None):
        parse_args(parser, args, namespace)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [str(script), *words[1:]])
        patch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Parsed:
            return True
        except SystemExit:
            return False
    raise AssertionError(f"{words[0]} parses no arguments")
