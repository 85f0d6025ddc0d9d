"""The source of Python's standard library as a language corpus, which needs no download."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from geomprobe.errors import UsageError
from workloads.data.corpus import END, UNKNOWN, Corpus, common_words

LEFT_OUT = frozenset({"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"})
"""Modules that installations leave out, or that contain something other than code."""

WORD = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")
"""A name, a run of digits, or one other character."""


def stdlib(*, modules: Iterable[str] | None = None, words: int = 10_000) -> Corpus:
    """The Python files of the running interpreter's standard library, in the order of their names.

    A line is split into names, numbers and single characters, whatever its indentation; comments and
    docstrings are text like all else. Of every ten files the ninth is validation and the tenth test. As in
    WikiText-2, rare words are ``<unk>``. Another version of Python is another text.

    Args:
        modules: top-level modules and packages to read; all by default.
        words: size of the vocabulary, ``<unk>`` and ``<eos>`` among it: the training files' most frequent ones.

    Raises:
        UsageError: there is no source of a module.

    >>> corpus = stdlib(modules=["json", "email"], words=500)
    >>> len(corpus.vocabulary), corpus.vocabulary[:3]
    (500, ['#', 'Copyright', '('])
    """
    parts: tuple[list[list[str]], ...] = ([], [], [])
    for index, path in enumerate(files(modules)):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        parts[{8: 1, 9: 2}.get(index % 10, 0)].extend(WORD.findall(line) for line in lines if line.strip())
    known = common_words(parts[0], words - len([UNKNOWN, END]))
    return Corpus.of(*([[word if word in known else UNKNOWN for word in line] for line in part] for part in parts))


def files(modules: Iterable[str] | None = None) -> list[Path]:
    """The standard library's files that `stdlib` reads, tests left out.

    Args:
        modules: top-level modules and packages; all by default.

    Raises:
        UsageError: one of them has no source.

    >>> [path.name for path in files(["json"])]
    ['__init__.py', 'decoder.py', 'encoder.py', 'scanner.py', 'tool.py']
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    wanted = sorted(sys.stdlib_module_names - LEFT_OUT if modules is None else modules)
    found: list[Path] = []
    for name in wanted:
        of_module = sorted([*folder.glob(f"{name}.py"), *(folder / name).rglob("*.py")])
        if modules is not None and not of_module:
            raise UsageError(f"stdlib: {folder} has no Python source of {name!r}")
        found += [path for path in of_module if not {"test", "tests"} & set(path.relative_to(folder).parts)]
    return found
