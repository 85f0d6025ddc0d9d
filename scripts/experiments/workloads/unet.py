"""The UNet of NWT's segmentation."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from geomprobe.errors import UsageError
from workloads.widths import scaled

STAGES = (32, 64, 128, 256, 512)
"""Channels by stage, as in NWT's own code; Ronneberger et al. have twice as many."""


class UNet(nn.Module):
    """UNet (Ronneberger et al. 2015), padded so that it gives a label to every pixel, and with BatchNorm.

    Args:
        classes: number of logits per pixel.
        width: factor on the 32, 64, 128, 256 and 512 channels of the stages; 2 gives the original's counts.

    Raises:
        UsageError: ``width`` makes no whole channel counts.

    >>> model = UNet(6, width=2)
    >>> sum(parameter.numel() for parameter in model.parameters())
    31037958
    >>> model(torch.zeros(1, 3, 32, 48)).shape
    torch.Size([1, 6, 32, 48])
    """

    def __init__(self, classes: int = 6, *, width: float = 1) -> None:
        super().__init__()
        stages = [scaled(channels, width) for channels in STAGES]
        steps = list(itertools.pairwise(stages))
        self.first = convolutions(3, stages[0])
        self.down = nn.ModuleList(convolutions(above, below) for above, below in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, stride=2) for above, below in steps[::-1])
        self.joined = nn.ModuleList(convolutions(below, above) for above, below in steps[::-1])
        self.last = nn.Conv2d(stages[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes, height, width] of images [batch, 3, height, width].

        Raises:
            UsageError: height or width is no multiple of 16.
        """
        if any(size % 16 for size in images.shape[2:]):
            raise UsageError(f"UNet: images of {tuple(images.shape[2:])} pixels; use multiples of 16")
        x = self.first(images)
        skipped = []
        for stage in self.down:
            skipped.append(x)
            x = stage(nn.functional.max_pool2d(x, 2))
        for up, stage in zip(self.up, self.joined, strict=True):
            x = stage(torch.cat([skipped.pop(), up(x)], dim=1))
        return self.last(x)


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU.

    >>> convolutions(3, 8)(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
