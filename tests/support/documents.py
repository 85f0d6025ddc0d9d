"""The documents' parts: pages, anchors, links, blocks, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|(?<=^\n))(?: {4}.*\n|\n(?= {4}))+", re.MULTILINE)
_COMMENT = re.compile(r"\s+#.*$| {2,}\S.*$| \(.*\)$")  # `--help` texts have no sign before theirs
_NEXT = {"&&", "||", "|", ";", "&", "{", "}", "(", ")", "then"}


class Block(NamedTuple):
    """A block of code, and what its fence says of it: "" where it is indented."""

    info: str
    text: str


def relative(page: Path) -> str:
    """The page's path in the repository, to name tests by."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """Fenced and indented blocks, in their order.

    >>> blocks("a\\n\\n    ls\\n\\n```sh run\\npwd\\n```\\n")
    [Block(info='', text='ls\\n'), Block(info='sh run', text='pwd\\n')]
    """
    found = [(match.start(), Block(*match.groups())) for match in _FENCED.finditer(text)]
    prose = _FENCED.sub(lambda match: "\n" * len(match[0]), text)
    for match in _INDENTED.finditer(prose):
        found.append((match.start(), Block("", re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE).rstrip() + "\n")))
    return [block for _, block in sorted(found)]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCED.sub("", text)


def links(text: str) -> list[tuple[str, str]]:
    """(file, anchor) of each relative link and picture."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [(file, anchor) for file, _, anchor in (t.partition("#") for t in targets if "://" not in t)]


def anchors(page: Path) -> set[str]:
    """Those that viewers of Markdown make of headings: GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """Words of each command in the blocks that hold shell, after the prompt's own: assignments, srun, trap.

    >>> commands("x\\n\\n    srun geomprobe replay runs/a --segment $N/8 || exit   # one of eight\\n")
    [['geomprobe', 'replay', 'runs/a', '--segment', '1/8']]
    """
    lines = [
        line
        for info, block in blocks(text)
        if not info.startswith("python")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`((?:python|sh) scripts/[^`]+|torchrun [^`]+)`", prose(text))
    return [words for line in lines for words in _commands(line)]


def _commands(line: str) -> list[list[str]]:
    line = _COMMENT.sub("", re.sub(r"(?<=\S) +\\? +(?=-)", " ", line.strip()))
    if re.match(r"#|\[|usage:", line) or ("geomprobe" not in line and "scripts/" not in line):
        return []
    try:
        words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", line).replace(";", " ; "))
    except ValueError:
        return []  # prose of a help text, with an apostrophe
    found: list[list[str]] = [[]]
    for word in words:
        if word in _NEXT:
            found.append([])
        else:
            found[-1].append(word)
    return [command for each in found if (command := _without_launcher(each))]


def _without_launcher(words: list[str]) -> list[str]:
    """From `geomprobe` or the script on; empty where the words are another command."""
    for i, word in enumerate(words):
        if word == "geomprobe" and (i == 0 or words[0] == "srun" or words[i - 1] == "-m"):
            return words[i:]
        if re.fullmatch(r"scripts/[\w/]+(\.py|\.sh)?", word) and i and words[0] in ("python", "sh", "torchrun"):
            return words[i:]
    return []
