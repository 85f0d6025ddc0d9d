"""Held-out minibatches and the full gradient in a whole replay, against dense float64 gradients on the same samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_server import run
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import geomprobe
from geomprobe import Trace
from geomprobe.distributed.layout import Layout
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.side_gradient import HeldOutGradient

SAMPLES, BATCH, EPOCHS = 24, 4, 3
IN_EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * IN_EPOCH


def network() -> nn.Module:
    """BatchNorm and dropout: what a second evaluation could leave a trace in."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(points, torch.randint(3, (count,), generator=generator))


class Training:
    """A training that names both gradients; keeps what its losses were asked for, and the weights at that moment."""

    def __init__(self, held_out: Any = None, *, fetch: bool = True) -> None:
        self.held_out_loader = DataLoader(samples(50, 2), 5) if held_out is None else held_out
        self.full_loader = DataLoader(samples(SAMPLES, 1), 7)
        self.fetch = fetch
        self.asked: dict[str, list[dict[str, Any]]] = {}
        self.path: list[list[Tensor]] = []

    def __call__(self) -> None:
        self.asked, self.path = {"held out": [], "full": []}, []
        self.model = network()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        probe = geomprobe.attach(self.model, optimizer)
        probe.held_out(self.loss_of("held out"), self.held_out_loader)
        probe.full_gradient_of(self.loss_of("full"), self.full_loader)
        loader = DataLoader(samples(SAMPLES, 1), BATCH, shuffle=True)
        for _ in probe.epochs(EPOCHS):
            for x, y in probe.batches(loader) if self.fetch else loader:
                optimizer.zero_grad()
                probe.backward(functional.cross_entropy(self.model(x), y))
                self.path.append([p.detach().clone() for p in self.model.parameters()])
                optimizer.step()
        self.path.append([p.detach().clone() for p in self.model.parameters()])

    def loss_of(self, name: str) -> Callable[[Any], Tensor]:
        def loss(batch: Any) -> Tensor:
            buffers = {key: b.clone() for key, b in self.model.named_buffers()}
            now = {"step": len(self.path) - 1, "rng": torch.get_rng_state(), "buffers": buffers}
            self.asked[name].append({**now, "batch": batch})
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        return loss

    def dense(self, name: str) -> dict[int, dict[str, float]]:
        """Loss and inner products by step, from functional calls with the same masks and statistics."""
        found: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        for asked in self.asked[name]:
            x, y = asked["batch"]
            weights = dict(zip(dict(self.model.named_parameters()), self.path[asked["step"]], strict=True))

            def loss(weights: dict[str, Tensor], x: Tensor = x, y: Tensor = y, asked: Any = asked) -> Tensor:
                kept = {key: buffer.clone() for key, buffer in asked["buffers"].items()}
                return functional.cross_entropy(functional_call(self.model, {**weights, **kept}, (x,)), y)

            with torch.random.fork_rng():
                torch.set_rng_state(asked["rng"])
                gradient, value = grad_and_value(loss)(weights)
            flat = torch.cat([gradient[key].flatten() for key in weights])
            found.setdefault(asked["step"], []).append((len(y), value, flat))
        products = {}
        for step, parts in found.items():
            whole = sum(count for count, _, _ in parts)
            value = sum(float(value) * count / whole for count, value, _ in parts)
            g = sum((flat * count / whole for count, _, flat in parts), torch.tensor(0.0))
            w, final = (torch.cat([p.flatten() for p in self.path[at]]) for at in (step, -1))
            products[step] = {"loss": value} | {
                key: float(a @ b)
                for key, (a, b) in {
                    "g.g": (g, g),
                    "w.g": (w, g),
                    "g.d": (g, w - final),
                    "d.d": (w - final, w - final),
                }.items()
            }
        return products


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, Trace, Path]:
    """A run that measured both, the training that was replayed, and its folder."""
    training, path = Training(), tmp_path_factory.mktemp("held_out") / "run"
    geomprobe.record(training, path, seed=0).close()
    assert training.asked == {"held out": [], "full": []}
    trace = geomprobe.replay(training, path, held_out_every=3, full_gradient_every=1)
    return training, trace, path


