"""VGG with a head for small images (CG figure 6)."""

from __future__ import annotations

from torch import nn

from geomprobe.errors import UsageError
from workloads.libraries import library
from workloads.widths import scaled

LETTERS = {11: "A", 13: "B", 16: "D", 19: "E"}
"""By depth, the configuration's name in Simonyan and Zisserman (2015) and in torchvision."""


def vgg(
    depth: int = 16, *, width: float = 1, classes: int = 10, image_size: int = 32, batch_norm: bool = True
) -> nn.Sequential:
    """torchvision's VGG features, then one linear layer. CG does not say which VGG it used.

    Args:
        depth: 11, 13, 16 or 19, counted with torchvision's three-layer head.
        width: factor on every channel count.
        classes: number of logits.
        image_size: height and width of the images; max pools of a single pixel are left out, and what is left
            after the features is flattened.
        batch_norm: BatchNorm after each convolution.

    Returns:
        A model from images [batch, 3, image_size, image_size] to logits [batch, classes].

    Raises:
        UsageError: an unknown depth, a width that makes no whole channel counts, or no torchvision.

    >>> sum(parameter.numel() for parameter in vgg(16).parameters())
    14728266
    """
    if depth not in LETTERS:
        raise UsageError(f"vgg({depth}): the depths are {', '.join(map(str, LETTERS))}")
    module = library("torchvision.models.vgg", "vision")
    layers: list[int | str] = []
    pixels, channels = image_size, 3
    for layer in module.cfgs[LETTERS[depth]]:
        if layer != "M":
            channels = scaled(layer, width)
            layers.append(channels)
        elif pixels > 1:
            pixels //= 2
            layers.append("M")
    model = nn.Sequential(
        module.make_layers(layers, batch_norm), nn.Flatten(), nn.Linear(channels * pixels**2, classes)
    )
    _initialize(model)
    return model


def _initialize(model: nn.Module) -> None:
    """torchvision's initial values, without which the deeper ones do not train unless normalized."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
