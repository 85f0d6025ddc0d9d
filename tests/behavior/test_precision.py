"""Scaled, clipped, low-precision and compiled trainings: what is measured of each, and that no bit of them moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import geomprobe
from geomprobe.errors import UsageError
from geomprobe.report.summary.summary import summarize
from geomprobe.report.summary.text import render
from geomprobe.trace.record import open_record

TRIES, SEED = 7, 2


def model(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))


@dataclass
class Loop:
    """A training whose steps are taken by a function of it; ``seen`` has each attempt's unclipped gradient."""

    take: Callable[[Loop, Tensor, Tensor], None]
    make: Callable[[Loop], None] = lambda loop: None
    dropout: float = 0.0
    attached: bool = True
    overflow_at: tuple[int, ...] = ()

    def __call__(self) -> None:
        torch._dynamo.reset()
        self.model = self.called = model(self.dropout)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scaler: Any = None
        self.make(self)
        if self.attached:
            self.probe = geomprobe.attach(self.model, self.optimizer, **self.stateful())
            self.backward = self.probe.backward
        else:
            self.backward = Tensor.backward
        self.seen: list[np.ndarray] = []
        for self.attempt in range(TRIES):
            x, y = torch.randn(8, 4), torch.randint(3, (8,))
            self.take(self, x, y)
        self.final = flat(self.model.parameters())

    def stateful(self) -> dict[str, Any]:
        return {"scaler": self.scaler} if self.scaler is not None else {}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(self.called(x), y)
        return loss * 1e38 * 1e38 if self.attempt in self.overflow_at else loss

    def see(self, scale: float = 1.0) -> None:
        self.seen.append(flat(p.grad / scale for p in self.model.parameters()).double().numpy())


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1).clone() for t in tensors])


def both(loop: Loop, run: Path, **options: Any) -> geomprobe.Trace:
    """The trace of a loop that ends with the bits that it has without geomprobe, in both passes."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    try:
        loop()
    finally:
        torch.use_deterministic_algorithms(False)
    plain = loop.final
    geomprobe.record(loop, run, seed=SEED).close()
    assert torch.equal(loop.final, plain)
    trace = geomprobe.replay(loop, run, **options)
    assert torch.equal(loop.final, plain)
    assert trace.status == "complete"
    return trace


def slowly(*values: Any) -> Any:
    """A case that other cases nearly cover."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Attempted and applied steps


def scaling(scaler: Callable[[], Any], **options: Any) -> Callable[[Loop], None]:
    def make(loop: Loop) -> None:
        loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1, **options)
        loop.scaler = scaler()

    return make


def scaled_step(loop: Loop, x: Tensor, y: Tensor) -> None:
    loop.optimizer.zero_grad()
    loop.backward(loop.scaler.scale(loop.loss(x, y)))
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=2.0**8)


@pytest.mark.parametrize(
    ("options", "attached"),
    [
        ({"foreach": False}, True),
        ({"foreach": False}, False),
        ({"foreach": True}, True),
        ({"fused": True}, False),
    ],
    ids=str,
)
def test_attempts_that_overflow_are_counted_and_have_no_row(
    tmp_path: Path, options: dict[str, bool], attached: bool
) -> None:
    loop = Loop(scaled_step, scaling(scaler, **options), attached=attached, overflow_at=(0, 3, 4, 6))
    trace = both(loop, tmp_path / "run")
    np.testing.assert_array_equal(trace["attempt"], [1, 2, 5])
    np.testing.assert_array_equal(trace["step"], [0, 1, 2])
    assert trace.certificate["steps_attempted"] == TRIES
    assert trace.manifest["updates"] == {
        "attempted": TRIES,
        "applied": 3,
        "scaled": True,
        "gradient": "as the optimizer takes it",
        "clipped_by": [],
    }
    with open_record(tmp_path / "run") as record:
        assert record.manifest["updates"] == trace.manifest["updates"]
    said = render(summarize(tmp_path / "run"))
    assert "7 steps, of which 4 overflowed and 3 were applied" in said


def test_a_scaler_that_is_off_or_absent_leaves_no_column(tmp_path: Path) -> None:
    loop = Loop(scaled_step, scaling(lambda: torch.amp.GradScaler("cpu", enabled=False)))
    trace = both(loop, tmp_path / "run")
    assert "attempt" not in trace
    assert trace.manifest["updates"]["attempted"] == trace.num_steps == TRIES


