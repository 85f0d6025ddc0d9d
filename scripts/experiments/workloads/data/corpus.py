"""Text as numbered words, cut into columns that are read side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geomprobe.errors import UsageError

END, UNKNOWN = "<eos>", "<unk>"

Lines = Iterable[Sequence[str]]


@dataclass(frozen=True)
class Corpus:
    """A text in three parts.

    Attributes:
        train: the words' numbers, int64 [count].
        valid: likewise.
        test: likewise.
        vocabulary: the words, by number.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: list[str]

    @classmethod
    def of(cls, train: Lines, valid: Lines, test: Lines) -> Corpus:
        """Number the words as they come, first in ``train``, then in ``valid`` and ``test``, each line ending in
        ``<eos>``: the vocabulary of PyTorch's ``word_language_model``.

        Args:
            train: lines, each a sequence of words.
            valid: likewise.
            test: likewise.

        >>> corpus = Corpus.of([["to", "be"], ["to", "do"]], [["be"]], [])
        >>> corpus.train, corpus.vocabulary
        (tensor([0, 1, 2, 0, 3, 2]), ['to', 'be', '<eos>', 'do'])
        """
        numbers: dict[str, int] = {}

        def numbered(lines: Lines) -> Tensor:
            words = (word for line in lines for word in (*line, END))
            return torch.tensor([numbers.setdefault(word, len(numbers)) for word in words], dtype=torch.long)

        return cls(numbered(train), numbered(valid), numbered(test), list(numbers))


def common_words(lines: Lines, size: int) -> frozenset[str]:
    """The ``size`` words that occur most often; of equally frequent ones those that occur first.

    >>> sorted(common_words([["a", "b", "b"], ["c", "a"]], 2))
    ['a', 'b']
    """
    return frozenset(word for word, _ in Counter(word for line in lines for word in line).most_common(size))


def columns(words: Tensor, count: int) -> Tensor:
    """A text cut into ``count`` columns of equal length, which are read side by side.

    Args:
        words: numbers [total].
        count: the batch size.

    Returns:
        [total // count, count]; the last ``total % count`` words are left out (PyTorch's ``batchify``).

    Raises:
        UsageError: the text is too short for two words in each column.

    >>> columns(torch.arange(7), 2)
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    length = len(words) // count
    if length < 2:
        raise UsageError(f"{len(words)} words make no {count} columns of two words or more; use a smaller batch")
    return words[: length * count].view(count, length).T.contiguous()


def segments(text: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """A text's minibatches in reading order: words, and the word after each (PyTorch's ``get_batch``).

    Args:
        text: numbers [time, batch], from `columns`.
        length: time steps of a minibatch; the last one may be shorter.

    Returns:
        Pairs of [length, batch] views.

    >>> [(words.shape[0], next_words[0].tolist()) for words, next_words in segments(columns(torch.arange(10), 2), 3)]
    [(3, [1, 6]), (1, [4, 9])]
    """
    last = len(text) - 1
    starts = range(0, last, length)
    return [(text[i : min(i + length, last)], text[i + 1 : min(i + length, last) + 1]) for i in starts]
