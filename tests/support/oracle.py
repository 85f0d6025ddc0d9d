"""Independent brute force: train without geomprobe, store every w_t and G_t, compute each column in float64."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from support.cases import Case, PlainProbe, Watch, train

Vectors = list[np.ndarray]  # one flat float64 array a parameter


@dataclass
class History:
    """Weights, gradients, losses and hyperparameters at each step that the optimizer took."""

    parameters: list[str] = field(default_factory=list)
    weights: list[Vectors] = field(default_factory=list)
    gradients: list[Vectors] = field(default_factory=list)
    epoch: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    attempt: list[float] = field(default_factory=list)
    groups: list[list[dict[str, float]]] = field(default_factory=list)
    references: dict[str, Vectors] = field(default_factory=dict)

    @property
    def final(self) -> Vectors:
        return self.references["final"]

    def add(self, optimizer: Optimizer, scale: float = 1.0) -> bool:
        """Store a step that is about to be taken; an overflow, which will not be taken, is left out."""
        tensors = held(optimizer)
        gradients = [gradient(p) for p in tensors]
        if not all(np.isfinite(g).all() for g in gradients):
            return False
        self.weights.append([float64(p) for p in tensors])
        self.gradients.append([g / scale for g in gradients])
        names = ("lr", "weight_decay", "momentum")
        self.groups.append([{n: float(g[n]) for n in names if n in g} for g in optimizer.param_groups])
        return True

    def columns(
        self, every: int = 1, per_parameter: bool = False, reference_steps: Collection[int] = ()
    ) -> dict[str, np.ndarray]:
        """Every column of the trace but those of the Hessian, by path in the file."""
        steps = len(self.weights)
        found = {"steps/step": range(steps), "steps/epoch": self.epoch, "steps/loss": self.loss}
        found["steps/lr"] = [groups[0]["lr"] for groups in self.groups]
        for i, group in enumerate(self.groups[0]):
            found |= {f"groups/{i}/{name}": [groups[i][name] for groups in self.groups] for name in group}
        references = {**self.references, **{f"step-{t}": self.weights[t] for t in reference_steps}}
        measured = {}
        for name, reference in references.items():
            measured |= self._against(name, reference)
        measured["steps/clr"] = np.array(self.loss) / measured["inner_products/g.g"]
        if per_parameter:
            for i, name in enumerate(self.parameters):
                measured |= {f"parameters/{name}/{k}": v for k, v in self._products(self.final, i).items()}
        skipped = np.arange(steps) % every != 0
        measured = {path: np.where(skipped, np.nan, values) for path, values in measured.items()}
        found["steps/absent"] = np.zeros(steps)  # nothing is left out
        return {path: np.array(values, float) for path, values in found.items()} | measured

    def _against(self, name: str, reference: Vectors) -> dict[str, np.ndarray]:
        products = self._products(reference)
        gg, gd, dd = (products[key] for key in ("g.g", "g.d", "d.d"))
        with np.errstate(divide="ignore", invalid="ignore"):
            quantities = {
                "distance": np.sqrt(dd),
                "grad_dot_offset": gd,
                "rsi": gd / dd,
                "eb": np.sqrt(gg) / np.sqrt(dd),
                "cosine": gd / (np.sqrt(gg) * np.sqrt(dd)),
                "lolr": gd / gg,
            }
        for ratio in ("rsi", "eb", "cosine"):
            quantities[ratio][dd == 0] = np.nan  # undefined, by promise
        found = {f"references/{name}/{key}": value for key, value in quantities.items()}
        of_reference = {key: products[key] for key in ("g.d", "w.d", "d.d")}
        found |= {f"references/{name}/inner_products/{key}": value for key, value in of_reference.items()}
        if name == "final":
            found |= {f"steps/{key}": value for key, value in quantities.items()}
            found["steps/grad_norm"] = np.sqrt(gg)
            found |= {f"inner_products/{key}": value for key, value in products.items()}
        return found

    def _products(self, reference: Vectors, only: int | None = None) -> dict[str, np.ndarray]:
        """Sums over all parameters, or one, of w.w, w.g, g.g and, with d = w - reference, g.d, w.d and d.d."""
        keys = ("g.g", "w.g", "w.w", "g.d", "w.d", "d.d")
        found: dict[str, list[float]] = {key: [] for key in keys}
        for weights, gradients in zip(self.weights, self.gradients, strict=True):
            chosen = slice(None) if only is None else slice(only, only + 1)
            w, g, star = (np.concatenate(vectors[chosen]) for vectors in (weights, gradients, reference))
            vectors = {"w": w, "g": g, "d": w - star}
            for key in keys:
                a, b = key.split(".")
                found[key].append(float(vectors[a] @ vectors[b]))
        return {key: np.array(values) for key, values in found.items()}


class Oracle(Watch):
    """Watches a training that has no geomprobe in it."""

    def attach(self, model: nn.Module, optimizer: Optimizer, **stateful: Any) -> Storing:
        names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = optimizer
        self.history = History([names[id(p)] for p in held(optimizer)])
        self.probe = Storing(self._store)
        self.tries = 0
        return self.probe

    def before_step(self, losses: list[Tensor], scale: float = 1.0) -> None:
        self.tries += 1
        if self.history.add(self.optimizer, scale):
            self.history.epoch.append(self.probe.epoch)
            self.history.attempt.append(self.tries - 1)
            self.history.loss.append(sum(loss.item() for loss in losses))

    def finished(self, **things: Any) -> None:
        super().finished(**things)
        self._store("final")

    def _store(self, name: str) -> None:
        self.history.references[name] = [float64(p) for p in held(self.optimizer)]


class Storing(PlainProbe):
    """The loop's stand-in for a probe: knows its epoch, and stores references where they are asked for."""

    def __init__(self, store: Callable[[str], None]) -> None:
        self.epoch = -1
        self.reference = store  # type: ignore[method-assign]

    def epochs(self, count: int) -> Iterator[int]:
        for self.epoch in range(count):
            yield self.epoch


def held(optimizer: Optimizer) -> Sequence[nn.Parameter]:
    """The optimizer's parameters, each once."""
    return list({id(p): p for group in optimizer.param_groups for p in group["params"]}.values())


def gradient(parameter: nn.Parameter) -> np.ndarray:
    if parameter.grad is None:
        return np.zeros(parameter.numel())
    return float64(parameter.grad.to_dense())


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().reshape(-1).numpy().copy()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds and deterministic algorithms as a recording sets them, put back on leaving."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = torch.are_deterministic_algorithms_enabled()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def brute_force(case: Case, seed: int) -> Oracle:
    """Train a case without geomprobe, storing everything."""
    oracle = Oracle()
    with seeded(seed):
        train(case, oracle)
    return oracle


def columns_of(case: Case, history: History) -> dict[str, np.ndarray]:
    """The columns that a replay of a case must give."""
    attempt = {"steps/attempt": np.array(history.attempt, float)} if case.scaler else {}
    return attempt | history.columns(
        every=case.replay.get("every", 1),
        per_parameter=case.replay.get("per_parameter", False),
        reference_steps=case.reference_steps,
    )