def assert_measured(trace: Trace, group: str, wanted: dict[int, dict[str, float]]) -> None:
    """The rows that were due hold the wanted numbers and what follows from them, and no other row any."""
    names = ("loss", "rsi", "eb", "cosine", "lolr", "grad_norm", "grad_dot_offset")
    columns = {name: trace[f"{group}/{name}"] for name in names}
    columns |= {name: trace[f"{group}/inner_products/{name}"] for name in ("g.g", "w.g", "g.d", "d.d")}
    for name, values in columns.items():
        assert np.flatnonzero(~np.isnan(values)).tolist() == sorted(wanted), name
    for step, of in wanted.items():
        g, d = np.sqrt(of["g.g"]), np.sqrt(of["d.d"])
        follows = {
            "rsi": of["g.d"] / of["d.d"],
            "eb": g / d,
            "cosine": of["g.d"] / (g * d),
            "lolr": of["g.d"] / of["g.g"],
            "grad_norm": g,
            "grad_dot_offset": of["g.d"],
        }
        for name, value in {**of, **follows}.items():
            assert columns[name][step] == pytest.approx(value, rel=1e-10, abs=1e-14), (name, step)


def test_a_held_out_minibatch_is_measured_at_its_cadence(done: Any) -> None:
    training, trace, _ = done
    wanted = training.dense("held out")
    assert sorted(wanted) == list(range(0, STEPS, 3))
    assert_measured(trace, "held_out", wanted)


def test_the_full_gradient_is_measured_where_an_epoch_has_ended(done: Any) -> None:
    training, trace, _ = done
    assert [len(asked["batch"][1]) for asked in training.asked["full"]] == [7, 7, 7, 3] * EPOCHS
    seen = torch.cat([asked["batch"][0] for asked in training.asked["full"][:4]])
    assert torch.equal(seen, samples(SAMPLES, 1).tensors[0])
    assert_measured(trace, "full_gradient", training.dense("full"))
    assert sorted(training.dense("full")) == [0, IN_EPOCH, 2 * IN_EPOCH]


def test_a_fresh_minibatch_is_drawn_each_time_without_replacement(done: Any) -> None:
    training, _, _ = done
    rows = [set(map(tuple, asked["batch"][0].tolist())) for asked in training.asked["held out"]]
    there = set(map(tuple, samples(50, 2).tensors[0].tolist()))
    assert all(len(row) == 5 and row <= there for row in rows)
    assert len(set(map(frozenset, rows))) == len(rows)


def test_the_run_is_certified_and_all_else_is_bit_for_bit_what_it_is_without(done: Any) -> None:
    training, trace, path = done
    assert trace.certificate["steps_equal"] == STEPS
    assert {path.split("/")[0] for path in trace.oracle_columns} == {"held_out", "full_gradient"}
    columns = {name: trace[name] for name in (*trace.columns, "inner_products/g.d", "inner_products/Hg.Hg")}
    measured = training.path
    plain = geomprobe.replay(training, path, force=True)
    assert plain.oracle_columns == []
    assert all(
        torch.equal(a, b)
        for then, now in zip(measured, training.path, strict=True)
        for a, b in zip(then, now, strict=True)
    )
    for name, values in columns.items():
        np.testing.assert_array_equal(plain[name], values, err_msg=name)
    again = geomprobe.replay(training, path, held_out_every=3, full_gradient_every=1, force=True)
    for name in ("held_out/cosine", "full_gradient/cosine", "held_out/loss"):
        np.testing.assert_array_equal(again[name], trace[name])


class Meddler(Training):
    """Its loss draws from every stream, changes modes, gradients and buffers, and iterates over loaders."""

    def loss_of(self, name: str) -> Callable[[Any], Tensor]:
        plain = super().loss_of(name)

        def loss(batch: Any) -> Tensor:
            self.model.zero_grad(set_to_none=False)
            for _ in DataLoader(samples(8, 3), 2, shuffle=True):
                torch.rand(3), np.random.rand(2), random.random()
            self.model.eval()
            self.model(batch[0]).sum().backward()
            self.model.train()
            torch.optim.SGD(self.model.parameters(), lr=1.0).zero_grad()
            self.model[1].running_mean = torch.ones(8, dtype=torch.float64)
            value = plain(batch)
            self.model.eval()
            return value

        return loss


