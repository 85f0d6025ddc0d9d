"""Hg, finite steps and sharpness in a whole replay, against dense float64 Hessians along the same path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import geomprobe
from geomprobe.errors import UsageError
from geomprobe.measure.curvature.autograd_graph import CurvatureUnavailable
from geomprobe.measure.curvature.side_evaluation import ClosureMismatch

STEPS = 5


class Net(nn.Module):
    """Convolution, train-mode BatchNorm, dropout: what makes a second evaluation go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.3))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Attention(nn.Module):
    """One attention layer, by whichever kernel torch picks."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, dim=-1)
        return self.head(functional.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 2, 6), torch.randint(2, (6,))) for _ in range(STEPS)]


def training(
    make: Callable[[], nn.Module] = Net,
    *,
    closures: bool = False,
    parts: int = 1,
    dtype: torch.dtype = torch.float64,
    seen: list[tuple[Tensor, Tensor]] | None = None,
    data: Callable[[], list[tuple[Tensor, Tensor]]] = batches,
) -> Callable[[], None]:
    """A training function; ``seen`` gets the dense oracle's (G, HG) of each step."""

    def train() -> None:
        model = make().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        probe = geomprobe.attach(model, optimizer)
        for x, y in probe.batches(data()):
            optimizer.zero_grad()
            total: Tensor | None = None
            for xs, ys in zip(x.to(dtype).chunk(parts), y.chunk(parts), strict=True):

                def loss_of(xs: Tensor = xs, ys: Tensor = ys) -> Tensor:
                    return functional.cross_entropy(model(xs), ys) / parts

                if seen is not None:
                    hessian = dense_hessian(model, xs, ys, parts)
                    total = hessian if total is None else total + hessian
                probe.backward(loss_of(), closure=loss_of if closures else None)
            if seen is not None and total is not None:
                g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                seen.append((g.clone(), total.detach() @ g))
            optimizer.step()

    return train


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> Tensor:
    """The Hessian of the loss, with the dropout mask that the next forward pass will draw."""
    rng = torch.get_rng_state()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(flat: Tensor) -> Tensor:
        torch.set_rng_state(rng)
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: v.view(s) for (name, s), v in zip(shapes.items(), pieces, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            out = functional_call(model, {**values, **{k: b.clone() for k, b in buffers.items()}}, (x,))
        return functional.cross_entropy(out, y) / parts

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    columns = jacrev(grad(loss), chunk_size=1)(flat)
    torch.set_rng_state(rng)
    return columns


def oracle(train_with: Callable[..., Callable[[], None]]) -> tuple[np.ndarray, np.ndarray]:
    """``||HG||`` and ``G.HG`` of each step, from a run with no pass around it."""
    seen: list[tuple[Tensor, Tensor]] = []
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    train_with(seen=seen)()
    torch.use_deterministic_algorithms(deterministic)
    return (
        np.array([float(hg.norm()) for _, hg in seen]),
        np.array([float(g @ hg) for g, hg in seen]),
    )


CASES = {
    "dropout and BatchNorm": lambda **k: training(**k),
    "by the closure as well": lambda **k: training(closures=True, **k),
    "accumulated": lambda **k: training(parts=3, **k),
    "accumulated, closures": lambda **k: training(parts=3, closures=True, **k),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if "," in case else ()) for case in CASES])
def test_hg_columns_equal_the_dense_hessian_along_the_path(case, tmp_path):
    trace = geomprobe.two_pass(CASES[case](), tmp_path / "run", seed=0)
    hg_norm, g_hg = oracle(CASES[case])
    assert trace.certificate["steps_equal"] == STEPS
    assert trace.status == "complete"
    np.testing.assert_allclose(trace["hg_norm"], hg_norm, rtol=1e-10)
    np.testing.assert_allclose(trace["g_hg"], g_hg, rtol=1e-9)
    np.testing.assert_allclose(trace["corridor_residual"], hg_norm / trace["grad_norm"], rtol=1e-10)
    np.testing.assert_allclose(trace["relative_residual"], 0.05 * hg_norm / trace["grad_norm"], rtol=1e-10)
    np.testing.assert_allclose(trace["flow_drift"], 0.05**2 * hg_norm / 2, rtol=1e-10)


