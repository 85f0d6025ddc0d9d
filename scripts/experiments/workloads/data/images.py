"""Labeled images in memory, and the augmentation of NWT's CIFAR-10 runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from workloads.libraries import library

Transform = Callable[[Tensor], Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Images with a class each.

    Args:
        images: uint8 [count, channels, height, width].
        labels: int64 [count].
        transform: what is done to an image each time it is fetched; it draws from torch's generator only.

    >>> data = Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([4, 7]), lambda image: image / 255)
    >>> len(data), data[1][0].shape, data[1][1]
    (2, torch.Size([3, 8, 8]), 7)
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def crops(size: int, padding: int, mean: Sequence[float], std: Sequence[float], augment: bool) -> Transform:
    """Images scaled to [0, 1] and normalized by channel; augmented ones are random crops of the zero-padded image.

    Args:
        size: height and width of the crop, in pixels.
        padding: zeros on each side, in pixels.
        mean: by channel, of images in [0, 1].
        std: likewise.
        augment: whether to crop at random.

    >>> keep = crops(2, 1, [0.5] * 3, [0.5] * 3, augment=False)
    >>> keep(torch.full((3, 2, 2), 255, dtype=torch.uint8)).unique()
    tensor([1.])
    """
    v2 = library("torchvision.transforms.v2", "vision")
    crop = [v2.RandomCrop(size, padding=padding)] if augment else []
    transform: Transform = v2.Compose(
        [*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    )
    return transform