@pytest.mark.parametrize("fetch", [True, False], ids=["probe.batches", "a plain loader"])
def test_a_loss_that_meddles_leaves_the_run_as_it_is(tmp_path: Path, fetch: bool) -> None:
    training = Meddler(fetch=fetch)
    geomprobe.record(training, tmp_path / "run", seed=0).close()
    final = training.path[-1]
    trace = geomprobe.replay(training, tmp_path / "run", held_out_every=1, full_gradient_every=1)
    assert trace.certificate["steps_equal"] == STEPS
    assert all(map(torch.equal, training.path[-1], final))
    np.testing.assert_array_equal(trace["epoch"], np.repeat(np.arange(EPOCHS), IN_EPOCH))
    assert np.isfinite(trace["hg_norm"]).all()


def test_a_sharpness_closure_is_no_event_of_the_run_either(tmp_path: Path) -> None:
    class Sharp(Training):
        def __call__(self) -> None:
            self.fetch = False
            attach, kept = geomprobe.attach, samples(4, 4)

            def attached(model: nn.Module, *rest: Any) -> Any:
                probe = attach(model, *rest)
                probe.sharpness_of(lambda: functional.cross_entropy(model(kept.tensors[0]), kept.tensors[1]))
                return probe

            geomprobe.attach = attached  # type: ignore[assignment]
            try:
                super().__call__()
            finally:
                geomprobe.attach = attach  # type: ignore[assignment]

    geomprobe.record(Sharp(), tmp_path / "run", seed=0).close()
    trace = geomprobe.replay(Sharp(), tmp_path / "run", curvature_every=0, sharpness_every=6)
    assert trace.certificate["steps_equal"] == STEPS


def test_every_second_epoch_means_every_second(done: Any) -> None:
    training, _, path = done
    trace = geomprobe.replay(training, path, full_gradient_every=2, every=5, force=True)
    assert np.flatnonzero(np.isfinite(trace["full_gradient/cosine"])).tolist() == [0, 2 * IN_EPOCH]
    assert np.isnan(trace["full_gradient/cosine"][1:5]).all()
    assert "held_out/cosine" not in trace


def test_segments_that_begin_in_the_middle_measure_the_same_bits(done: Any) -> None:
    training, _, path = done
    options = {"held_out_every": 3, "full_gradient_every": 1}
    again = geomprobe.replay(training, path, force=True, **options)
    columns = [*again.oracle_columns, "held_out/inner_products/w.g", "full_gradient/inner_products/w.g"]
    serial = {name: again[name] for name in columns}
    (path / "trace.h5").unlink()
    for number in (2, 1):
        split = geomprobe.replay(training, path, segment=(number, 2), **options)
    assert split.status == "complete"
    for name, values in serial.items():
        np.testing.assert_array_equal(split[name], values, err_msg=name)


def test_without_a_loader_the_loss_draws_its_own_minibatch(tmp_path: Path) -> None:
    drawn: list[list[int]] = []

    def train() -> None:
        drawn.clear()
        weights = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([weights], lr=0.1)
        points = torch.arange(30.0, dtype=torch.float64).view(10, 3) / 10
        probe = geomprobe.attach(None, optimizer)

        def loss() -> Tensor:
            drawn.append(torch.randint(10, (4,)).tolist())
            return (points[drawn[-1]] @ weights).square().mean()

        probe.held_out(loss)
        for _ in probe.epochs(4):
            optimizer.zero_grad()
            probe.backward((points @ weights - 1).square().mean())
            optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0).close()
    trace = geomprobe.replay(train, tmp_path / "run", held_out_every=2)
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]
    points = np.arange(30.0).reshape(10, 3) / 10
    gradient = 2 * points[drawn[0]].T @ (points[drawn[0]] @ np.ones(3)) / 4
    assert trace["held_out/grad_norm"][0] == pytest.approx(np.linalg.norm(gradient), rel=1e-12)


# What is refused


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples(8, 1))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), 4), "its Stream can only be iterated over"),
        (DataLoader(samples(8, 1), 4, sampler=SubsetRandomSampler([1, 2])), "draws by a SubsetRandomSampler"),
        (DataLoader(samples(8, 1), batch_size=None), "makes no batches"),
        ([(torch.ones(1, 6), torch.ones(1))], "a list is no DataLoader"),
    ],
    ids=["iterable", "sampler", "no batches", "list"],
)
def test_a_loader_that_cannot_be_drawn_from_is_refused(done: Any, loader: Any, reason: str) -> None:
    _, _, path = done
    with pytest.raises(UsageError, match=reason) as caught:
        geomprobe.replay(Training(loader), path, held_out_every=1, force=True)
    assert "probe.held_out(loss, loader)" in str(caught.value)


