"""Texts as numbers: WikiText-2's files, the standard library's source, and how they are cut."""

from __future__ import annotations

import io
import keyword
import random
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from support.paths import EXPERIMENTS
from workloads import Corpus, DamagedData, columns, segments, stdlib, wikitext2
from workloads.data.stdlib import files

from geomprobe.errors import UsageError

TEXTS = {
    "train": " \n = Robert Boulter = \n \n Robert Boulter is an English <unk> actor . \n",
    "valid": " \n = Homarus = \n Homarus is a <unk> . \n",
    "test": " = Robert = \n An Englishman is no <unk> . \n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "wikitext-2").mkdir()
    for part, text in TEXTS.items():
        (tmp_path / "wikitext-2" / f"wiki.{part}.tokens").write_text(text, encoding="utf-8")
    return tmp_path


def text(corpus: Corpus, part: str) -> str:
    words = [corpus.vocabulary[number] for number in getattr(corpus, part)]
    return " ".join(words).replace("<eos>", "\n")


def test_wikitext_2_reads_back_word_by_word(root: Path) -> None:
    corpus = wikitext2(root, published=False)
    for part, expected in TEXTS.items():
        assert text(corpus, part).split() == expected.split()
        assert text(corpus, part).count("\n") == expected.count("\n")


def test_words_are_numbered_as_they_come_first_in_the_training_text(root: Path) -> None:
    vocabulary = wikitext2(root, published=False).vocabulary
    assert vocabulary[:6] == ["<eos>", "=", "Robert", "Boulter", "is", "an"]
    assert len(set(vocabulary)) == len(vocabulary)
    assert vocabulary.index("Homarus") < vocabulary.index("Englishman")


def test_the_published_counts_are_asked_for(root: Path) -> None:
    with pytest.raises(DamagedData, match=r"train\.tokens: 16 words, and the published file has 2,088,628"):
        wikitext2(root)


def test_missing_text_says_where_to_get_it_and_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        wikitext2(tmp_path)
    assert "https://huggingface.co/datasets/Salesforce/wikitext" in str(raised.value)
    assert f"{tmp_path}/wikitext-2/wiki.train.tokens" in str(raised.value)


def test_a_misnamed_file_is_found_beside_where_it_should_be(root: Path) -> None:
    path = root / "wikitext-2" / "wiki.valid.tokens"
    path.rename(path.with_suffix(".txt"))
    with pytest.raises(UsageError, match=r"wiki\.valid\.tokens is not there \(beside it: .*wiki\.valid\.txt"):
        wikitext2(root)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "wiki.train.tokens: it is empty"),
        (b" \n\n", "wiki.train.tokens: it is empty"),
        ("Senj\u014d".encode()[:-1], "wiki.train.tokens: no UTF-8 text, or a truncated one"),
        (b"PK\x03\x04\xff\xfe", "wiki.train.tokens: no UTF-8 text"),
        (b"Boulter is an actor.\n", "wikitext-2-raw-v1"),
    ],
)
def test_a_damaged_text_is_named(root: Path, content: bytes, text: str) -> None:
    (root / "wikitext-2" / "wiki.train.tokens").write_bytes(content)
    with pytest.raises(DamagedData, match=text):
        wikitext2(root, published=False)


def test_the_standard_librarys_words_are_those_of_its_source() -> None:
    corpus = stdlib(modules=["json"], words=100_000)
    source = "".join(path.read_text(encoding="utf-8") for path in files(["json"]))
    assert "".join(text(corpus, "train").split()) == "".join(source.split())
    assert len(corpus.valid) == len(corpus.test) == 0  # five files


def test_names_and_keywords_are_one_word_each() -> None:
    corpus = stdlib(modules=["json"], words=100_000)
    source = "".join(path.read_text(encoding="utf-8") for path in files(["json"]))
    names = {t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.NAME}
    assert names <= set(corpus.vocabulary)
    assert "JSONDecoder" in names
    assert any(keyword.iskeyword(name) for name in names)


def test_rare_words_are_unknown_and_none_is_from_the_held_out_parts() -> None:
    corpus = stdlib(modules=["email", "json"], words=300)
    assert len(corpus.vocabulary) == 300
    unknown = corpus.vocabulary.index("<unk>")
    assert sorted(corpus.train.unique().tolist()) == list(range(300))
    assert 0.05 < (corpus.train == unknown).float().mean() < 0.5
    assert (corpus.valid == unknown).any()


def test_files_come_sorted_and_in_ten_parts_of_which_one_is_for_each_test() -> None:
    paths = files()
    assert len(paths) > 300
    assert len(set(paths)) == len(paths)
    tops = [path.relative_to(paths[0].parent).parts[0].removesuffix(".py") for path in paths]
    assert tops == sorted(tops)
    assert not {"test", "tests", "site-packages", "idlelib"} & {part for path in paths for part in path.parts}


def test_another_process_reads_the_same_text() -> None:
    code = (
        "from workloads import stdlib; import hashlib; c = stdlib(modules=['email', 'json'], words=500);"
        "print(hashlib.sha256(str([c.train.tolist(), c.valid.tolist(), c.vocabulary]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(EXPERIMENTS)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_module_without_source_is_refused() -> None:
    with pytest.raises(UsageError, match="no Python source of 'nothing_such'"):
        stdlib(modules=["json", "nothing_such"])


@pytest.mark.parametrize(("count", "length"), [(1, 4), (3, 4), (4, 1), (5, 100)])
def test_segments_hold_each_column_once_in_order_with_its_next_words(count: int, length: int) -> None:
    words = torch.randint(1000, (random.Random(0).randrange(40, 50),))
    text = columns(words, count)
    parts = segments(text, length)
    read = torch.cat([inputs for inputs, _ in parts])
    following = torch.cat([targets for _, targets in parts])
    for column in range(count):
        whole = words[column * len(text) : (column + 1) * len(text)]
        assert torch.equal(read[:, column], whole[:-1])
        assert torch.equal(following[:, column], whole[1:])
    assert {len(inputs) for inputs, _ in parts[:-1]} <= {length}


def test_a_text_too_short_for_its_columns_is_refused() -> None:
    with pytest.raises(UsageError, match="7 words make no 4 columns"):
        columns(torch.arange(7), 4)
