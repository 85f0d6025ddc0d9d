"""Trainings in every precision, over several processes and, as an oracle, in one without geomprobe."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import geomprobe

EPOCHS, TRIES, SAMPLES, SEED = 2, 8, 16, 5


class Net(nn.Module):
    """Its ``gain`` has one value: sharded, all of it is one process's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.outer = nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, boost: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.outer(self.inner(x)) * self.gain, self.gain.sum() * boost


class Float32Momentum(torch.optim.Optimizer):
    """SGD with momentum whose state is float32, whatever the parameters are."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "moment" not in self.state[p]:
                    self.state[p]["moment"] = torch.zeros_like(p, dtype=torch.float32)
                moment = self.state[p]["moment"].mul_(0.9).add_(p.grad.float())
                p.copy_(p.float() - group["lr"] * moment)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam, for-loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "SGD, for-loop": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "float32 state": lambda p: Float32Momentum(p, lr=0.05),
}


@dataclass(frozen=True)
class Case:
    """One training: how it is spread and what is particular about its arithmetic."""

    kind: str
    optimizer: str = "Adam, fused"
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    policy: bool = False
    scaled: bool = False
    overflow_at: tuple[int, ...] = ()
    clip: str = ""
    parts: int = 1
    sync_each: bool = False
    compiled: str = ""
    backend: str = "aot_eager"
    closure: bool = False
    segmented: bool = False
    measured: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def has_hg(self) -> bool:
        return self.closure or not self.compiled

    def __str__(self) -> str:
        said = [self.kind, self.optimizer, str(self.dtype).removeprefix("torch.")]
        said += [name for name in ("autocast", "policy", "scaled", "sync_each", "closure") if getattr(self, name)]
        said += [
            self.clip and f"clip by {self.clip}",
            self.compiled and f"compiled {self.compiled} by {self.backend}",
        ]
        return ", ".join(filter(None, [*said, f"{self.parts} parts" if self.parts > 1 else ""]))


@dataclass
class Found:
    """What one process saw of a case: the weights' digest without geomprobe and in each pass; attempts by hand."""

    finals: list[str]
    skipped: list[int]
    manifest: dict[str, Any]


class Training:
    """Trains a case on this process's share of each batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.final, self.skipped = "", 0

    def __call__(self) -> None:
        case = self.case
        model, called = spread(case)
        optimizer = OPTIMIZERS[case.optimizer](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=case.scaled)
        probe = geomprobe.attach(model, optimizer, scaler=scaler)
        step = optimizer.step
        if "step" in case.compiled:
            step = torch.compile(optimizer.step, backend=case.backend)
        for attempt in (epoch * TRIES // EPOCHS + i for epoch in probe.epochs(EPOCHS) for i in range(TRIES // EPOCHS)):
            optimizer.zero_grad()
            for part, (x, y) in enumerate(shares(case, attempt)[dist.get_rank()]):
                with syncing(model, case.sync_each or part == case.parts - 1):
                    again = functools.partial(loss_of, case, called, x, y, attempt, dist.get_rank())
                    probe.backward(scaler.scale(again()), closure=again if case.closure else None)
            if case.clip:
                scaler.unscale_(optimizer)
                clip(case, model.parameters())
            before = scaler.get_scale()
            if case.scaled:
                scaler.step(optimizer)
                scaler.update()
                self.skipped += scaler.get_scale() < before
            else:
                step()
        weights = [whole(p).detach().reshape(-1).view(torch.uint8) for p in model.parameters()]
        self.final = hashlib.sha256(torch.cat(weights).numpy().tobytes()).hexdigest()


def spread(case: Case) -> tuple[Any, Any]:
    """The model that is attached, and what is called."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model: Any = Net().to(case.dtype)
    if case.kind == "DDP":
        model = DistributedDataParallel(model)
        return model, torch.compile(model, backend=case.backend) if "model" in case.compiled else model
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": policy} if case.policy else {}
    if "model" in case.compiled:
        model.inner = torch.compile(model.inner, backend=case.backend)
    fully_shard(model.inner, **options)
    fully_shard(model, **options)
    return model, model


@contextlib.contextmanager
def syncing(model: Any, sync: bool) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if sync else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(sync)
        yield