class OwnScaler(torch.amp.GradScaler):
    """Scales in its own way, as torch's ShardedGradScaler does."""

    def scale(self, outputs: Any) -> Any:
        self._lazy_init_scale_growth_tracker(outputs.device) if self._scale is None else None
        return outputs * self._scale

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        return super().step(optimizer, *args, **kwargs)


def test_a_scaler_of_ones_own_is_seen_like_torchs(tmp_path: Path) -> None:
    traces = [
        both(Loop(scaled_step, scaling(make, foreach=False), overflow_at=(2,)), tmp_path / name)
        for name, make in (("torch", scaler), ("own", lambda: OwnScaler("cpu", init_scale=2.0**8)))
    ]
    for column in ("attempt", "loss", "grad_norm", "g_hg"):
        np.testing.assert_array_equal(traces[0][column], traces[1][column])


# Clipping


def clipped(clip: Callable[[Any], Any], before: Callable[[Loop], None] | None = None) -> Any:
    def take(loop: Loop, x: Tensor, y: Tensor) -> None:
        loop.optimizer.zero_grad()
        loss = loop.loss(x, y)
        loop.backward(loop.scaler.scale(loss) if loop.scaler is not None else loss)
        if before is not None:
            before(loop)
        if loop.attempt not in loop.overflow_at:
            loop.see(1.0 if loop.scaler is None or before is unscale else loop.scaler.get_scale())
        clip(loop.model.parameters())
        loop.optimizer.step() if loop.scaler is None else loop.scaler.step(loop.optimizer)
        if loop.scaler is not None:
            loop.scaler.update()

    return take


def unscale(loop: Loop) -> None:
    loop.scaler.unscale_(loop.optimizer)


def as_it_is(loop: Loop) -> None:
    pass


def by_norm(parameters: Any) -> None:
    clip_grad_norm_(parameters, 0.1)


def by_value(parameters: Any) -> None:
    clip_grad_value_(parameters, 0.02)


def twice(parameters: Any) -> None:
    several = list(parameters)
    clip_grad_value_(several[:2], 0.02)
    by_norm(several)


def by_hand(parameters: Any) -> None:
    several = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in several])
    nn.utils.clip_grads_with_norm_(several, 0.1, norm)


@pytest.mark.parametrize(
    ("clip", "names"),
    [
        (by_norm, ["clip_grad_norm_"]),
        (by_value, ["clip_grad_value_"]),
        (twice, ["clip_grad_value_", "clip_grad_norm_"]),
        (by_hand, ["clip_grad_norm_"]),
    ],
)
def test_the_trace_tells_what_clipped_and_on_request_holds_the_gradient_before_it(
    tmp_path: Path, clip: Any, names: list[str]
) -> None:
    if clip is by_hand and not hasattr(nn.utils, "clip_grads_with_norm_"):
        pytest.skip("this torch has no clip_grads_with_norm_")
    loop = Loop(clipped(clip))
    trace = both(loop, tmp_path / "run", before_clipping=True)
    assert trace.manifest["updates"]["clipped_by"] == names
    assert f"as the optimizer takes it, after {', after '.join(names)}" in render(summarize(tmp_path / "run"))
    norms = [np.linalg.norm(g) for g in loop.seen]
    np.testing.assert_allclose(trace["unclipped/grad_norm"], norms, rtol=1e-7)
    assert (trace["grad_norm"] < 0.9 * trace["unclipped/grad_norm"]).all()
    ratio = trace["unclipped/inner_products/g.d"] / (norms * trace["distance"])
    np.testing.assert_allclose(trace["unclipped/cosine"], ratio, rtol=1e-7)
    assert "unclipped/loss" not in trace


