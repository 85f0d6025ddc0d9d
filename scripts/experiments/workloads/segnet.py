"""The SegNet of NWT's segmentation, with an unpooling that is deterministic everywhere."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional

from geomprobe.errors import UsageError
from workloads.widths import scaled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""By stage, the channels and the number of VGG-16's convolutions."""


class SegNet(nn.Module):
    """SegNet (Badrinarayanan et al. 2017): VGG-16's convolutions, and the same backwards.

    Each max pool keeps where its maxima were, and the decoder's stage at the same size puts its inputs there.

    Args:
        classes: number of logits per pixel.
        width: factor on every channel count.

    Raises:
        UsageError: ``width`` makes no whole channel counts.

    >>> import torch
    >>> model = SegNet(6)
    >>> sum(parameter.numel() for parameter in model.parameters())
    29446470
    >>> SegNet(6, width=1/16)(torch.zeros(2, 3, 32, 64)).shape
    torch.Size([2, 6, 32, 64])
    """

    def __init__(self, classes: int = 6, *, width: float = 1) -> None:
        super().__init__()
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        above = 3
        for base, count in STAGES:
            channels = scaled(base, width)
            encoder.append(_stage([above, *[channels] * count]))
            # The uppermost decoder stage's second convolution gives the logits: it is the last one.
            decoder.insert(0, _stage([channels] * count + ([above] if decoder else [])))
            above = channels
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(decoder)
        self.last = nn.Conv2d(scaled(STAGES[0][0], width), classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes, height, width] of images [batch, 3, height, width].

        Raises:
            UsageError: height or width is no multiple of 32.
        """
        if any(size % 32 for size in images.shape[2:]):
            raise UsageError(f"SegNet: images of {tuple(images.shape[2:])} pixels; use multiples of 32")
        x, places = images, []
        for stage in self.encoder:
            x, where = functional.max_pool2d(stage(x), 2, return_indices=True)
            places.append(where)
        for stage in self.decoder:
            x = stage(unpool(x, places.pop()))
        return self.last(x)


def unpool(pooled: Tensor, places: Tensor) -> Tensor:
    """What `max_pool2d(..., 2, return_indices=True)` gave, back where it was, among zeros.

    `torch.nn.functional.max_unpool2d` computes the same, but refuses deterministic mode in many versions. Windows of
    2x2 do not overlap, so no place occurs twice, and the order in which they are written cannot matter.

    Args:
        pooled: [batch, channels, height, width].
        places: the pool's indices, of the same shape.

    Returns:
        [batch, channels, 2 height, 2 width].

    >>> import torch
    >>> image = torch.tensor([[[[1.0, 2.0], [4.0, 3.0]]]])
    >>> pooled, places = functional.max_pool2d(image, 2, return_indices=True)
    >>> unpool(pooled, places)
    tensor([[[[0., 0.],
              [4., 0.]]]])
    """
    batch, channels, height, width = pooled.shape
    zeros = pooled.new_zeros(batch, channels, 4 * height * width)
    return zeros.scatter(2, places.flatten(2), pooled.flatten(2)).view(batch, channels, 2 * height, 2 * width)


def _stage(channels: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
