"""What ranks do in the tests of layouts and failures: each function runs on all of them and says what it found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from geomprobe.distributed.dtensor import is_dtensor, local
from geomprobe.distributed.layout import Layout
from geomprobe.errors import GeomprobeError
from geomprobe.measure.curvature.double_backward import graph_of, hessian_vector_product
from geomprobe.measure.curvature.hessian_gradient import Curvature
from geomprobe.measure.measurement import Measurement
from geomprobe.measure.options import MeasureOptions
from geomprobe.probe.parameters import measured_parameters
from geomprobe.reproducibility.step_reader import StepReader
from support.refused_layouts import WORLD, named, refusals
from support.sharded_variants import fsdp_variants
from support.shared_training import WRAPPERS, Net, Sometimes, ddp, flat, fsdp, full, optimizer_of


def every_job() -> dict[str, Any]:
    """Run all that a test asks about, by name."""
    warnings.filterwarnings("ignore", message=".*torch.jit.*")
    return {name: job() for name, job in JOBS.items()}


def layouts() -> dict[str, Any]:
    """The layouts that are found."""
    inner = nn.Linear(2, 2)
    wrapper = DistributedDataParallel(inner)
    found = {"inner": Layout.of(inner, dict(inner.named_parameters())).kind, "ddp": _layout(wrapper)}
    found["fsdp"] = _layout(fsdp(Net()))
    evaluated = fsdp(Net())
    optimizer = optimizer_of("momentum", evaluated.parameters())
    with torch.no_grad():
        evaluated(torch.ones(2, 5))  # leaves the root's weights gathered
    parameters = measured_parameters(evaluated, optimizer)
    found["evaluated"] = Layout.of(evaluated, parameters).kind, list(parameters)
    found["replicated"] = _layout(distribute_module(nn.Linear(2, 2), init_device_mesh("cpu", (WORLD,))))
    return found


def _layout(module: nn.Module) -> tuple[str, bool, tuple[bool, ...]]:
    layout = Layout.of(*named(module))
    return layout.kind, layout.sharded, layout.owned


def sums_of(parameters: Any, references: Any, gradients: Any, owned: Any = None) -> Tensor:
    """This process's part of all inner products."""
    reader = StepReader(parameters)
    reader.refer_to(references, owned=owned)
    sums = reader.read(gradients).sums
    assert sums is not None
    return sums


