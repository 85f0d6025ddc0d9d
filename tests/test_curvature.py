"""Hg against dense float64 Hessians, the training it must not touch, and every way in which it cannot be had."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, replace_all_batch_norm_modules_
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from geomprobe.curvature import (
    ClosureMismatch,
    Curvature,
    CurvatureUnavailable,
    backward_with_graph,
    hessian_vector_product,
    secant_product,
    side_product,
)
from geomprobe.determinism import capture_rng
from geomprobe.errors import UsageError

# torch's own forward mode, which the oracle uses, compiles its formulas with a deprecated tool.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)

# Oracle: the dense Hessian in float64 by torch.func, forward over reverse: it shares no formula with the double
# backward under test. (torch.func.hessian itself, forward over vmapped reverse, is not symmetric on train-mode
# BatchNorm in torch 2.15; forward over plain reverse is.)


def dense_product(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], seed: int, vectors) -> Tensor:
    model = copy.deepcopy(model).double()
    replace_all_batch_norm_modules_(model)  # train mode normalizes by the batch; without the in-place buffers
    bound = nn.ModuleList([model])
    bound.forward = lambda: (torch.manual_seed(seed), loss_of(model))[1]
    shapes = {f"0.{name}": p.shape for name, p in model.named_parameters()}

    def loss(weights: Tensor) -> Tensor:
        pieces = weights.split([shape.numel() for shape in shapes.values()])
        named = {name: w.view(shape) for (name, shape), w in zip(shapes.items(), pieces, strict=True)}
        return functional_call(bound, named, ())

    hessian = jacfwd(grad(loss), randomness="same")(flat(model.parameters()))
    assert relative(hessian, hessian.T) < 1e-12
    return hessian @ flat(vectors)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(self.mix(self.embed(x))).mean(1))


class Attention(nn.Module):
    """Sequence first: torch.func lays out the transposed tensors of batch_first so that dropout draws others."""

    def __init__(self, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=dropout, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1).contiguous()).mean(0))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.GELU(),
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def gated():
    """Its gradients have other bits when they are to be differentiated."""
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.GroupNorm(2, 8), nn.Linear(8, 3))


SHAPES = {mlp: (6, 5), convolutional: (6, 2, 6, 6), gated: (6, 5)}


@dataclass
class Case:
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, model: nn.Module | None = None, part: slice = slice(None), parts: int = 1) -> Tensor:
        model = self.model if model is None else model
        x = self.inputs[part]
        if x.is_floating_point():
            x = x.to(next(model.parameters()).dtype)
        return F.cross_entropy(model(x), self.targets[part]) / parts

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(5)
    models = {
        "mlp": mlp, "convolutional": convolutional, "gated": gated, "tied": Tied,
        "transformer": lambda: Attention(0.3), "flash": lambda: Attention(0.0),
    }  # fmt: skip
    model = models[name]()
    inputs = {
        "tied": torch.randint(7, (6, 3)), "convolutional": torch.randn(6, 2, 6, 6),
        "transformer": torch.randn(6, 3, 4), "flash": torch.randn(6, 3, 4),
    }.get(name, torch.randn(6, 5))  # fmt: skip
    return Case(model.to(dtype), inputs, torch.randint(3, (6,)))


CASES = ["mlp", "convolutional", "transformer", "tied", "gated"]


def gradients(parameters) -> list[Tensor | None]:
    return [p.grad for p in parameters]


# The product itself


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", CASES)
def test_graph_product_is_the_dense_hessian_times_the_gradient(name, dtype, tolerance):
    it = case(name, dtype)
    torch.manual_seed(3)
    curvature = Curvature(it.parameters, it.model)
    curvature.backward(it.loss())
    found = curvature.product(gradients(it.parameters))
    expected = dense_product(it.model, it.loss, 3, gradients(it.parameters))
    assert relative(flat(found), expected) < tolerance
    assert curvature.route == ("graph, apart" if name == "gated" else "graph")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", CASES)
def test_side_product_is_the_dense_hessian_times_the_gradient(name, dtype, tolerance):
    it = case(name, dtype)
    torch.manual_seed(3)
    rng = capture_rng()
    loss = it.loss()
    loss.backward()
    torch.rand(7)
    found = side_product(
        it.loss, it.parameters, gradients(it.parameters), loss=loss.detach(), rng=rng, module=it.model
    )
    expected = dense_product(it.model, it.loss, 3, gradients(it.parameters))
    assert relative(flat(found), expected) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_later_steps_run_one_pass_and_agree_with_the_dense_hessian(name):
    it = case(name)
    curvature = Curvature(it.parameters, it.model)
    for seed in (1, 2):
        it.model.zero_grad()
        torch.manual_seed(seed)
        curvature.backward(it.loss())
        found = curvature.product(gradients(it.parameters))
    expected = dense_product(it.model, it.loss, 2, gradients(it.parameters))
    assert relative(flat(found), expected) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "convolutional", "transformer"])
@pytest.mark.parametrize("route", ["graph", "closure"])
def test_product_under_accumulation_is_of_the_accumulated_loss(name, route):
    it = case(name)
    curvature = Curvature(it.parameters, it.model)
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]

    def total(model):
        return sum(it.loss(model, part, 3) for part in parts)

    torch.manual_seed(8)
    if route == "closure":
        curvature.route = "closure"
    for part in parts:
        rng = capture_rng()
        curvature.backward(
            it.loss(part=part, parts=3), closure=lambda part=part: it.loss(part=part, parts=3), rng=rng
        )
    found = curvature.product(gradients(it.parameters))
    assert curvature.route == route
    assert relative(flat(found), dense_product(it.model, total, 8, gradients(it.parameters))) < 1e-10


@pytest.mark.parametrize("route", ["graph", "closure"])
def test_product_is_of_the_unscaled_loss_and_of_any_vector(route):
    it = case("mlp")
    scale = torch.tensor(1024.0, dtype=torch.float64)
    curvature = Curvature(it.parameters)
    if route == "closure":
        curvature.route = "closure"
    curvature.backward(it.loss() * scale, closure=it.loss, scale=scale)
    vectors = [torch.randn_like(p) for p in it.parameters]
    kept = [curvature.product(vectors, keep=True), curvature.product([2 * v for v in vectors])]
    expected = dense_product(it.model, it.loss, 0, vectors)
    assert relative(flat(kept[0]), expected) < 1e-10
    assert relative(flat(kept[1]), 2 * expected) < 1e-10


def test_two_backward_passes_over_a_shared_graph_give_the_product_of_their_sum():
    it = case("mlp")
    hidden = it.model[:2](it.inputs.double())
    first, second = it.model[2:](hidden).square().sum(), it.model[2:](hidden).cos().sum()
    graphs = [backward_with_graph(loss, it.parameters) for loss in (first, second)]
    found = hessian_vector_product(graphs, it.parameters, gradients(it.parameters))

    def loss(model):
        out = model(it.inputs.double())
        return out.square().sum() + out.cos().sum()

    assert relative(flat(found), dense_product(it.model, loss, 0, gradients(it.parameters))) < 1e-10


def test_a_parameter_the_loss_does_not_depend_on_has_product_zero():
    used, unused, frozen = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True), torch.ones(1)
    graph = backward_with_graph(used.pow(3).sum(), [used, unused, frozen])
    found = hessian_vector_product([graph], [used, unused, frozen], [used.grad, None, None])
    assert [t.tolist() for t in found] == [[18.0, 18.0], [0.0, 0.0, 0.0], [0.0]]
    assert unused.grad is None


def test_a_loss_linear_in_the_parameters_has_product_zero_by_both_routes():
    w, x = torch.randn(4, requires_grad=True), torch.randn(4)
    graph = backward_with_graph(w @ x, [w])
    assert torch.equal(hessian_vector_product([graph], [w], [w.grad])[0], torch.zeros(4))
    assert torch.equal(side_product(lambda: w @ x, [w], [x], loss=(w @ x).detach())[0], torch.zeros(4))


def test_hooks_that_change_gradients_do_not_change_the_hessian():
    it = case("mlp")
    for p in it.parameters:
        p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    for apart in (False, True):
        it.model.zero_grad()
        graph = backward_with_graph(it.loss(), it.parameters, apart=apart)
        assert max(p.grad.abs().max() for p in it.parameters) <= 1e-3
        found = hessian_vector_product([graph], it.parameters, gradients(it.parameters))
        assert relative(flat(found), dense_product(it.model, it.loss, 0, gradients(it.parameters))) < 1e-10


def test_sparse_embedding_gradients_give_a_dense_product():
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)
    rows = torch.tensor([1, 4, 1])
    graph = backward_with_graph(table(rows).pow(3).sum(), [table.weight])
    assert table.weight.grad.is_sparse
    (found,) = hessian_vector_product([graph], [table.weight], [table.weight.grad])
    counts = torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0])[:, None]
    w = table.weight.detach()
    torch.testing.assert_close(found, counts * 6 * w * (counts * 3 * w**2))


# What must not change: whole trainings, with and without the measurement


class Trace:
    """Everything a training leaves behind, for bitwise comparison."""

    def __init__(self):
        self.tensors: list[Tensor] = []
        self.route: str | None = None

    def add(self, *tensors):
        self.tensors += [t if t is None else t.detach().clone() for t in tensors]

    def same_as(self, other: Trace) -> bool:
        return len(self.tensors) == len(other.tensors) and all(map(same_bits, self.tensors, other.tensors))


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.is_sparse:
        return b.is_sparse and same_bits(a.coalesce().values(), b.coalesce().values())
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.stride() == b.stride() and torch.equal(a.view(as_bits), b.view(as_bits))


class Measured:
    """A training's backward and step with the measurement around them, or none."""

    def __init__(self, route: str | None, parameters, module):
        self.curvature = Curvature(parameters, module) if route else None
        self.forced = route == "closure"
        self.parameters = parameters
        self.products: list[list[Tensor]] = []

    def backward(self, loss, closure=None, rng=None, scale=None):
        if self.curvature is None:
            loss.backward()
            return
        if self.forced:
            self.curvature.route = "closure"
        self.curvature.backward(loss, closure=closure if self.forced else None, rng=rng, scale=scale)

    def measure(self):
        if self.curvature is not None:
            vectors = gradients(self.parameters)
            before = [None if v is None else v.detach().clone() for v in vectors]
            self.products.append(self.curvature.product(vectors))
            assert all(map(same_bits, before, vectors))
            assert all(p.grad is v for p, v in zip(self.parameters, vectors, strict=True))


