"""UNet and SegNet: the published counts, and an unpooling that is torch's but deterministic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from workloads import SegNet, UNet
from workloads.segnet import unpool

from geomprobe.errors import UsageError


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convolution(inputs: int, outputs: int, kernel: int, bias: bool) -> int:
    return inputs * outputs * kernel**2 + bias * outputs


def test_unet_has_the_count_of_its_parts() -> None:
    def double(inputs: int, outputs: int) -> int:
        return convolution(inputs, outputs, 3, False) + convolution(outputs, outputs, 3, False) + 4 * outputs

    stages = [64, 128, 256, 512, 1024]
    expected = double(3, 64) + convolution(64, 6, 1, True)
    for above, below in itertools.pairwise(stages):
        expected += double(above, below) + convolution(below, above, 2, True) + double(2 * above, above)
    with torch.device("meta"):
        assert count(UNet(6, width=2)) == expected
        assert count(UNet(6)) < expected / 3.9


def test_segnets_encoder_is_vgg_16s_and_its_decoder_mirrors_it() -> None:
    with torch.device("meta"):
        vgg = [tuple(p.shape) for p in models.vgg16_bn().features.parameters()]
        model = SegNet(6)
    assert [tuple(p.shape) for p in model.encoder.parameters()] == vgg
    weights = [p.shape[:2] for p in model.encoder.parameters() if p.dim() == 4]
    mirrored = [(inputs, outputs) for outputs, inputs in reversed(weights)]
    mirrored[-1] = (6, 64)  # the classes, where the encoder has the colors
    decoder = [*model.decoder.parameters(), model.last.weight]
    assert [tuple(p.shape[:2]) for p in decoder if p.dim() == 4] == mirrored


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 2, 2)])
def test_unpooling_is_torchs_with_the_same_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    image = torch.randn(shape)
    pooled, places = functional.max_pool2d(image, 2, return_indices=True)
    weight = torch.randn(shape)
    results = []
    for unpooling in (lambda x: functional.max_unpool2d(x, places, 2), lambda x: unpool(x, places)):
        given = pooled.clone().requires_grad_()
        found = unpooling(given)
        (gradient,) = torch.autograd.grad((found * weight).sum(), given)
        results.append((found, gradient))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)
    assert torch.equal(unpool(pooled, places) != 0, unpool(pooled, places) == image)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("model", [lambda: UNet(4, width=1 / 16), lambda: SegNet(4, width=1 / 32)])
def test_forward_and_backward_run_in_deterministic_mode_and_repeat(model: type[nn.Module]) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        net = model()
        logits = net(torch.rand(2, 3, 64, 32))
        assert logits.shape == (2, 4, 64, 32)
        labels = torch.randint(4, (2, 64, 32))
        functional.cross_entropy(logits.movedim(1, -1).flatten(0, 2), labels.flatten()).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    first, second = gradients(), gradients()
    assert len(first) == len(list(model().parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("model", "multiple"), [(UNet(2, width=1 / 16), 16), (SegNet(2, width=1 / 32), 32)])
def test_images_that_do_not_halve_are_refused(model: nn.Module, multiple: int) -> None:
    with pytest.raises(UsageError, match=f"multiples of {multiple}"):
        model(torch.zeros(1, 3, 40, 64))
