"""Scenes of handwritten digits with a class for each pixel, which need no download."""

from __future__ import annotations

import torch
from torch import Tensor

from workloads.data.digits import GRAYS, digit_images
from workloads.data.patches import Tile

CLASSES = 11
"""The ten digits, and paper, which is class 10."""


def digit_scenes(*, train: bool, columns: int = 16) -> list[Tile]:
    """scikit-learn's digits side by side in their own order; every pixel with ink has its digit's class.

    They stand in for Vaihingen: tiles larger than a patch, several classes, each pixel labeled.

    Args:
        train: five tiles of the digits trained on, else the one of those held out.
        columns: digits in a row, and rows in a tile.

    Returns:
        Tiles of 8 ``columns`` pixels each way, for `Patches`.

    Raises:
        UsageError: scikit-learn is not installed.

    >>> tiles = digit_scenes(train=True)
    >>> len(tiles), tiles[0].image.shape, tiles[0].labels.unique()[-1]
    (5, torch.Size([3, 128, 128]), tensor(10, dtype=torch.int8))
    """
    ink, digit = digit_images(train)
    labels = torch.where(ink > 0, digit[:, None, None], CLASSES - 1).to(torch.int8)
    gray = ink.mul(255 / GRAYS).round().to(torch.uint8)
    count = len(digit) // columns**2
    scenes = zip(_scenes(gray, count, columns), _scenes(labels, count, columns), strict=True)
    return [
        Tile(f"digit scene {number}", image.expand(3, -1, -1), label) for number, (image, label) in enumerate(scenes)
    ]


def _scenes(pixels: Tensor, count: int, columns: int) -> Tensor:
    """[digits, 8, 8] laid out as [count, 8 columns, 8 columns]."""
    grid = pixels[: count * columns**2].view(count, columns, columns, 8, 8)
    return grid.transpose(2, 3).reshape(count, 8 * columns, 8 * columns)
