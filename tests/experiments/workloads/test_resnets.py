"""ResNets: torchvision's at width 1, every channel count scaled otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models
from workloads import resnet

from geomprobe.errors import UsageError


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_with_the_imagenet_stem_it_is_torchvisions_to_the_bit(depth: int, zero: bool) -> None:
    torch.manual_seed(0)
    reference = getattr(models, f"resnet{depth}")(num_classes=7, zero_init_residual=zero).eval()
    torch.manual_seed(0)
    ours = resnet(depth, classes=7, stem="imagenet", zero_init_residual=zero).eval()
    expected, found = reference.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(reference(images), ours(images))


@pytest.mark.parametrize("depth", [18, 50, 152])
def test_parameter_counts_are_the_published_ones_at_width_1(depth: int) -> None:
    published = getattr(models, f"ResNet{depth}_Weights").IMAGENET1K_V1.meta["num_params"]
    with torch.device("meta"):
        assert count(resnet(depth, classes=1000, stem="imagenet")) == published


@pytest.mark.parametrize(("depth", "width"), [(18, 2), (50, 2), (152, 0.5)])
def test_every_channel_count_is_scaled_and_no_other_is(depth: int, width: float) -> None:
    with torch.device("meta"):
        plain, scaled = resnet(depth, stem="imagenet"), resnet(depth, width=width, stem="imagenet")
    kept = {3, plain.fc.out_features}  # colors in, classes out
    for (name, one), (_, other) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        channels, kernel = one.shape[:2], one.shape[2:]
        expected = [size if size in kept else size * width for size in channels]
        assert list(other.shape) == [*expected, *kernel], name


def test_resnet_18_2_on_cifar_10_has_the_count_that_nwts_code_states() -> None:
    with torch.device("meta"):
        assert count(resnet(18, width=2)) == 44_662_922


def test_the_cifar_stem_keeps_all_pixels_of_a_small_image() -> None:
    model = resnet(18, width=1 / 16)
    sizes: list[torch.Size] = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    model.layer4.register_forward_hook(lambda _, __, output: sizes.append(output.shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 4, 32, 32), (2, 32, 4, 4)]


@pytest.mark.parametrize("depth", [18, 50])
def test_with_branches_that_start_at_zero_every_block_starts_as_its_shortcut(depth: int) -> None:
    model = resnet(depth, width=1 / 16, zero_init_residual=True)
    x = torch.randn(4, 3, 8, 8)
    expected = model.relu(model.bn1(model.conv1(x)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        shortcut = next(stage.children()).downsample
        expected = shortcut(expected).relu() if isinstance(shortcut, nn.Module) else expected
    torch.testing.assert_close(model(x), model.fc(expected.mean((2, 3))))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: resnet(20), "18, 50, 152"),
        (lambda: resnet(18, stem="small"), "'cifar' and 'imagenet'"),
        (lambda: resnet(18, width=0.51), "32.64"),
        (lambda: resnet(18, width=0), "0 is 0"),
    ],
)
def test_what_cannot_be_built_is_refused(call: object, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        call()  # type: ignore[operator]
