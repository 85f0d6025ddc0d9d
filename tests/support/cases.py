"""Shared trainings, one for each thing that a training loop may do; nothing in here knows geomprobe.

`train` runs a case under a watch. The watch decides what the loop is given for a probe: nothing at all, or
geomprobe's. The loop tells it of each step just before the optimizer takes it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

FEATURES, CLASSES, SAMPLES, BATCH = 6, 3, 24, 4


class PlainProbe:
    """What a loop is given where there is no geomprobe."""

    def epochs(self, count: int) -> Iterator[int]:
        yield from range(count)

    def batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        return loader

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reference(self, name: str) -> None:
        pass


class Watch:
    """Sees a training from outside; this one only keeps the bits that it ends with."""

    def __init__(self) -> None:
        self.final: dict[str, str] = {}

    def attach(self, model: nn.Module, optimizer: Optimizer, **stateful: Any) -> Any:
        return PlainProbe()

    def before_step(self, losses: list[Tensor], scale: float = 1.0) -> None:
        """An update is about to happen; ``scale`` is what the gradients still have on them."""

    def finished(self, **things: Any) -> None:
        self.final = bits(things)


@dataclass(frozen=True)
class Case:
    """A training: how its parts are made, and how it takes a step."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    data: Callable[[], Dataset[Any]] = field(default=lambda: classified())
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    scheduler: Callable[[Optimizer], Any] | None = None
    scaler: Callable[[], Any] | None = None
    autocast: torch.dtype | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    overflow_at: tuple[int, ...] = ()
    epochs: int = 2
    workers: int = 0
    clip: float | None = None
    accumulate: int = 1
    closure: bool = False
    set_to_none: bool = True
    freeze_at: int | None = None
    references_at: Mapping[int, str] = field(default_factory=dict)
    reference_steps: tuple[int, ...] = ()
    replay: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


class Loop:
    """One training of a case."""

    def __init__(self, case: Case, watch: Watch) -> None:
        self.case, self.watch = case, watch
        self.model = case.model()
        self.optimizer = case.optimizer(case.groups(self.model) if case.groups else self.model.parameters())
        self.scheduler = case.scheduler(self.optimizer) if case.scheduler else None
        self.scaler = case.scaler() if case.scaler else None
        self.loader = DataLoader(case.data(), BATCH, shuffle=True, num_workers=case.workers)
        self.tries = 0
        self.probe = watch.attach(self.model, self.optimizer, scheduler=self.scheduler, scaler=self.scaler, loop=self)

    def state_dict(self) -> dict[str, int]:
        return {"tries": self.tries}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tries = state["tries"]

    def run(self) -> None:
        for _ in self.probe.epochs(self.case.epochs):
            for inputs, labels in self.probe.batches(self.loader):
                self._before(self.tries)
                self._step(inputs, labels)
                self.tries += 1
            if self.scheduler is not None:
                self.scheduler.step()
        self.watch.finished(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler)

    def _before(self, step: int) -> None:
        if step == self.case.freeze_at:
            next(self.model.parameters()).requires_grad_(False)
        if step in self.case.references_at:
            self.probe.reference(self.case.references_at[step])

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        if self.case.closure:
            self.optimizer.step(lambda: self._gradients(inputs, labels))
            return
        self._gradients(inputs, labels)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _gradients(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=self.case.set_to_none)
        losses = []
        for part in zip(inputs.chunk(self.case.accumulate), labels.chunk(self.case.accumulate), strict=True):
            losses.append(self._loss(*part) / self.case.accumulate)
            self.probe.backward(self.scaler.scale(losses[-1]) if self.scaler else losses[-1])
        scale = self.scaler.get_scale() if self.scaler else 1.0
        if self.case.clip is not None:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
                scale = 1.0
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.watch.before_step(losses, scale)
        return losses[-1]

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", self.case.autocast, enabled=self.case.autocast is not None):
            loss = self.case.loss(self.model(inputs), labels)
        return loss * 1e38 if self.tries in self.case.overflow_at else loss


def train(case: Case, watch: Watch) -> None:
    """Train a case from its very start, with the seeds and flags that are set."""
    Loop(case, watch).run()


# Data


def classified(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Points of a few classes, labeled by a linear rule."""
    points = torch.randn(SAMPLES, FEATURES)
    return TensorDataset(points.to(dtype), (points @ torch.randn(FEATURES, CLASSES)).argmax(1))


def images() -> TensorDataset:
    return TensorDataset(torch.randn(SAMPLES, 2, 5, 5), torch.randint(0, CLASSES, (SAMPLES,)))


def tokens() -> TensorDataset:
    return TensorDataset(torch.randint(0, 20, (SAMPLES, 3)), torch.randint(0, CLASSES, (SAMPLES,)))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Points augmented with every generator that a loader's worker has."""

    def __init__(self) -> None:
        self.points, self.labels = classified().tensors

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(FEATURES) + float(np.random.normal()) + random.gauss(0, 1)
        return self.points[index] + 0.1 * noise, self.labels[index]


# Models


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))


def with_dropout() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, CLASSES))


def with_batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def channels_last() -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, CLASSES)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Tied(nn.Module):
    """One matrix, used twice and known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


class Alternating(nn.Module):
    """Two heads that take turns, so each goes without a gradient on every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 8)
        self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.heads[self.calls % 2](torch.tanh(self.body(x)))


