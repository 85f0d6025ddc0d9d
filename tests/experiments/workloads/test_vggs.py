"""VGG: torchvision's features under one linear layer."""

from __future__ import annotations

import pytest
import torch
from torchvision import models
from workloads import vgg

from geomprobe.errors import UsageError


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16", "vgg16_bn", "vgg19_bn"])
def test_its_features_are_torchvisions(name: str) -> None:
    depth, _, norm = name.removeprefix("vgg").partition("_")
    with torch.device("meta"):
        reference = getattr(models, name)().features.state_dict()
        ours = vgg(int(depth), batch_norm=norm == "bn")
    assert {n: t.shape for n, t in reference.items()} == {n: t.shape for n, t in ours[0].state_dict().items()}
    assert ours[2].weight.shape == (10, 512)


@pytest.mark.parametrize(("size", "left"), [(32, 1), (64, 4), (8, 1)])
def test_it_takes_images_of_several_sizes(size: int, left: int) -> None:
    model = vgg(11, width=1 / 64, image_size=size)
    assert model[2].in_features == 8 * left
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_initial_values_are_torchvisions() -> None:
    for layer in vgg(16)[0]:
        if isinstance(layer, torch.nn.Conv2d):  # He et al. 2015, by the outputs
            assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.05)
            assert not layer.bias.any()


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(UsageError, match="11, 13, 16, 19"):
        vgg(12)