def sequences() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 5, 4), torch.randint(2, (3,))) for _ in range(STEPS)]


def test_hg_of_fused_attention_comes_by_the_closure_and_the_replay_still_certifies(tmp_path):
    with_closure = training(Attention, closures=True, data=sequences)
    trace = geomprobe.two_pass(with_closure, tmp_path / "run", seed=0)
    hg_norm, _ = oracle(lambda **k: training(Attention, data=sequences, **k))
    assert trace.manifest["measure"]["curvature"]["route"] == "closure"
    assert trace.certificate["steps_equal"] == STEPS
    np.testing.assert_allclose(trace["hg_norm"], hg_norm, rtol=1e-9)


def test_without_a_route_hg_is_left_out_and_the_rest_stands(tmp_path, capsys):
    trace = geomprobe.two_pass(training(Attention, data=sequences), tmp_path / "run", seed=0)
    assert trace.certificate["steps_equal"] == STEPS
    assert np.isnan(trace["hg_norm"]).all()
    assert np.isfinite(trace["cosine"]).all()
    assert "closure" in trace.manifest["measure"]["curvature"]["missing"]
    assert "Hg is left out" in capsys.readouterr().err


def test_hg_that_was_asked_for_and_has_no_route_fails_with_the_way_round(tmp_path):
    train = training(Attention, data=sequences)
    geomprobe.record(train, tmp_path / "run", seed=0)
    with pytest.raises(CurvatureUnavailable, match=r"attention.*closure.*sdpa_kernel"):
        geomprobe.replay(train, tmp_path / "run", curvature_every=1)


def test_hg_under_autocast_certifies_and_is_close_to_float64(tmp_path):
    def train() -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        probe = geomprobe.attach(model, optimizer, scaler=scaler)
        for x in probe.batches([torch.randn(6, 4) for _ in range(STEPS)]):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (model(x).float() - 1).square().mean()
            optimizer.zero_grad()
            probe.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()

    trace = geomprobe.two_pass(train, tmp_path / "run", seed=0)
    assert trace.certificate["steps_equal"] == STEPS

    def plain() -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        data = [torch.randn(6, 4) for _ in range(STEPS)]
        x, parameters = data[0], list(model.parameters())
        gradients = torch.autograd.grad((model(x) - 1).square().mean(), parameters, create_graph=True)
        hg = torch.autograd.grad(gradients, parameters, [g.detach() for g in gradients])
        first.append(float(torch.cat([h.flatten() for h in hg]).norm()))

    first: list[float] = []
    torch.manual_seed(0)
    plain()
    assert trace["hg_norm"][0] == pytest.approx(first[0], rel=0.05)  # bfloat16 has 8 bits


def test_hg_is_taken_at_each_nth_step_only(tmp_path):
    train = training()
    geomprobe.record(train, tmp_path / "run", seed=0)
    trace = geomprobe.replay(train, tmp_path / "run")
    every, cosine = trace["hg_norm"], trace["cosine"]
    second = geomprobe.replay(train, tmp_path / "run", curvature_every=2, force=True)["hg_norm"]
    never = geomprobe.replay(train, tmp_path / "run", curvature_every=0, force=True)
    assert np.isfinite(second).tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(second[::2], every[::2])
    assert np.isnan(never["hg_norm"]).all()
    np.testing.assert_array_equal(never["cosine"], cosine)


def test_hg_per_parameter_adds_up(tmp_path):
    train = training()
    geomprobe.record(train, tmp_path / "run", seed=0)
    trace = geomprobe.replay(train, tmp_path / "run", per_parameter=True)
    for product in ("g.Hg", "Hg.Hg"):
        parts = sum(trace[f"parameters/{name}/{product}"] for name in trace.parameters)
        np.testing.assert_allclose(parts, trace[f"inner_products/{product}"], rtol=1e-12)


def test_hg_without_attach_begins_at_the_second_step(tmp_path):
    def train() -> None:
        model = Net().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for x, y in batches():
            optimizer.zero_grad()
            functional.cross_entropy(model(x.double()), y).backward()
            optimizer.step()

    trace = geomprobe.two_pass(train, tmp_path / "run", seed=0)
    hg_norm, _ = oracle(training)
    assert np.isnan(trace["hg_norm"][0])  # the parameters become known at the first step
    np.testing.assert_allclose(trace["hg_norm"][1:], hg_norm[1:], rtol=1e-10)


