"""Small trainings over several processes, measured and not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from geomprobe.measure.measurement import Measurement
from geomprobe.measure.options import MeasureOptions
from geomprobe.probe.hooks.global_hooks import tag_scaled
from geomprobe.probe.parameters import measured_parameters

STEPS, SAMPLES = 5, 24


class Net(nn.Module):
    """Its tensors have 4 x 5, 4, 3 x 4, 3 and 1 values: over 2 to 4 ranks that makes uneven and empty shards."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Tanh())
        self.outer = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)) * self.gain


class Sometimes(nn.Module):
    """Two heads: which ones a rank uses depends on its samples. A third is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x[0, 0] > 0)](x)


def model(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return {"net": Net, "norm": lambda: Net(norm=True), "sometimes": Sometimes}[name]().to(dtype)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (SAMPLES,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


# What makes a model one of many


def ddp(module: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(module, bucket_cap_mb=1e-4, **options)  # several buckets


def summing_ddp(module: nn.Module) -> nn.Module:
    wrapped = ddp(module)

    def hook(state, bucket):  # DDP checks its annotations, and does not read them as strings
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, hook)
    return wrapped


def fsdp(module: nn.Module, **options: Any) -> nn.Module:
    fully_shard(module.inner, **options)
    return fully_shard(module, **options)


def unused_fsdp(module: nn.Module) -> nn.Module:
    fully_shard(module).set_reduce_scatter_unused_params(True)
    return module


def summing_fsdp(module: nn.Module) -> nn.Module:
    fsdp(module)
    for part in (module, module.inner):
        part.set_gradient_divide_factor(1.0)
    return module


def hsdp(module: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fsdp(module, mesh=mesh)


WRAPPERS: dict[str, Callable[..., nn.Module]] = {
    "ddp": ddp,
    "ddp static": lambda module: ddp(module, static_graph=True),
    "ddp views": lambda module: ddp(module, gradient_as_bucket_view=True),
    "ddp unused": lambda module: ddp(module, find_unused_parameters=True),
    "ddp sum": summing_ddp,
    "fsdp": fsdp,
    "fsdp kept": lambda module: fsdp(module, reshard_after_forward=False),
    "fsdp sum": summing_fsdp,
    "fsdp unused": unused_fsdp,
    "hsdp": hsdp,
}


@dataclass(frozen=True)
class Case:
    """One training: how it is spread, and what is particular about it."""

    wrapper: str
    model: str = "net"
    optimizer: str = "momentum"
    parts: int = 1
    sync_each: bool = True
    closure: bool = False
    clip: bool = False
    per_parameter: bool = False
    every: int = 1
    curvature: bool = True
    per_rank: bool = False
    scale: float = 1.0
    dtype: torch.dtype = torch.float64

    @property
    def measure(self) -> MeasureOptions:
        return MeasureOptions(
            every=self.every,
            curvature_every=int(self.curvature),
            per_parameter=self.per_parameter,
            per_rank=self.per_rank,
            finite_step=self.closure,
            sharpness_every=STEPS if self.closure else 0,
        )


@dataclass
class Path:
    """What one rank saw of a training.

    ``sent`` holds the exchanges made for each row, by name and bytes, and ``beside`` those of the rest.
    """

    final: Tensor
    columns: list[str]
    rows: list[list[float]]
    losses: list[float]
    route: str | None
    sent: list[list[tuple[str, int]]]
    beside: list[tuple[str, int]]
    missing: str | None = None


def train(case: Case, references: dict[str, Any] | None = None) -> tuple[Path, dict[str, Tensor]]:
    """Train on this rank's share of each batch, measuring against ``references`` if there are any."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wrapped = WRAPPERS[case.wrapper](model(case.model, case.dtype))
    optimizer = optimizer_of(case.optimizer, wrapped.parameters())
    parameters = measured_parameters(wrapped, optimizer)
    probe: Any = SimpleNamespace(model=wrapped, optimizer=optimizer, parameters=parameters, step=0)
    measurement = None
    if references is not None:
        measurement = Measurement(probe, case.measure)
        measurement.open(references)
    columns = [path for paths in measurement.columns.values() for path in paths] if measurement else []
    path = Path(torch.empty(0), columns, [], [], None, [], [])
    for x, y in batches(case.dtype):
        optimizer.zero_grad()
        xs, ys = (t.chunk(world)[rank] for t in (x, y))
        total = torch.zeros((), dtype=torch.float64)
        with listening() as sent:
            for index, part in enumerate(zip(xs.chunk(case.parts), ys.chunk(case.parts), strict=True)):
                with syncing(wrapped, case.sync_each or index == case.parts - 1):
                    total += backward(case, wrapped, part, measurement)
        path.beside.extend(sent)
        if case.clip:
            nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
        if measurement is not None:
            with torch.no_grad(), listening() as sent:
                gradients = [p.grad for p in parameters.values()]
                scale = torch.tensor(case.scale, dtype=case.dtype) if case.scale != 1 else None
                row = measurement.row(gradients, scale, {"loss": total.reshape(1)})
            path.rows.append(torch.cat([row[name] for name in measurement.columns]).tolist())
            path.losses.append(float(row["loss"]))
            path.sent.append(sent)
        for parameter in parameters.values():
            if parameter.grad is not None and case.scale != 1:
                parameter.grad.div_(case.scale)  # as a fused optimizer does it, after the row
        optimizer.step()
        probe.step += 1
    if measurement is not None:
        found = measurement.curvature_found()
        path.route, path.missing = found.get("route"), found.get("missing")
    path.final = flat(map(full, parameters.values()))
    return path, {name: p.detach().clone() for name, p in parameters.items()}


def backward(case: Case, wrapped: nn.Module, part: Any, measurement: Measurement | None) -> Tensor:
    x, y = part

    def closure() -> Tensor:
        return functional.cross_entropy(wrapped(x), y) / case.parts

    loss = closure()
    value = loss.detach().double()
    if case.scale != 1:
        loss = loss * case.scale
        tag_scaled(loss, torch.tensor(case.scale, dtype=case.dtype))
    if measurement is None:
        loss.backward()
    else:
        measurement.differentiate(loss, closure if case.closure else None, loss.backward, True)
    return value


@contextlib.contextmanager
def syncing(wrapped: Any, sync: bool) -> Iterator[None]:
    if isinstance(wrapped, DistributedDataParallel):
        with contextlib.nullcontext() if sync else wrapped.no_sync():
            yield
    else:
        wrapped.set_requires_gradient_sync(sync)
        yield


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[str, int]]]:
    """The collective calls inside, by name and bytes; those of DTensors and FSDP2 go by other ways."""
    sent: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_object", "broadcast")}

    def heard(name: str) -> Callable[..., Any]:
        def call(tensor: Any, *rest: Any, **options: Any) -> Any:
            sent.append((name, tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0))
            return originals[name](tensor, *rest, **options)

        return call

    for name in originals:
        setattr(dist, name, heard(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def full(tensor: Any) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten().clone() for t in tensors])


def both_passes(cases: list[Case]) -> list[tuple[Path, Path]]:
    """Each case trained plainly, then measured against its own final and initial weights."""
    warnings.simplefilter("error")
    found = []
    for case in cases:
        wrapped = WRAPPERS[case.wrapper](model(case.model, case.dtype))
        first = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
        plain, final = train(case)
        found.append((plain, train(case, {"final": final, "first": first})[0]))
    return found
