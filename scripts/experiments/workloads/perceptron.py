"""NWT's Medium-MLP: a wide perceptron of four layers (figures 1 and 14)."""

from __future__ import annotations

import itertools

from torch import nn

from workloads.widths import scaled

HIDDEN = 4096
"""Units of each hidden layer, as in NWT's own code: 46.2 M parameters on CIFAR-10, ResNet-18-2 having 44.7 M."""


def medium_mlp(*, inputs: int = 3 * 32 * 32, classes: int = 10, width: float = 1) -> nn.Sequential:
    """A perceptron of four linear layers with ReLU between them (NWT section 5 and figure 14).

    Args:
        inputs: numbers in an image.
        classes: number of logits.
        width: factor on the 4096 units of each hidden layer.

    Returns:
        A model from images [batch, ...] to logits [batch, classes].

    Raises:
        UsageError: ``width`` makes no whole number of units.

    >>> sum(parameter.numel() for parameter in medium_mlp().parameters())
    46190602
    """
    sizes = [inputs, *[scaled(HIDDEN, width)] * 3, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
