"""scikit-learn's handwritten digits as color images, which need no download."""

from __future__ import annotations

import torch
from torch import Tensor

from workloads.data.images import Images, crops
from workloads.libraries import library

GRAYS = 16
"""The darkest ink of scikit-learn's digits; the lightest is 0."""


def digits(*, train: bool, augment: bool = False) -> Images:
    """The 1,797 digits of 8x8 pixels (Alpaydin and Kaynak 1998): every sixth is held out.

    They come with three equal channels, so that every model takes them as it takes CIFAR-10.

    Args:
        train: the 1,497 that are trained on, else the 300 held out.
        augment: random crops of the image with one zero on each side.

    Returns:
        Images [3, 8, 8] with values in [-1, 1] and their labels.

    Raises:
        UsageError: scikit-learn or torchvision is not installed.

    >>> data = digits(train=True)
    >>> len(data), data[0][0].shape, data[0][1], len(digits(train=False))
    (1497, torch.Size([3, 8, 8]), 1, 300)
    """
    ink, labels = digit_images(train)
    images = ink.mul(255 / GRAYS).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return Images(images, labels, crops(8, 1, [0.5] * 3, [0.5] * 3, augment))


def digit_images(train: bool) -> tuple[Tensor, Tensor]:
    """Ink [count, 8, 8] from 0 to 16, and labels int64 [count], of the digits trained on or held out.

    >>> ink, labels = digit_images(train=False)
    >>> ink.max(), labels[:3]
    (tensor(16.), tensor([0, 6, 2]))
    """
    loaded = library("sklearn.datasets", "examples").load_digits()
    held_out = torch.arange(len(loaded.target)) % 6 == 0
    keep = ~held_out if train else held_out
    return torch.from_numpy(loaded.images).float()[keep], torch.from_numpy(loaded.target).long()[keep]
