"""Medium-MLP: NWT's figure 14."""

from __future__ import annotations

import torch
from torch import nn
from workloads import medium_mlp, resnet


def test_its_count_comes_close_to_resnet_18_2s() -> None:
    with torch.device("meta"):
        ours, rival = (sum(p.numel() for p in m.parameters()) for m in (medium_mlp(), resnet(18, width=2)))
    assert ours == 46_190_602  # as NWT's code states
    assert abs(ours / rival - 1) < 0.04


def test_it_has_four_layers_with_relu_between_them() -> None:
    model = medium_mlp(inputs=12, classes=5, width=1 / 512)
    assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear, *[nn.ReLU, nn.Linear] * 3]
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [8, 8, 8, 5]
    assert model(torch.randn(2, 3, 2, 2)).shape == (2, 5)