def replicated_dtensors() -> dict[str, Any]:
    """Parameters that are replicated DTensors, whose gradients come as summands: numbers and Hg."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    torch.manual_seed(2)
    spread = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    distribute_module(spread, mesh)
    x = torch.randn(2 * WORLD, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(spread.parameters())
    layout = Layout.of(*named(spread))
    curvature = Curvature(parameters, spread, layout)
    loss = spread(distribute_tensor(x, mesh, [Shard(0)])).square().mean()
    curvature.backward(loss, closure=lambda: spread(distribute_tensor(x, mesh, [Shard(0)])).square().mean())
    came = {type(placement).__name__ for p in parameters for placement in p.grad.placements}
    stars = [torch.ones_like(p) for p in plain.parameters()]
    measured = layout.sum(sums_of(parameters, {"final": stars}, [p.grad for p in parameters], layout.owned))
    gradients = [p.grad.full_tensor() for p in parameters]
    step = curvature.over_step(gradients, 0.1)
    hg = curvature.product(gradients)
    expected = plain(x).square().mean()
    graph = graph_of(expected, list(plain.parameters()))
    g = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
    return {
        "came": came,
        "loss": (float(loss.full_tensor() if is_dtensor(loss) else loss), float(expected)),
        "products": (measured, sums_of(list(plain.parameters()), {"final": stars}, g)),
        "hg": (flat(hg), flat(hessian_vector_product([graph], list(plain.parameters()), g))),
        "step": step,
        "plain": all(type(h) is Tensor for h in hg),
    }


class Opaque(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Halting(nn.Module):
    """From a step on, it has an operation without a second derivative, on the given ranks."""

    def __init__(self, operation: str, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.inner = Net()
        self.operation, self.ranks, self.calls = operation, ranks, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.inner(x)
        if dist.get_rank() not in self.ranks or self.calls <= 2:
            return out
        return Opaque.apply(out) if self.operation == "marked" else self.ctc(out)

    def ctc(self, out: Tensor) -> Tensor:
        """Nothing in its graph says that it cannot be differentiated again: that comes out on the way."""
        paths = functional.log_softmax(out, 1).unsqueeze(1).expand(-1, 2, -1)
        lengths = torch.tensor([len(out)] * 2)
        lost = functional.ctc_loss(paths, torch.ones(2, 1, dtype=torch.long), lengths, torch.tensor([1, 1]))
        return out + lost


def blocked() -> dict[str, Any]:
    """Hg that becomes impossible on one rank: what each then has, and whether the run goes on as it does alone."""
    found = {}
    for name, wrap in (("ddp", ddp), ("fsdp", lambda module: fully_shard(_inner_sharded(module)))):
        for operation in ("marked", "ctc"):
            runs = [_run_halting(wrap, operation, measured) for measured in (False, True)]
            (plain, _, _), (measured, rows, missing) = runs
            found[f"{name} {operation}"] = torch.equal(plain, measured), rows, missing
    return found


def _inner_sharded(module: Any) -> nn.Module:
    fsdp(module.inner)
    return module


def _run_halting(wrap: Any, operation: str, measured: bool) -> tuple[Tensor, list[bool], str | None]:
    torch.manual_seed(3)
    wrapped = wrap(Halting(operation, (1,)))
    optimizer = optimizer_of("momentum", wrapped.parameters())
    parameters = measured_parameters(wrapped, optimizer)
    probe: Any = SimpleNamespace(model=wrapped, optimizer=optimizer, parameters=parameters, step=0)
    measurement = Measurement(probe, MeasureOptions()) if measured else None
    if measurement is not None:
        measurement.open({})
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = []
    for _ in range(4):
        x, y = torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(wrapped(x), y)
        if measurement is None:
            loss.backward()
        else:
            measurement.differentiate(loss, None, loss.backward, True)
            with torch.no_grad():
                row = measurement.row([p.grad for p in parameters.values()], None)
            rows.append(all(bool(values.isfinite().all()) for values in row.values()))
        optimizer.step()
        probe.step += 1
    missing = measurement.curvature_found().get("missing") if measurement is not None else None
    return flat(map(full, parameters.values())), rows, missing


def wrong_closure() -> tuple[str, str]:
    """A closure that evaluates another loss, on rank 1 only."""
    torch.manual_seed(3)
    wrapped = ddp(Net())
    parameters = list(wrapped.parameters())
    curvature = Curvature(parameters, wrapped, Layout.of(*named(wrapped)))
    curvature.route = "closure"
    x = torch.randn(6, 5)
    curvature.backward(wrapped(x).square().mean(), closure=lambda: wrapped(x + (dist.get_rank() == 1)).square().mean())
    try:
        curvature.product([p.grad for p in parameters])
    except GeomprobeError as error:
        return type(error).__name__, str(error)
    return "none", ""


def unaveraged() -> str | None:
    """Gradients that were never averaged, all through `no_sync`."""
    wrapped = ddp(Net())
    parameters = list(wrapped.parameters())
    curvature = Curvature(parameters, wrapped, Layout.of(*named(wrapped)))
    with wrapped.no_sync():
        curvature.backward(wrapped(torch.randn(6, 5) * (1 + dist.get_rank())).square().mean())
    try:
        curvature.product([p.grad for p in parameters])
    except GeomprobeError as error:
        return str(error)
    return None


def partly_used() -> dict[str, str]:
    """What is said where ranks use different parameters, and nothing has been told to expect it."""
    found = {}
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp", fully_shard)):
        wrapped = wrap(Sometimes())
        x = (1 if dist.get_rank() == 0 else -1) * torch.ones(4, 5)
        parameters = list(wrapped.parameters())
        curvature = Curvature(parameters, wrapped, Layout.of(*named(wrapped)))
        curvature.backward(wrapped(x).square().mean())
        found[f"{name}, Hg"] = _said(
            lambda c=curvature, p=parameters: c.product([torch.ones_like(local(t)) for t in p])
        )
        probe: Any = SimpleNamespace(model=wrapped, parameters=named(wrapped)[1], step=0)
        measurement = Measurement(probe, MeasureOptions(curvature_every=0))
        measurement.open({})
        found[name] = _said(lambda m=measurement, p=parameters: m.row([t.grad for t in p], None))
    return found


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except GeomprobeError as error:
        return str(error)
    return "nothing"


def half_seen() -> list[bool]:
    """A step whose loss one rank hides from the probe has no Hg on any; the next one has."""
    torch.manual_seed(3)
    wrapped = ddp(Net())
    probe: Any = SimpleNamespace(model=wrapped, parameters=named(wrapped)[1], step=0)
    probe.optimizer = optimizer_of("momentum", wrapped.parameters())
    measurement = Measurement(probe, MeasureOptions())
    measurement.open({})
    found = []
    for hidden in (True, False):
        probe.optimizer.zero_grad()
        loss = wrapped(torch.randn(6, 5)).square().mean()
        plain = not (hidden and dist.get_rank() == 2)
        measurement.differentiate(loss, None, loss.backward, plain)
        with torch.no_grad():
            row = measurement.row([p.grad for p in wrapped.parameters()], None)
        found.append(all(bool(values.isfinite().all()) for values in row.values()))
    return found


def fixed_loss() -> dict[str, tuple[float, float]]:
    """The sharpness of a loss that the script names: found, and the dense oracle's."""
    found = {}
    for name in ("ddp", "fsdp"):
        torch.manual_seed(3)
        twin = Net().double()
        torch.manual_seed(3)
        wrapped = WRAPPERS[name](Net().double())
        generator = torch.Generator().manual_seed(1)
        batch = torch.randn(WORLD * 4, 5, generator=generator, dtype=torch.float64)
        mine = batch.chunk(WORLD)[dist.get_rank()]
        probe: Any = SimpleNamespace(model=wrapped, parameters=named(wrapped)[1], step=0)
        probe.optimizer = optimizer_of("momentum", wrapped.parameters())
        measurement = Measurement(probe, MeasureOptions(curvature_every=0, sharpness_every=1))
        measurement.open({})
        for listener in measurement.listeners:
            listener.sharpness_of(lambda w=wrapped, x=mine: w(x).square().mean())
        with torch.no_grad():
            row = measurement.row([None] * len(probe.parameters), None)
        found[name] = float(row["sharpness"]), _top(twin, batch)
    return found


