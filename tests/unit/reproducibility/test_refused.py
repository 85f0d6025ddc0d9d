"""What torch refuses under deterministic algorithms is named, with the module that called it and a replacement."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from support.paths import ROOT
from torch import Tensor, nn
from torch.nn import functional

from geomprobe.reproducibility.refused import REFUSED, explained
from geomprobe.reproducibility.seeding import strict_mode


class Unpool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pooled, indices = functional.max_pool2d(x, 2, return_indices=True)
        return functional.max_unpool2d(pooled, indices, 2)


class Refuse(torch.autograd.Function):
    """What the backward pass of adaptive pooling raises on CUDA."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation."
        )


def _raised(call) -> RuntimeError:
    with strict_mode(True), pytest.raises(RuntimeError) as caught:
        call()
    return caught.value


def test_an_operation_that_torch_refuses_here_is_named_with_its_module() -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(Unpool()))
    error = _raised(lambda: model(torch.ones(1, 1, 4, 4)))
    told = explained(error, model)
    assert told.startswith(
        "max_unpooling2d_forward_out is refused by 1.0 (Unpool). Instead of max_unpool1d, 2d and 3d:"
    )


def test_of_a_backward_pass_the_modules_that_may_be_it_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.AdaptiveAvgPool2d(3))
    error = _raised(Refuse.apply(torch.ones(2, requires_grad=True)).sum().backward)
    assert "in the backward pass of 1 (AdaptiveAvgPool2d). Instead of adaptive_avg_pool2d" in explained(error, model)
    assert explained(error).startswith("adaptive_avg_pool2d_backward_cuda is refused. Instead of")


def test_another_error_is_not_explained() -> None:
    assert explained(RuntimeError("out of memory")) == ""
    assert explained(RuntimeError("new_cuda does not have a deterministic implementation")) == "new_cuda is refused."


def test_each_operation_in_torchs_own_list_for_cuda_is_in_the_table() -> None:
    text = inspect.getdoc(torch.use_deterministic_algorithms) or ""
    text = text[text.index("operations will throw a") :]
    entries = re.findall(r"\* :(?:class|func):`(?:torch|~torch)[\w.]*?\.?(\w+)`([^*]*)", text)
    known = " ".join(f"{each.operation} {each.modules} {each.kernels}" for each in REFUSED).lower().replace("_", "")
    assert len(entries) > 10
    for name, rest in entries:
        if "MPS" not in rest.replace("CUDA or MPS", "") and "quantized" not in rest:
            assert name.lower().replace("_", "").removesuffix("loss") in known, name


REPLACED = {
    "2-D cross-entropy": (
        lambda x, y: functional.cross_entropy(x, y),
        lambda x, y: functional.cross_entropy(x.movedim(1, -1).flatten(0, -2), y.flatten()),
    ),
    "adaptive average": (
        lambda x, y: functional.adaptive_avg_pool2d(x, 3),
        lambda x, y: functional.avg_pool2d(x, (6 // 3, 9 // 3)),
    ),
    "adaptive average, 1x1": (
        lambda x, y: functional.adaptive_avg_pool2d(x, 1),
        lambda x, y: x.mean((-2, -1), keepdim=True),
    ),
    "adaptive maximum": (
        lambda x, y: functional.adaptive_max_pool2d(x, 3),
        lambda x, y: functional.max_pool2d(x, (6 // 3, 9 // 3)),
    ),
    "average in 3-D": (
        lambda x, y: functional.avg_pool3d(x.unsqueeze(0), (1, 2, 3)),
        lambda x, y: functional.avg_pool2d(x.unsqueeze(0).flatten(1, 2), (2, 3)).unflatten(1, (2, 5)),
    ),
    "unpooling": (
        lambda x, y: functional.max_unpool2d(*functional.max_pool2d(x, 3, return_indices=True), 3),
        lambda x, y: _unpooled(*functional.max_pool2d(x, 3, return_indices=True), x),
    ),
    "median": (lambda x, y: x.median(1).values, lambda x, y: x.sort(1).values.select(1, (5 - 1) // 2)),
    "k-th value": (lambda x, y: x.kthvalue(2, 1).values, lambda x, y: x.sort(1).values.select(1, 2 - 1)),
    "bincount": (
        lambda x, y: y.flatten().bincount(torch.ones(108).double(), 5),
        lambda x, y: torch.zeros(5).double().index_add(0, y.flatten(), torch.ones(108).double()),
    ),
    "put": (
        lambda x, y: torch.zeros(9).put_(torch.tensor([3, 1]), torch.tensor([2.0, 5.0])),
        lambda x, y: torch.zeros(9).view(-1).index_put_((torch.tensor([3, 1]),), torch.tensor([2.0, 5.0])),
    ),
}


def _unpooled(pooled: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    zeros = torch.zeros_like(like).flatten(2)
    return zeros.scatter_add(-1, indices.flatten(2), pooled.flatten(2)).view_as(like)


@pytest.mark.parametrize(("refused", "instead"), REPLACED.values(), ids=REPLACED)
def test_a_replacement_has_the_same_values(refused, instead) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 6, 9, dtype=torch.float64), torch.randint(5, (2, 6, 9))
    torch.testing.assert_close(instead(x, y), refused(x, y))


def test_the_page_has_the_whole_table() -> None:
    text = (ROOT / "docs" / "cuda.md").read_text()
    for each in REFUSED:
        assert f"| {each.operation} | {each.instead} |" in text