def shares(case: Case, attempt: int, world: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    """The batch of an attempt, by process and micro-batch."""
    generator = torch.Generator().manual_seed(100 + attempt)
    x = torch.randn(SAMPLES, 5, generator=generator).to(case.dtype)
    y = torch.randint(3, (SAMPLES,), generator=generator)
    of_ranks = zip(x.chunk(world), y.chunk(world), strict=True)
    return [list(zip(a.chunk(case.parts), b.chunk(case.parts), strict=True)) for a, b in of_ranks]


def loss_of(case: Case, model: Any, x: Tensor, y: Tensor, attempt: int, rank: int) -> Tensor:
    """One micro-batch's share of the loss. Where it is to overflow, one parameter's gradient does, on one process."""
    wide = torch.promote_types(case.dtype, torch.float32)
    boost = float("inf") if attempt in case.overflow_at and rank == 1 else 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        out, added = model(x, boost) if boost else model(x)
        loss = functional.cross_entropy(out.to(wide), y)
    return (loss + added.to(wide)) / case.parts


def clip(case: Case, parameters: Any) -> None:
    if "norm" in case.clip:
        nn.utils.clip_grad_norm_(parameters, 0.2)
    else:
        nn.utils.clip_grad_value_(parameters, 0.02)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def every_case(cases: list[Case], folder: Path) -> list[Found]:
    """Train each case without geomprobe, record it, and replay it, all in one process of several."""
    dist.init_process_group("gloo")
    found = []
    for index, case in enumerate(cases):
        run = folder / str(index)
        plain, recorded, replayed = (Training(case) for _ in range(3))
        torch.manual_seed(SEED)
        with _strictly():
            plain()
        geomprobe.record(recorded, run, seed=SEED).close()
        trace = geomprobe.replay(replayed, run, **case.measured)
        if case.segmented:
            in_segments(case, run)
        runs = (plain, recorded, replayed)
        found.append(Found([each.final for each in runs], [each.skipped for each in runs], trace.manifest))
    dist.destroy_process_group()
    return found


def in_segments(case: Case, run: Path) -> None:
    """Replay a run in two pieces too, the second one first; the trace of the whole stays beside theirs."""
    dist.barrier()  # each process has opened the trace
    if dist.get_rank() == 0:
        (run / "trace.h5").rename(run.with_suffix(".h5"))
    dist.barrier()
    for number in (2, 1):
        geomprobe.replay(Training(case), run, segment=(number, 2), **case.measured)


@contextlib.contextmanager
def _strictly() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# The oracle


def brute_force(case: Case, world: int = 2) -> dict[str, Any]:
    """Inner products of every applied step, from a training in one process on all the shares of each batch."""
    torch.manual_seed(1)
    model = Net().to(case.dtype)
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[case.optimizer](parameters)
    points: list[dict[str, Any]] = []
    for attempt in range(TRIES):
        if attempt in case.overflow_at:
            continue
        losses = [
            loss_of(case, _computed(case, model), x, y, attempt, 0)
            for share in shares(case, attempt, world)
            for x, y in share
        ]
        mean = torch.stack(losses).sum() / world
        gradients = torch.autograd.grad(mean, parameters, create_graph=case.has_hg)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.detach().clone()
        point = {
            "attempt": attempt,
            "loss": float(mean.detach()),
            "w": _flat(parameters),
            "unclipped": _grad(parameters),
        }
        if case.clip:
            clip(case, parameters)
        point["g"] = _grad(parameters)
        if case.has_hg:
            along = [p.grad.clone() for p in parameters]
            point["Hg"] = _flat(torch.autograd.grad(gradients, parameters, along))
        points.append(point)
        optimizer.step()
    final = _flat(parameters)
    columns: dict[str, Any] = {
        "steps/attempt": [p["attempt"] for p in points],
        "steps/loss": [p["loss"] for p in points],
    }
    for point in points:
        vectors = {**point, "d": point["w"] - final}
        for product in ("g.g", "w.g", "w.w", "g.d", "d.d", *(("g.Hg", "Hg.Hg") if "Hg" in point else ())):
            a, b = (vectors[name] for name in product.split("."))
            columns.setdefault(f"inner_products/{product}", []).append(float(a @ b))
        for product in ("g.g", "w.g", "g.d"):
            a, b = ({**vectors, "g": point["unclipped"]}[name] for name in product.split("."))
            columns.setdefault(f"unclipped/inner_products/{product}", []).append(float(a @ b))
    return columns


def _computed(case: Case, model: nn.Module) -> Callable[..., Any]:
    """The model as FSDP2's policy computes it: parameters and inputs in bfloat16."""
    if not case.policy:
        return model

    def call(x: Tensor) -> Any:
        low = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        return torch.func.functional_call(model, low, (x.to(torch.bfloat16),))

    return call


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def _grad(parameters: list[nn.Parameter]) -> Tensor:
    return _flat([p.grad for p in parameters])