def train(
    route: str | None, build: Callable[[], nn.Module], shape, *, steps=4, prepare=None, **options
) -> Trace:
    torch.manual_seed(11)
    random.seed(1)
    np.random.seed(1)
    model = build()
    extra = prepare(model) if prepare is not None else []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimized = parameters[options.get("first", 0) :]
    optimizer = torch.optim.Adam(optimized, lr=0.01)
    measured, trace = Measured(route, optimized, model), Trace()
    data = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x, y = torch.randn(shape, generator=data), torch.randint(3, shape[:1], generator=data)
        x.requires_grad_(options.get("input_grad", False))
        optimizer.zero_grad(set_to_none=options.get("set_to_none", True))
        for _ in range(options.get("accumulate", 1)):
            rng = capture_rng()

            def loss_of(x=x, y=y):
                with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
                    return F.cross_entropy(model(x), y)

            loss = loss_of()
            measured.backward(loss, loss_of, rng)
            trace.add(loss, *gradients(model.parameters()), x.grad)
        measured.measure()
        trace.add(*gradients(model.parameters()), x.grad, *extra)
        optimizer.step()
        trace.add(*model.parameters(), *model.buffers(), torch.get_rng_state(), torch.rand(1))
        trace.add(torch.tensor(random.random()), torch.tensor(np.random.rand()))
    assert not any(p.grad is not None and p.grad.requires_grad for p in model.parameters())
    for state in optimizer.state.values():
        trace.add(*[v for v in state.values() if isinstance(v, Tensor)])
    trace.route = measured.curvature.route if measured.curvature else None
    return trace