def _top(twin: nn.Module, batch: Tensor) -> float:
    weights = list(twin.parameters())
    gradient = _graph_flat(torch.autograd.grad(twin(batch).square().mean(), weights, create_graph=True))
    rows = [torch.autograd.grad(g, weights, retain_graph=True, materialize_grads=True) for g in gradient]
    return float(torch.linalg.eigvalsh(torch.stack([flat(row) for row in rows]))[-1])


def _graph_flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def joined() -> str:
    """What is said of uneven inputs under DDP's join."""
    wrapped = ddp(Net())
    layout = Layout.of(*named(wrapped))
    try:
        with wrapped.join():
            layout.exchange(torch.zeros(1), torch.zeros(1))
    except GeomprobeError as error:
        return str(error)
    return "accepted"


def replicas_apart() -> bool:
    """Whether `Replicate` placements beside a shard count once: HSDP's weights summed over all ranks."""
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    wrapped = fully_shard(Net(), mesh=mesh)
    parameters = list(wrapped.parameters())
    layout = Layout.of(*named(wrapped))
    sums = layout.sum(sums_of(parameters, {}, [None] * len(parameters), layout.owned))
    expected = sum(float(full(p).double().square().sum()) for p in parameters)
    return abs(float(sums[2]) - expected) < 1e-12 * expected


JOBS: dict[str, Callable[[], Any]] = {
    job.__name__: job
    for job in (
        refusals, layouts, replicated_dtensors, blocked, wrong_closure, unaveraged, half_seen, partly_used,
        fsdp_variants, fixed_loss, replicas_apart, joined,
    )
}  # fmt: skip
