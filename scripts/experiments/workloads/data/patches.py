"""Random patches of labeled tiles, drawn from torch's generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geomprobe.errors import UsageError

UNLABELED = -100
"""The label that `torch.nn.functional.cross_entropy` passes over."""


class Tile(NamedTuple):
    """An image and the class of each of its pixels.

    Attributes:
        name: for messages.
        image: uint8 [3, height, width].
        labels: int8 [height, width], classes or `UNLABELED`.
    """

    name: str
    image: Tensor
    labels: Tensor


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Patches at random places of random tiles, flipped and mirrored half the time each (NWT appendix A.3, A.4).

    An item does not depend on its index but on torch's generator alone, so that a replay sees the same patches.

    Args:
        tiles: what they are cut from; each tile is as likely as any other.
        count: patches in an epoch: NWT has 10,000 for training and 1,000 for validation.
        size: height and width of a patch, in pixels.
        flips: whether to flip and mirror.

    Raises:
        UsageError: there is no tile, or one is smaller than a patch.

    >>> tile = Tile("a", torch.zeros(3, 8, 9, dtype=torch.uint8), torch.zeros(8, 9, dtype=torch.int8))
    >>> image, labels = Patches([tile], count=10, size=4)[0]
    >>> image.shape, labels.shape, labels.dtype
    (torch.Size([3, 4, 4]), torch.Size([4, 4]), torch.int64)
    """

    def __init__(self, tiles: Sequence[Tile], *, count: int, size: int = 256, flips: bool = True) -> None:
        if not tiles:
            raise UsageError("Patches: there are no tiles to cut them from")
        for tile in tiles:
            if min(tile.labels.shape) < size:
                raise UsageError(
                    f"{tile.name}: {tuple(tile.labels.shape)} pixels, too few for patches of {size}x{size}"
                )
        self.tiles, self.count, self.size, self.flips = tiles, count, size, flips

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        tile = self.tiles[_below(len(self.tiles))]
        height, width = tile.labels.shape
        top, left = _below(height - self.size + 1), _below(width - self.size + 1)
        rows, places = slice(top, top + self.size), slice(left, left + self.size)
        image, labels = tile.image[:, rows, places].float() / 255, tile.labels[rows, places].long()
        for axis in (-1, -2):
            if self.flips and _below(2):
                image, labels = image.flip(axis), labels.flip(axis)
        return image, labels


def _below(end: int) -> int:
    return int(torch.randint(end, ()))