class Tempered(nn.Module):
    """A linear model with a parameter of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.temperature


class Embedded(nn.Module):
    """A bag of sparsely differentiated embeddings, read out by a layer or by fixed weights."""

    def __init__(self, trained_head: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=True)
        self.head = nn.Linear(4, CLASSES) if trained_head else None
        self.register_buffer("fixed", torch.randn(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        bag = self.table(x).mean(1)
        return self.head(bag) if self.head is not None else bag @ self.fixed


def two_rates(model: nn.Module) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": rest}, {"params": [first], "lr": 0.02, "weight_decay": 0.1}]


# The trainings


def _sgd(**options: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def _adam(**options: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, **{"lr": 0.01, **options})


def _adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def _scaler(scale: float = 2.0**10) -> Callable[[], Any]:
    return lambda: torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)


PLAIN = Case("plain SGD", mlp, _sgd())

CASES = [
    Case("plain SGD, more steps than a block of rows", mlp, _sgd(), epochs=12),
    Case("momentum", mlp, _sgd(momentum=0.9)),
    Case("Nesterov", mlp, _sgd(momentum=0.9, nesterov=True)),
    Case("Adam", mlp, _adam()),
    Case("AdamW", mlp, _adamw),
    Case("Adam with a tensor learning rate", mlp, _adam(lr=torch.tensor(0.01), foreach=False)),
    Case("weight decay", mlp, _sgd(weight_decay=0.1)),
    Case("clipping", mlp, _sgd(), clip=0.3),
    Case("accumulation", mlp, _sgd(momentum=0.9), accumulate=2),
    Case("closure", mlp, _sgd(momentum=0.9), closure=True, clip=0.5),
    Case("scheduler", mlp, _sgd(), scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)),
    Case("two groups", mlp, _sgd(momentum=0.5), groups=two_rates),
    Case("dropout", with_dropout, _sgd()),
    Case("BatchNorm", with_batch_norm, _sgd(momentum=0.9)),
    Case("0 workers", mlp, _sgd(), Noisy),
    Case("1 worker", mlp, _sgd(), Noisy, workers=1),
    Case("2 workers", mlp, _sgd(), Noisy, workers=2),
    Case("autocast to bfloat16", mlp, _sgd(), autocast=torch.bfloat16),
    Case(
        "GradScaler, for-loop optimizer, overflows at the start and later",
        mlp,
        _sgd(momentum=0.9, foreach=False),
        scaler=_scaler(2.0**18),
        autocast=torch.float16,
        overflow_at=(6,),
        set_to_none=False,
    ),
    Case(
        "GradScaler, fused Adam, overflows at the start and later",
        mlp,
        _adam(fused=True),
        scaler=_scaler(2.0**18),
        autocast=torch.float16,
        overflow_at=(6,),
    ),
    Case(
        "GradScaler, fused SGD, unscaled and clipped",
        mlp,
        _sgd(fused=True),
        scaler=_scaler(),
        autocast=torch.bfloat16,
        clip=0.3,
        overflow_at=(4,),
    ),
    Case("GradScaler, accumulation", mlp, _adam(), scaler=_scaler(), autocast=torch.float16, accumulate=2),
    Case(
        "several references",
        mlp,
        _sgd(),
        references_at={2: "best", 5: "other", 7: "best"},
        reference_steps=(0, 9),
    ),
    Case("every third step", mlp, _sgd(), replay={"every": 3}),
    Case(
        "per parameter, two references",
        with_batch_norm,
        _sgd(momentum=0.9),
        references_at={2: "best"},
        replay={"per_parameter": True},
    ),
    Case("tied weights", Tied, _sgd(), replay={"per_parameter": True}),
    Case("bfloat16 parameters", lambda: mlp().bfloat16(), _adam(), lambda: classified(torch.bfloat16)),
    Case("float16 parameters", lambda: mlp().half(), _sgd(), lambda: classified(torch.float16)),
    Case("float64 parameters", lambda: mlp().double(), _adam(), lambda: classified(torch.float64)),
    Case("parameters without a gradient on some steps", Alternating, _sgd(momentum=0.9)),
    Case("frozen in mid-run", mlp, _sgd(momentum=0.9), freeze_at=4),
    Case("sparse gradients, SGD", Embedded, _sgd(), tokens, replay={"per_parameter": True}),
    Case(
        "sparse gradients, SparseAdam",
        lambda: Embedded(trained_head=False),
        lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.05),
        tokens,
    ),
    Case("channels_last", channels_last, _sgd(momentum=0.9), images),
    Case("a parameter without dimensions", Tempered, _sgd(), replay={"per_parameter": True}),
]

# Bits


def bits(things: Mapping[str, Any]) -> dict[str, str]:
    """Digests of every value in the things' state_dicts, and of the global random generators."""
    found: dict[str, str] = {}
    for name, thing in things.items():
        if thing is not None:
            _collect(name, thing.state_dict(), found)
    _collect("python", random.getstate(), found)
    _collect("numpy", np.random.get_state(), found)
    _collect("torch", torch.get_rng_state(), found)
    return found


def _collect(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _collect(f"{name}.{key}", item, found)
    elif isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    elif isinstance(value, np.ndarray):
        found[name] = hashlib.sha256(value.tobytes()).hexdigest()
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for index, item in enumerate(value):
            _collect(f"{name}.{index}", item, found)
    else:
        found[name] = repr(value)