@pytest.mark.parametrize("option", ["held_out_every", "full_gradient_every"])
def test_a_script_that_names_no_loss_is_told_what_to_call(tmp_path: Path, option: str) -> None:
    def train() -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0).close()
    with pytest.raises(UsageError, match=rf"{option} needs a loss.*Call probe\.(held_out|full_gradient_of)"):
        geomprobe.replay(train, tmp_path / "run", **{option: 1})


def test_a_full_gradient_without_epochs_is_refused(tmp_path: Path) -> None:
    def train() -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = geomprobe.attach(model, optimizer)
        probe.full_gradient_of(lambda: model(torch.ones(1, 2)).sum())
        for _ in range(2):
            optimizer.zero_grad()
            probe.backward(model(torch.randn(4, 2)).square().mean())
            optimizer.step()

    geomprobe.record(train, tmp_path / "run", seed=0).close()
    with pytest.raises(UsageError, match="counts epochs, and the recording knows of none"):
        geomprobe.replay(train, tmp_path / "run", full_gradient_every=1)


def test_a_loss_without_a_graph_is_refused(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training, _, path = done
    monkeypatch.setattr(Training, "loss_of", lambda *_: lambda batch: 0.5)
    with pytest.raises(UsageError, match=r"probe\.held_out returned 0\.5: it must be one number, as a tensor"):
        geomprobe.replay(training, path, held_out_every=1, force=True)


def test_a_cadence_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="held_out_every=-1"):
        geomprobe.replay(print, tmp_path, held_out_every=-1)


def test_several_processes_are_refused_by_name() -> None:
    class Training:
        layout = Layout("DDP")
        options = MeasureOptions(held_out_every=2)

    with pytest.raises(UnsupportedTraining, match=r"held_out_every: .* one process only, and .* as DDP"):
        HeldOutGradient(Training())  # type: ignore[arg-type]


def test_an_inert_probe_does_nothing() -> None:
    model = nn.Linear(1, 1)
    probe = geomprobe.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    probe.held_out(print)
    probe.full_gradient_of(print)


# As commands


SCRIPT = """
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
import geomprobe

data = [TensorDataset(torch.randn(n, 3), torch.randn(n, 1)) for n in (12, 20)]
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
probe = geomprobe.attach(model, optimizer)
loss_of = lambda batch: functional.mse_loss(model(batch[0]), batch[1])
probe.held_out(loss_of, DataLoader(data[1], 6))
probe.full_gradient_of(loss_of, DataLoader(data[0], 6))
for epoch in probe.epochs(4):
    for batch in probe.batches(DataLoader(data[0], 4, shuffle=True)):
        optimizer.zero_grad()
        probe.backward(loss_of(batch))
        optimizer.step()
"""


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that commands recorded and replayed."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "train.py").write_text(SCRIPT)
    assert run("record", "--seed", 1, "-o", "run", "train.py", cwd=folder).code == 0
    assert run("replay", "run", *OPTIONS, cwd=folder).code == 0
    return folder


OPTIONS = ("--held-out-every", 2, "--full-gradient-every", 1, "--no-curvature")


def test_commands_inspect_verify_export_and_plot_them(commanded: Path) -> None:
    said = run("inspect", "run", cwd=commanded)
    assert "held_out/cosine" in said.out
    assert "full_gradient/lolr" in said.out
    assert "a held-out minibatch in 1 of 2 steps, the full gradient after 1 of 1 epochs" in said.out
    assert run("verify", "run", cwd=commanded).code == 0
    columns = "held_out/cosine,full_gradient/cosine"
    assert run("plot", "run", "-o", "figure.svg", "--columns", columns, cwd=commanded).code == 0
    assert run("export", "run", "--format", "csv", "-o", "trace.csv", cwd=commanded).code == 0
    header = (commanded / "trace.csv").read_text().splitlines()[0].split(",")
    assert {"held_out/cosine", "full_gradient/rsi"} <= set(header)


@pytest.mark.slow
def test_jobs_are_given_the_options(commanded: Path) -> None:
    names = ("held_out/rsi", "full_gradient/loss")
    serial = {name: geomprobe.open_trace(commanded / "run")[name] for name in names}
    done = run("replay", "run", "--force", "--jobs", 2, *OPTIONS, cwd=commanded)
    assert done.code == 0, done.err
    for name, values in serial.items():
        np.testing.assert_array_equal(geomprobe.open_trace(commanded / "run")[name], values)