@pytest.mark.parametrize(
    ("before", "options"),
    [
        (unscale, {"foreach": False}),
        (as_it_is, {"fused": True}),
        slowly(as_it_is, {"foreach": False}),
        slowly(unscale, {"fused": True}),
    ],
)
def test_a_scaled_gradient_is_measured_unscaled_also_before_it_is_clipped(
    tmp_path: Path, options: dict[str, bool], before: Any
) -> None:
    loop = Loop(clipped(by_norm, before), scaling(scaler, **options), overflow_at=(1,))
    trace = both(loop, tmp_path / "run", before_clipping=True)
    norms = [np.linalg.norm(g) for g in loop.seen]
    np.testing.assert_allclose(trace["unclipped/grad_norm"], norms, rtol=1e-6)
    np.testing.assert_array_equal(trace["attempt"], [0, 2, 3, 4, 5, 6])


def test_a_step_that_clips_nothing_has_the_gradient_that_is_taken_and_one_that_clips_too_early_has_none(
    tmp_path: Path,
) -> None:
    def take(loop: Loop, x: Tensor, y: Tensor) -> None:
        loop.optimizer.zero_grad()
        loop.backward(loop.loss(x, y))
        if loop.attempt % 3:
            by_norm(loop.model.parameters())
        if loop.attempt % 3 == 2:
            loop.backward(loop.loss(x, y))
        loop.optimizer.step()

    trace = both(Loop(take), tmp_path / "run", before_clipping=True)
    unclipped, taken = trace["unclipped/inner_products/g.g"], trace["inner_products/g.g"]
    np.testing.assert_array_equal(unclipped[::3], taken[::3])
    assert (unclipped[1::3] > taken[1::3]).all()
    assert np.isnan(unclipped[2::3]).all()


def test_the_first_clipping_of_a_script_without_attach_is_not_known_and_all_others_are(
    tmp_path: Path,
) -> None:
    loop = Loop(clipped(by_norm), attached=False)
    trace = both(loop, tmp_path / "run", before_clipping=True)
    assert trace.manifest["updates"]["clipped_by"] == ["clip_grad_norm_"]
    norms = [np.linalg.norm(g) for g in loop.seen]
    np.testing.assert_allclose(trace["unclipped/grad_norm"], [np.nan, *norms[1:]], rtol=1e-7)


def test_clipping_what_is_not_measured_does_not_count_and_asking_for_it_is_refused(tmp_path: Path) -> None:
    other = model()

    def take(loop: Loop, x: Tensor, y: Tensor) -> None:
        loop.optimizer.zero_grad()
        loop.backward(loop.loss(x, y))
        other(x).sum().backward()
        by_norm(other.parameters())
        loop.optimizer.step()

    def make(loop: Loop) -> None:  # before there is a probe
        functional.cross_entropy(other(torch.ones(2, 4)), torch.zeros(2, dtype=torch.long)).backward()
        by_norm(other.parameters())

    loop, run = Loop(take, make), tmp_path / "run"
    assert both(loop, run).manifest["updates"]["clipped_by"] == []
    kept = (run / "trace.h5").read_bytes()
    with pytest.raises(UsageError, match="the recording saw no call of clip_grad_norm_ or clip_grad_value_"):
        geomprobe.replay(loop, run, before_clipping=True, force=True)
    assert (run / "trace.h5").read_bytes() == kept


def test_after_a_pass_torchs_functions_are_its_own_again(tmp_path: Path) -> None:
    def owned() -> list[Any]:
        cells = [f.__closure__[0].cell_contents for f in (clip_grad_value_, nn.utils.clip_grad._clip_grads_with_norm_)]
        names = ("__init__", "scale", "step", "unscale_")
        return cells + [vars(torch.amp.GradScaler)[name] for name in names] + [vars(OwnScaler)["scale"]]

    before = owned()
    both(Loop(scaled_step, scaling(lambda: OwnScaler("cpu"))), tmp_path / "run")
    assert owned() == before


# Low precision