class Checkpointed(nn.Module):
    """Its forward pass, BatchNorm and dropout included, runs again in each backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Crossed(nn.Module):
    """Two parameters that are handed one and the same gradient tensor, and one that has none."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
        self.bias, self.unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x @ torch.tanh(self.a + self.b).sum(0).expand(5, 3) + self.bias


def dropping():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def channels_last():
    return convolutional().to(memory_format=torch.channels_last)


def noisy_hooks(model) -> list[Tensor]:
    """Hooks whose order shows in the RNG, in the gradients, and in what they counted."""
    seen = torch.zeros(())

    def noise(gradient):
        seen.add_(1)
        assert not gradient.requires_grad
        return gradient + 0.01 * torch.randn(gradient.shape)

    def after(parameter):
        seen.add_(100)
        parameter.grad.mul_(0.5 + torch.rand(()))

    for parameter in model.parameters():
        parameter.register_hook(noise)
        parameter.register_post_accumulate_grad_hook(after)
    return [seen]


def lstm():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    return Last()


TRAININGS = {
    "mlp": (mlp, (6, 5), {}),
    "gated, other bits": (gated, (6, 5), {}),
    "recurrent, other bits": (lstm, (4, 3, 5), {}),
    "dropout": (dropping, (6, 5), {}),
    "batch norm": (convolutional, (6, 2, 6, 6), {}),
    "attention with dropout": (lambda: Attention(0.3), (6, 3, 4), {}),
    "checkpointed": (Checkpointed, (6, 5), {}),
    "accumulation": (convolutional, (6, 2, 6, 6), {"accumulate": 3}),
    "accumulation into zeros": (dropping, (6, 5), {"accumulate": 2, "set_to_none": False}),
    "input with gradient": (mlp, (6, 5), {"input_grad": True, "accumulate": 2}),
    "parameters outside the optimizer": (mlp, (6, 5), {"first": 2}),
    "autocast": (dropping, (6, 5), {"autocast": True}),
    "one gradient for two": (Crossed, (6, 5), {"accumulate": 2}),
    "hooks": (mlp, (6, 5), {"prepare": noisy_hooks, "accumulate": 2}),
    "hooks, other bits": (gated, (6, 5), {"prepare": noisy_hooks}),
    "checkpointed, other bits": (lambda: nn.Sequential(Checkpointed(), nn.SiLU()), (6, 5), {}),
    "channels last": (channels_last, (6, 2, 6, 6), {"accumulate": 2}),
}


