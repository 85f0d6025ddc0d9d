"""ResNets whose every channel count is multiplied by a width factor (NWT table 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geomprobe.errors import UsageError
from workloads.libraries import library
from workloads.widths import scaled

DEPTHS = {
    18: ("BasicBlock", (2, 2, 2, 2)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    152: ("Bottleneck", (3, 8, 36, 3)),
}
"""By depth, torchvision's block and how many of it each stage has."""


def resnet(
    depth: int,
    *,
    width: float = 1,
    classes: int = 10,
    stem: str = "cifar",
    zero_init_residual: bool = False,
) -> ResNet:
    """A ResNet (He et al. 2016) on torchvision's blocks, such as NWT's ResNet-18-2 or ResNet-152-0.5.

    Args:
        depth: 18, 50 or 152.
        width: factor on every channel count, inside the blocks and between them.
        classes: number of logits.
        stem: ``"cifar"``, one 3x3 convolution, for images of 32x32 pixels or fewer; ``"imagenet"``, a 7x7
            convolution of stride 2 and a 3x3 max pool of stride 2.
        zero_init_residual: whether the last BatchNorm of each block starts with weights of 0, so that each block
            starts as its shortcut (Goyal et al. 2017, section 5.1).

    Returns:
        A model from images [batch, 3, height, width] to logits [batch, classes]. With the ImageNet stem and width
        1, its parameters' names, shapes and initial values are those of torchvision's, for either
        ``zero_init_residual``.

    Raises:
        UsageError: an unknown depth or stem, a width that makes no whole channel counts, or no torchvision.

    >>> model = resnet(18, width=2)
    >>> sum(parameter.numel() for parameter in model.parameters())
    44662922
    """
    if depth not in DEPTHS:
        raise UsageError(f"resnet({depth}): the depths are {', '.join(map(str, DEPTHS))}")
    if stem not in ("cifar", "imagenet"):
        raise UsageError(f"resnet(stem={stem!r}): the stems are 'cifar' and 'imagenet'")
    block, blocks = DEPTHS[depth]
    blocks_module = library("torchvision.models.resnet", "vision")
    model = ResNet(getattr(blocks_module, block), blocks, scaled(64, width), classes, stem)
    if zero_init_residual:
        last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}[block]
        for name, module in model.named_modules():
            if name.startswith("layer") and name.endswith(last):
                nn.init.zeros_(module.weight)
    return model


class ResNet(nn.Module):
    """Four stages of torchvision's blocks behind a stem. Made by `resnet`.

    Args:
        block: ``torchvision.models.resnet.BasicBlock`` or ``Bottleneck``.
        blocks: their number, by stage.
        channels: what the stem gives; the stages have 1, 2, 4 and 8 times as many, times ``block.expansion``.
        classes: number of logits.
        stem: ``"cifar"`` or ``"imagenet"``.
    """

    def __init__(self, block: Any, blocks: tuple[int, ...], channels: int, classes: int, stem: str) -> None:
        super().__init__()
        self._inputs = channels
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, channels, blocks[0], 1)
        self.layer2 = self._stage(block, 2 * channels, blocks[1], 2)
        self.layer3 = self._stage(block, 4 * channels, blocks[2], 2)
        self.layer4 = self._stage(block, 8 * channels, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * channels * block.expansion, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, block: Any, channels: int, count: int, stride: int) -> nn.Sequential:
        outputs = channels * block.expansion
        shortcut = None
        if stride != 1 or self._inputs != outputs:
            shortcut = nn.Sequential(
                nn.Conv2d(self._inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        first = block(self._inputs, channels, stride, shortcut)
        self._inputs = outputs
        return nn.Sequential(first, *(block(outputs, channels) for _ in range(count - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of images [batch, 3, height, width]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))