class Float32Adam(torch.optim.Adam):
    """Adam of bfloat16 parameters whose state and update are float32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["master"] = p.float()
                state["first"], state["second"] = torch.zeros_like(p.float()), torch.zeros_like(p.float())
            g = p.grad.float()
            state["first"].lerp_(g, 0.1)
            state["second"].lerp_(g * g, 0.01)
            state["master"] -= 0.01 * state["first"] / (state["second"].sqrt() + 1e-8)
            p.copy_(state["master"])


def test_bfloat16_parameters_keep_their_float32_state_in_segments_too(tmp_path: Path) -> None:
    def train() -> None:
        net = model().bfloat16()
        optimizer = Float32Adam(net.parameters())
        probe = geomprobe.attach(net, optimizer)
        for _ in probe.epochs(3):
            for x in probe.batches([torch.randn(8, 4).bfloat16() for _ in range(2)]):
                optimizer.zero_grad()
                probe.backward(net(x).float().square().mean())
                optimizer.step()
        assert {v.dtype for v in optimizer.state[next(net.parameters())].values()} == {torch.float32}

    geomprobe.record(train, tmp_path / "run", seed=SEED).close()
    for segment in ((2, 2), (1, 2)):
        trace = geomprobe.replay(train, tmp_path / "run", segment=segment)
    assert (trace.status, trace.certificate["steps_equal"]) == ("complete", 6)
    assert np.isfinite(trace["hg_norm"]).all()


# torch.compile


def compiling(what: str, backend: str, fullgraph: bool = False) -> Callable[[Loop], None]:
    def make(loop: Loop) -> None:
        options = {"backend": backend, "fullgraph": fullgraph}
        if what in ("returned", "attached"):
            loop.called = torch.compile(loop.model, **options)
        if what == "attached":
            loop.model = loop.called
        if what == "in place":
            loop.model.compile(**options)
        if what == "step":
            loop.optimizer.step = torch.compile(loop.optimizer.step, backend=backend)
        if what == "function":
            loop.optimizer.step = torch.compile(lambda step=loop.optimizer.step: step(), backend=backend)

    return make


def plain_step(loop: Loop, x: Tensor, y: Tensor) -> None:
    loop.optimizer.zero_grad()
    loop.backward(loop.loss(x, y))
    loop.optimizer.step()


# What torch itself says while it compiles.
COMPILER_WARNS = pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo", "ignore::DeprecationWarning")
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@COMPILER_WARNS
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize(
    ("what", "attached"),
    [("returned", True), slowly("attached", True), slowly("in place", True), ("returned", False)],
)
def test_a_compiled_model_keeps_its_bits_and_one_graph_and_lacks_only_hg(
    tmp_path: Path, what: str, attached: bool, backend: str
) -> None:
    loop = Loop(plain_step, compiling(what, backend, fullgraph=True), attached=attached)
    trace = both(loop, tmp_path / "run")
    assert (
        "comes from torch.compile, whose backward cannot be differentiated"
        in (trace.manifest["measure"]["curvature"]["missing"])
    )
    assert np.isfinite(trace["cosine"]).all()
    assert np.isnan(trace["hg_norm"][1:]).all()


@COMPILER_WARNS
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize(("what", "attached"), [("step", True), ("function", False)])
def test_a_compiled_optimizer_step_is_measured_like_any_and_keeps_its_bits(
    tmp_path: Path, what: str, attached: bool, backend: str
) -> None:
    trace = both(Loop(plain_step, compiling(what, backend), attached=attached), tmp_path / "run")
    assert trace.num_steps == TRIES
    assert np.isfinite(trace["hg_norm"][1:]).all()


@COMPILER_WARNS
def test_a_compiled_model_has_its_hg_from_a_closure(tmp_path: Path) -> None:
    def take(loop: Loop, x: Tensor, y: Tensor) -> None:
        loop.optimizer.zero_grad()
        loop.probe.backward(loop.loss(x, y), closure=lambda: loop.loss(x, y))
        loop.optimizer.step()

    compiled, eager = (
        both(Loop(take, make), tmp_path / name)
        for name, make in (("compiled", compiling("returned", "aot_eager")), ("eager", lambda loop: None))
    )
    assert compiled.manifest["measure"]["curvature"]["route"] == "closure"
    np.testing.assert_allclose(compiled["hg_norm"], eager["hg_norm"], rtol=1e-3)


@COMPILER_WARNS
def test_the_inputs_of_a_model_that_is_called_compiled_are_fingerprinted(tmp_path: Path) -> None:
    loop = Loop(plain_step, compiling("returned", "aot_eager"))
    both(loop, tmp_path / "run")
    with open_record(tmp_path / "run") as record:
        inputs = record.fingerprints("batch", 0, TRIES)
    assert len(np.unique(inputs.sum(1))) == TRIES
