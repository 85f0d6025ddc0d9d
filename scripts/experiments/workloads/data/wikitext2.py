"""WikiText-2 from its three files of tokens."""

from __future__ import annotations

import os
from pathlib import Path

from workloads.data.corpus import UNKNOWN, Corpus
from workloads.data.files import DamagedData, Source

SOURCE = Source(
    "WikiText-2",
    "https://huggingface.co/datasets/Salesforce/wikitext (wikitext-2-v1), or, under the names train.txt, valid.txt and "
    "test.txt, https://github.com/pytorch/examples/tree/main/word_language_model/data/wikitext-2",
    "Save its three parts as {root}/wikitext-2/wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.",
)

PUBLISHED = {"train": 2_088_628, "valid": 217_646, "test": 245_569}
"""Words of each part (Merity et al. 2016), a line's end being one."""


def wikitext2(root: str | os.PathLike[str], *, published: bool = True) -> Corpus:
    """WikiText-2 (Merity et al. 2016), split at white space, with the vocabulary of PyTorch's example: 33,278 words.

    Args:
        root: the folder that holds ``wikitext-2/wiki.train.tokens`` and so on.
        published: require that each part has the published number of words. Without, any text of the format is read.

    Raises:
        UsageError: a file is missing.
        DamagedData: a file is not UTF-8, is empty, is the raw text without ``<unk>``, or has not the published
            number of words.

    >>> wikitext2("no/such/folder")
    Traceback (most recent call last):
    geomprobe.errors.UsageError: no/such/folder/wikitext-2/wiki.train.tokens is not there. WikiText-2 is to be had ...
    """
    folder = Path(root) / "wikitext-2"
    paths = {part: SOURCE.require(folder / f"wiki.{part}.tokens", Path(root)) for part in PUBLISHED}
    lines = {part: _lines(path) for part, path in paths.items()}
    if not any(UNKNOWN in line for line in lines["train"]):
        raise DamagedData(
            f"{paths['train']}: there is no {UNKNOWN} in it, so it is not wikitext-2-v1. The raw version, "
            f"wikitext-2-raw-v1, has another vocabulary. {SOURCE.advice.format(root=root)}"
        )
    for part, path in paths.items():
        words = sum(len(line) + 1 for line in lines[part])
        if published and words != PUBLISHED[part]:
            raise DamagedData(
                f"{path}: {words:,} words, and the published file has {PUBLISHED[part]:,}, ends of lines among them. "
                f"Fetch it again from {SOURCE.url}."
            )
    return Corpus.of(**lines)


def _lines(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.split() for line in file]
    except UnicodeDecodeError as error:
        raise DamagedData(f"{path}: no UTF-8 text, or a truncated one: {error}") from None
    if not any(lines):
        raise DamagedData(f"{path}: it is empty. Fetch it again from {SOURCE.url}.")
    return lines