def test_finite_steps_equal_the_loss_and_gradient_a_step_further(tmp_path):
    """On a quadratic ``(w - 1)' A (w - 1) / 2`` the secant is Hg, and the gap is ``lr^2 g.Hg / 2``."""
    scales = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self) -> Tensor:
            return (scales * (self.w - 1) ** 2).sum() / 2

    def train() -> None:
        model = Bowl()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        probe = geomprobe.attach(model, optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            probe.backward(model(), closure=model)
            optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0)
    trace = geomprobe.replay(train, tmp_path / "run", finite_step=True, sharpness_every=2)
    np.testing.assert_allclose(trace["secant_residual"], trace["corridor_residual"], rtol=1e-12)
    np.testing.assert_allclose(trace["linear_decrease_gap"], 0.05**2 * trace["g_hg"] / 2, rtol=1e-10)
    np.testing.assert_allclose(trace["sharpness"][::2], 5.0, rtol=1e-6)
    assert np.isnan(trace["sharpness"][1::2]).all()
    assert trace.certificate["steps_equal"] == STEPS


def test_the_sharpness_of_a_fixed_loss_replaces_the_minibatch_s(tmp_path):
    def train() -> None:
        model = Net().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        probe = geomprobe.attach(model, optimizer)
        data = batches()
        x0, y0 = data[0][0].double(), data[0][1]
        probe.sharpness_of(lambda: functional.cross_entropy(model.eval()(x0), y0))
        for x, y in probe.batches(data):
            model.train()
            optimizer.zero_grad()
            probe.backward(functional.cross_entropy(model(x.double()), y))
            if expected is not None:
                model.eval()
                expected.append(float(torch.linalg.eigvalsh(dense_hessian(model, x0, y0, 1))[-1]))
                model.train()
            optimizer.step()

    expected: list[float] | None = None
    geomprobe.record(train, tmp_path / "run", seed=0)
    trace = geomprobe.replay(train, tmp_path / "run", curvature_every=0, sharpness_every=1)
    assert trace.certificate["steps_equal"] == STEPS
    expected = []
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    train()
    torch.use_deterministic_algorithms(False)
    np.testing.assert_allclose(trace["sharpness"], expected, rtol=1e-3)


def test_a_closure_of_another_loss_is_caught(tmp_path):
    def train() -> None:
        model = Attention().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        probe = geomprobe.attach(model, optimizer)
        for x, y in probe.batches(sequences()):
            x = x.double()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            probe.backward(loss, closure=lambda: 2 * functional.cross_entropy(model(x), y))  # noqa: B023
            optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0)
    with pytest.raises(ClosureMismatch, match="another loss than the step's"):
        geomprobe.replay(train, tmp_path / "run")


def test_finite_steps_without_hg_are_refused(tmp_path):
    train = training()
    geomprobe.record(train, tmp_path / "run", seed=0)
    with pytest.raises(UsageError, match="curvature_every=0 leaves Hg out"):
        geomprobe.replay(train, tmp_path / "run", curvature_every=0, finite_step=True)


def test_a_corridor_has_no_residual_and_a_quadratic_has_one(tmp_path):
    from geomprobe.corridor import ConvexCone, Quadratic

    def descend(landscape: Callable[[], nn.Module]) -> Callable[[], None]:
        def train() -> None:
            model = landscape().double()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            probe = geomprobe.attach(model, optimizer)
            for _ in range(STEPS):
                optimizer.zero_grad()
                probe.backward(model())
                optimizer.step()

        return train

    cone = geomprobe.two_pass(descend(lambda: ConvexCone(2.0, start=(3.0, 4.0))), tmp_path / "cone", seed=0)
    bowl = geomprobe.two_pass(
        descend(lambda: Quadratic([[1.0, 0.0], [0.0, 3.0]], start=(1.0, 1.0))), tmp_path / "bowl", seed=0
    )
    assert cone["relative_residual"].max() < 1e-15
    assert bowl["relative_residual"].min() > 0.01
