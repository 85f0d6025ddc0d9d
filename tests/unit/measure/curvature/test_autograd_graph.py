"""What has no second derivative: each is named, with the way round it, and never left out in silence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.hessian_cases import PRECISIONS, Case, case, dense_product, flat, gradients, relative, same_bits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from geomprobe.measure.curvature.autograd_graph import CurvatureUnavailable
from geomprobe.measure.curvature.hessian_gradient import Curvature


def test_flash_attention_without_a_closure_is_named_before_any_gradient_is_touched():
    it = case("flash", torch.float32)
    with pytest.raises(CurvatureUnavailable, match=r"FlashAttentionForCpuBackward0 .*closure=.*math attention") as e:
        Curvature(it.parameters).backward(it.loss())
    assert "SDPBackend.MATH" in str(e.value)
    assert gradients(it.parameters) == [None] * len(it.parameters)


@PRECISIONS
def test_flash_attention_with_a_closure_is_measured_by_the_math_kernel(dtype, tolerance):
    it = case("flash", dtype)
    curvature = Curvature(it.parameters, it.model)
    loss = it.loss()
    plain = torch.autograd.grad(loss, it.parameters, retain_graph=True)
    curvature.backward(loss, closure=it.loss)
    assert all(map(same_bits, gradients(it.parameters), plain))
    found = curvature.product(gradients(it.parameters))
    with sdpa_kernel(SDPBackend.MATH):
        expected = dense_product(it.model, it.loss, 0, gradients(it.parameters))
    assert relative(flat(found), expected) < tolerance
    assert curvature.route == "closure"


def compiled_mlp() -> tuple[Case, nn.Module]:
    it = case("mlp", torch.float32)
    return it, torch.compile(it.model, backend="aot_eager")


def test_a_compiled_model_without_a_closure_is_named():
    it, compiled = compiled_mlp()
    with pytest.raises(CurvatureUnavailable, match=r"CompiledFunctionBackward comes from torch\.compile"):
        Curvature(it.parameters).backward(it.loss(compiled))


def test_a_compiled_model_with_a_closure_is_measured_with_the_compiler_off():
    it, compiled = compiled_mlp()
    curvature = Curvature(it.parameters)
    curvature.backward(it.loss(compiled), closure=lambda: it.loss(compiled))
    found = curvature.product(gradients(it.parameters))
    assert relative(flat(found), dense_product(it.model, it.loss, 0, gradients(it.parameters))) < 1e-4


def test_reentrant_checkpointing_is_named_with_its_remedy_by_both_routes():
    it = case("mlp")
    it.inputs.requires_grad_()

    def loss():
        return it.model[2:](checkpoint(it.model[:2], it.inputs.double(), use_reentrant=True)).square().mean()

    with pytest.raises(CurvatureUnavailable, match=r"CheckpointFunctionBackward .*use_reentrant=False"):
        Curvature(it.parameters).backward(loss())
    curvature = Curvature(it.parameters)
    curvature.backward(loss(), closure=loss)
    with pytest.raises(CurvatureUnavailable, match=r"CheckpointFunctionBackward .*use_reentrant=False"):
        curvature.product(gradients(it.parameters))


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Foreign(torch.autograd.Function):
    """Its backward leaves torch, as a kernel of an extension does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return torch.tensor(2 * g.detach().numpy() * ctx.saved_tensors[0].detach().numpy())


class Reversed(torch.autograd.Function):
    """A well-made custom function: gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


@pytest.mark.parametrize(("function", "name"), [(Marked, "MarkedBackward"), (Foreign, "ForeignBackward")])
def test_custom_functions_that_would_drop_terms_in_silence_are_named(function, name):
    it = case("mlp")
    for last in (
        lambda out: function.apply(out).mean(),
        lambda out: function.apply(out.mean()),
    ):
        it.model.zero_grad()
        with pytest.raises(CurvatureUnavailable, match=name):
            Curvature(it.parameters).backward(last(it.model(it.inputs.double())))


def test_a_foreign_function_met_later_leaves_complete_gradients_and_falls_back_on_the_closure():
    it = case("mlp")
    curvature = Curvature(it.parameters)
    curvature.backward(it.model(it.inputs.double()).square().mean())
    curvature.product(gradients(it.parameters))
    it.model.zero_grad()
    loss = Foreign.apply(it.model(it.inputs.double())).mean()
    plain = torch.autograd.grad(loss, it.parameters, retain_graph=True)
    curvature.backward(loss, closure=lambda: it.model(it.inputs.double()).square().mean())
    assert all(map(same_bits, gradients(it.parameters), plain))
    found = curvature.product(gradients(it.parameters))
    expected = dense_product(it.model, lambda m: m(it.inputs.double()).square().mean(), 0, list(plain))
    assert relative(flat(found), expected) < 1e-10


def test_a_well_made_custom_function_passes():
    w = torch.tensor([2.0], requires_grad=True)
    curvature = Curvature([w])
    curvature.backward(Reversed.apply(w.pow(3)).sum())
    assert curvature.product([w.grad])[0].item() == -12.0 * -12.0


def ctc(model, x) -> Tensor:
    log_probabilities = F.log_softmax(model(x).view(3, 2, 3), -1)
    return F.ctc_loss(log_probabilities, torch.tensor([[1], [2]]), torch.tensor([3, 3]), torch.tensor([1, 1]))


def test_an_operation_found_out_by_its_double_backward_is_named_and_the_gradients_stand():
    it = case("mlp")
    curvature = Curvature(it.parameters)
    curvature.backward(ctc(it.model, it.inputs.double()))
    plain = gradients(it.parameters)
    with pytest.raises(CurvatureUnavailable, match=r"aten::_ctc_loss_backward has a backward without a derivative"):
        curvature.product(plain)
    assert all(p.grad is g for p, g in zip(it.parameters, plain, strict=True))


def test_an_operation_found_out_by_its_double_backward_falls_back_on_the_closure():
    """The closure here is a quadratic that happens to have the loss's value: only the route is under test."""
    it = case("mlp")
    curvature = Curvature(it.parameters)
    loss = ctc(it.model, it.inputs.double())

    def closure():
        half = sum(p.square().sum() for p in it.parameters) / 2
        return half + (loss - half).detach()

    curvature.backward(loss, closure=closure)
    found = curvature.product(gradients(it.parameters))
    assert curvature.route == "closure"
    assert relative(flat(found), flat(gradients(it.parameters))) < 1e-12


def named(name: str) -> type[torch.autograd.Function]:
    """A function whose node in the graph has the name of one that this machine cannot run."""
    return type(name, (Reversed,), {})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("SyncBatchNorm", "convert_sync_batchnorm"), ("CudnnRnn", r"cudnn\.flags\(enabled=False\)")],
)
def test_operations_of_other_machines_are_named_with_their_remedy(name, remedy):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(CurvatureUnavailable, match=f"{name}Backward .*{remedy}"):
        Curvature([w]).backward(named(name).apply(w).sum())


def test_a_recurrence_of_cudnn_is_evaluated_on_the_side_with_cudnn_off():
    w = torch.ones(2, requires_grad=True)
    enabled = []

    def closure():
        enabled.append(torch.backends.cudnn.enabled)
        return w.pow(3).sum()

    curvature = Curvature([w])
    curvature.backward(named("CudnnRnn").apply(-w.pow(3)).sum() * -1 * -1, closure=lambda: -closure())
    assert [t.tolist() for t in curvature.product([torch.ones(2)])] == [[-6.0, -6.0]]
    assert enabled == [False]
    assert torch.backends.cudnn.enabled