@pytest.mark.parametrize("route", ["graph", "closure"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_measured_training_leaves_the_bits_of_the_plain_one(name, route):
    build, shape, options = TRAININGS[name]
    plain, measured = (train(r, build, shape, **options) for r in (None, route))
    assert measured.same_as(plain)
    if route == "graph":
        assert measured.route == ("graph, apart" if "other bits" in name else "graph")


def test_accumulation_keeps_the_very_gradient_tensors():
    it = case("mlp")
    it.loss().backward()
    before = gradients(it.parameters)
    backward_with_graph(it.loss(), it.parameters)
    assert all(p.grad is g for p, g in zip(it.parameters, before, strict=True))
    assert torch.is_grad_enabled()


def test_equal_gradients_of_two_parameters_do_not_share_memory():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    backward_with_graph((a + b).pow(2).sum(), [a, b])
    a.grad.zero_()
    assert b.grad.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("measure", [side_product, lambda c, p, v, **k: secant_product(c, p, v, 0.1, **k)])
def test_a_closure_may_draw_zero_gradients_and_move_buffers(measure):
    it = case("convolutional", torch.float32)
    optimizer = torch.optim.SGD(it.parameters, lr=0.1)
    loss = it.loss()
    loss.backward()
    held = gradients(it.parameters)
    state = [*held, *it.parameters, *it.model.buffers()]
    before = [t.detach().clone() for t in (*state, torch.get_rng_state())]
    memory, moved = [t.data_ptr() for t in state], []

    def closure():
        optimizer.zero_grad(set_to_none=False)
        again = it.loss() + 0 * torch.rand(()) * np.random.rand() * random.random()
        moved.append(not torch.equal(it.model[1].running_mean, before[len(held) + len(it.parameters)]))
        it.model[1].running_mean = torch.zeros(3)  # replaced rather than written to
        return again

    numbers = random.getstate(), np.random.get_state()[1].tolist()
    measure(closure, it.parameters, held, loss=loss.detach(), module=it.model)
    state = [*gradients(it.parameters), *it.parameters, *it.model.buffers()]
    assert all(map(same_bits, before, (*state, torch.get_rng_state())))
    assert [t.data_ptr() for t in state] == memory
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers
    assert moved[0]


@pytest.mark.parametrize("apart", [False, True])
def test_graphs_die_by_themselves_with_the_product(apart):
    gc.collect()
    gc.disable()
    try:
        it = case("mlp")
        hidden = it.model[:2](it.inputs.double())
        loss = F.cross_entropy(it.model[2:](hidden), it.targets)
        activation = weakref.ref(hidden)
        del hidden
        graph = backward_with_graph(loss, it.parameters, apart=apart)
        del loss
        assert activation() is not None
        hessian_vector_product([graph], it.parameters, gradients(it.parameters))
        assert activation() is None
    finally:
        gc.enable()


def test_a_discarded_step_frees_its_graph_and_counts_for_nothing():
    it = case("mlp")
    curvature = Curvature(it.parameters)
    curvature.backward(it.loss() * 100)
    hidden = it.model[:2](it.inputs.double())
    activation = weakref.ref(hidden)
    curvature.backward(it.model[2:](hidden).sum())
    del hidden
    curvature.discard()
    assert activation() is None
    it.model.zero_grad()
    curvature.backward(it.loss())
    found = curvature.product(gradients(it.parameters))
    assert relative(flat(found), dense_product(it.model, it.loss, 0, gradients(it.parameters))) < 1e-10


# What cannot be had, and the way round it


def test_flash_attention_without_a_closure_is_named_before_any_gradient_is_touched():
    it = case("flash", torch.float32)
    with pytest.raises(
        CurvatureUnavailable, match=r"FlashAttentionForCpuBackward0 .*closure=.*math attention"
    ) as e:
        Curvature(it.parameters).backward(it.loss())
    assert "SDPBackend.MATH" in str(e.value)
    assert gradients(it.parameters) == [None] * len(it.parameters)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
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
    with pytest.raises(
        CurvatureUnavailable, match=r"aten::_ctc_loss_backward has a backward without a derivative"
    ):
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


# Closures that are not the step's loss


def test_a_closure_of_another_minibatch_is_caught_with_both_values():
    it = case("mlp")
    loss = it.loss()
    other = it.loss(part=slice(0, 3)).item()
    with pytest.raises(ClosureMismatch) as error:
        side_product(
            lambda: it.loss(part=slice(0, 3)), it.parameters, gradients(it.parameters), loss=loss.detach()
        )
    assert repr(other) in str(error.value)
    assert repr(loss.item()) in str(error.value)


def test_a_closure_off_by_one_ulp_is_caught_unless_other_kernels_are_at_work():
    it = case("mlp")
    loss = it.loss().detach()
    near = torch.nextafter(loss, loss + 1)
    arguments = (it.loss, it.parameters, gradients(it.parameters))
    with pytest.raises(ClosureMismatch, match="at most 0 allowed"):
        side_product(*arguments, loss=near)
    side_product(*arguments, loss=near, tolerance=1e-12)


def test_a_closure_with_another_dropout_mask_is_caught():
    it = case("transformer")
    loss = it.loss().detach()
    with pytest.raises(ClosureMismatch, match="another loss"):
        side_product(it.loss, it.parameters, gradients(it.parameters), loss=loss, rng=capture_rng())


def test_a_closure_that_returns_a_number_is_caught():
    it = case("mlp")
    with pytest.raises(ClosureMismatch, match="no graph"):
        side_product(lambda: it.loss().item(), it.parameters, [None] * 6, loss=it.loss().detach())


def test_a_closure_that_ran_backward_itself_is_told_so():
    it = case("mlp")

    def closure():
        loss = it.loss()
        loss.backward()
        return loss

    with pytest.raises(ClosureMismatch, match="called backward"):
        side_product(closure, it.parameters, [None] * 6, loss=it.loss().detach())
    assert gradients(it.parameters) == [None] * 6


def test_a_failing_closure_leaves_everything_in_place():
    it = case("convolutional")
    it.loss().backward()
    held, weights = gradients(it.parameters), [p.data_ptr() for p in it.parameters]
    copies = [b.clone() for b in (*it.parameters, *it.model.buffers())]
    before = torch.get_rng_state()
    calls = []

    def closure():
        calls.append(1)
        torch.rand(1)
        if len(calls) == 2:
            raise RuntimeError("out of coffee")
        return it.loss()

    loss = it.loss().detach()
    copies[len(weights) :] = [b.clone() for b in it.model.buffers()]
    with pytest.raises(RuntimeError, match="out of coffee"):
        secant_product(closure, it.parameters, held, 0.1, loss=loss, module=it.model)
    assert all(p.grad is g for p, g in zip(it.parameters, held, strict=True))
    assert [p.data_ptr() for p in it.parameters] == weights
    assert all(map(same_bits, copies, (*it.parameters, *it.model.buffers())))
    assert torch.equal(before, torch.get_rng_state())


def test_a_nonfinite_loss_gives_a_nonfinite_product_by_both_routes():
    w = torch.tensor([0.0], requires_grad=True)

    def loss():
        return (w.log() * w).sum()

    assert loss().isnan()
    for closure, route in ((None, "graph"), (loss, "closure")):
        w.grad = None
        curvature = Curvature([w])
        curvature.route = None if route == "graph" else "closure"
        curvature.backward(loss(), closure=closure)
        assert not curvature.product([w.grad])[0].isfinite()


def test_a_product_without_a_backward_is_a_usage_error():
    with pytest.raises(UsageError, match="no backward"):
        Curvature([torch.ones(1, requires_grad=True)]).product([None])


# The secant


def test_the_secant_product_is_the_difference_of_gradients_a_step_apart():
    it = case("transformer")
    torch.manual_seed(4)
    rng = capture_rng()
    loss = it.loss()
    loss.backward()
    v = gradients(it.parameters)
    found = secant_product(it.loss, it.parameters, v, 0.3, loss=loss.detach(), rng=rng, module=it.model)
    moved = copy.deepcopy(it)
    with torch.no_grad():
        for p, g in zip(moved.parameters, v, strict=True):
            p -= 0.3 * g
    moved.model.zero_grad()
    torch.manual_seed(4)
    moved.loss().backward()
    expected = (flat(v) - flat(gradients(moved.parameters))) / 0.3
    torch.testing.assert_close(flat(found), expected, rtol=1e-12, atol=1e-14)


def test_the_secant_product_tends_to_the_hessian_product_on_a_smooth_loss():
    it = case("tied")
    it.loss().backward()
    v = gradients(it.parameters)
    hessian = dense_product(it.model, it.loss, 0, v)
    errors = [
        relative(flat(secant_product(it.loss, it.parameters, v, lr, loss=it.loss().detach())), hessian)
        for lr in (1e-2, 1e-3)
    ]
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)
