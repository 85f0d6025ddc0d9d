"""Small trainings over several processes, measured and not, and the same in one process as their oracle."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jacrev
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from geomprobe.measuring import Measure, Measurement
from geomprobe.parameters import measured_parameters

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
    dtype: torch.dtype = torch.float64

    @property
    def measure(self) -> Measure:
        return Measure(
            every=self.every,
            curvature_every=int(self.curvature),
            per_parameter=self.per_parameter,
            per_rank=self.per_rank,
            finite_step=self.closure,
            sharpness_every=2 if self.closure else 0,
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
    path = Path(torch.empty(0), measurement.columns if measurement else [], [], [], None, [], [])
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
                row = measurement.row([p.grad for p in parameters.values()], None, total.reshape(1))
            path.rows.append(row[1:].tolist())
            path.losses.append(float(row[0]))
            path.sent.append(sent)
        optimizer.step()
        probe.step += 1
    if measurement is not None:
        path.route = measurement.curvature_found()["route"] if measurement._curvature else None
        path.missing = measurement.curvature_missing
    path.final = torch.cat([full(p).flatten() for p in parameters.values()])
    return path, {name: p.detach().clone() for name, p in parameters.items()}


def backward(case: Case, wrapped: nn.Module, part: Any, measurement: Measurement | None) -> Tensor:
    x, y = part

    def closure() -> Tensor:
        return functional.cross_entropy(wrapped(x), y) / case.parts

    loss = closure()
    if measurement is None:
        loss.backward()
    else:
        measurement.backward(loss, closure if case.closure else None, loss.backward, True)
    return loss.detach().double()


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


# The oracle


def global_loss(case: Case, module: nn.Module, world: int, x: Tensor, y: Tensor) -> Callable[..., Tensor]:
    """The mean over ranks and micro-batches of the losses, as a function of the weights."""
    names = [name for name, _ in module.named_parameters()]

    def loss(*weights: Tensor) -> Tensor:
        losses = []
        for xs, ys in zip(x.chunk(world), y.chunk(world), strict=True):
            for xp, yp in zip(xs.chunk(case.parts), ys.chunk(case.parts), strict=True):
                buffers = {name: b.clone() for name, b in module.named_buffers()}
                out = functional_call(module, {**dict(zip(names, weights, strict=True)), **buffers}, (xp,))
                losses.append(functional.cross_entropy(out, yp))
        return torch.stack(losses).mean() * (world if case.wrapper.endswith("sum") else 1)

    return loss


def brute_force(case: Case, world: int) -> dict[str, np.ndarray]:
    """Every column, from a training in one process and in float64, with dense Hessians."""
    module = model(case.model, torch.float64)
    parameters = list(module.parameters())
    optimizer = optimizer_of(case.optimizer, parameters)
    first = flat(parameters)
    history: list[dict[str, Any]] = []
    for x, y in batches(torch.float64):
        loss = global_loss(case, module, world, x, y)
        optimizer.zero_grad()
        loss(*parameters).backward()
        if case.clip:
            nn.utils.clip_grad_norm_(parameters, 0.1)
        g = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        found = {"w": flat(parameters), "g": g, **second_order(loss, parameters, g)}
        for rank, share in enumerate(zip(x.chunk(world), y.chunk(world), strict=True)):
            own = torch.autograd.grad(
                global_loss(case, module, 1, *share)(*parameters), parameters, materialize_grads=True
            )
            found[f"g of {rank}"] = flat(own)
        history.append(found)
        optimizer.step()
    return columns(case, history, {"final": flat(parameters), "first": first}, module)


def second_order(loss: Callable[..., Tensor], parameters: list[Tensor], g: Tensor) -> dict[str, Any]:
    sizes = [p.numel() for p in parameters]

    def of(vector: Tensor) -> Tensor:
        pieces = zip(vector.split(sizes), parameters, strict=True)
        return loss(*(piece.view(p.shape) for piece, p in pieces))

    w = flat(parameters)
    matrix = jacrev(grad(of))(w).detach()
    there = w - 0.1 * g  # optimizer_of's rate
    return {
        "Hg": matrix @ g,
        "sharpness": float(torch.linalg.eigvalsh(matrix)[-1]),
        "turned": (grad(of)(w) - grad(of)(there)) / 0.1,
        "gap": float(of(there) - of(w) + 0.1 * grad(of)(w) @ g),
        "loss": float(of(w)),
    }


def columns(
    case: Case, history: list[dict[str, Any]], references: dict[str, Tensor], module: nn.Module
) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {}

    def add(name: str, value: Any) -> None:
        found.setdefault(name, []).append(float(value))

    slices, start = {}, 0
    for name, p in module.named_parameters():
        slices[name], start = slice(start, start + p.numel()), start + p.numel()
    for point in history:
        vectors = {"w": point["w"], "g": point["g"], "Hg": point["Hg"]}
        shared = ("g.g", "w.g", "w.w", "g.Hg", "Hg.Hg")
        for reference, star in references.items():
            vectors["d"] = point["w"] - star
            path = "" if reference == "final" else f"references/{reference}/"
            for product in (*(shared if not path else ()), "g.d", "w.d", "d.d"):
                a, b = (vectors[v] for v in product.split("."))
                add(f"{path}inner_products/{product}", a @ b)
                for name in slices if not path and case.per_parameter else ():
                    add(f"parameters/{name}/{product}", a[slices[name]] @ b[slices[name]])
        d = point["w"] - references["final"]
        for rank, g in enumerate(point[key] for key in point if key.startswith("g of")):
            for product, value in (("g.g", g @ g), ("w.g", point["w"] @ g), ("g.d", g @ d)):
                add(f"ranks/{rank}/{product}", value)
        add("steps/sharpness", point["sharpness"])
        add("steps/secant_residual", point["turned"].norm() / point["g"].norm())
        add("steps/linear_decrease_gap", point["gap"])
        add("loss", point["loss"])
    return {name: np.array(values) for name, values in found.items()}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten().clone() for t in tensors])
