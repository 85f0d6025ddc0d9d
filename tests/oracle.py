"""Independent brute force: train without geomprobe, store every w_t and G_t, compute each column in float64."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from cases import Case, PlainProbe, Watch, train
from torch import Tensor, nn
from torch.optim import Optimizer

Vectors = list[np.ndarray]  # one flat float64 array a parameter


class Storing(PlainProbe):
    """The loop's stand-in for a probe: knows its epoch, and stores references where they are asked for."""

    def __init__(self, weights: Callable[[], Vectors]) -> None:
        self.epoch = -1
        self.references: dict[str, Vectors] = {}
        self._weights = weights

    def epochs(self, count: int) -> Iterator[int]:
        for self.epoch in range(count):
            yield self.epoch

    def reference(self, name: str) -> None:
        self.references[name] = self._weights()


class Oracle(Watch):
    """Stores weights, gradients, losses and hyperparameters at each step that the optimizer takes."""

    def attach(self, model: nn.Module, optimizer: Optimizer, **stateful: Any) -> Storing:
        self.optimizer = optimizer
        self.probe = Storing(self._weights)
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        known = {id(p): name for name, p in model.named_parameters()}
        self.parameters = {known[key]: p for key, p in held.items()}
        self.weights: list[Vectors] = []
        self.gradients: list[Vectors] = []
        self.epoch: list[float] = []
        self.loss: list[float] = []
        self.groups: list[list[dict[str, float]]] = []
        return self.probe

    def before_step(self, losses: list[Tensor], scale: float = 1.0) -> None:
        gradients = [_gradient(p) for p in self.parameters.values()]
        if not all(np.isfinite(g).all() for g in gradients):
            return  # an overflow: this update will not happen
        self.gradients.append([g / scale for g in gradients])
        self.weights.append(self._weights())
        self.epoch.append(self.probe.epoch)
        self.loss.append(sum(loss.item() for loss in losses))
        names = ("lr", "weight_decay", "momentum")
        groups = self.optimizer.param_groups
        self.groups.append([{n: float(group[n]) for n in names if n in group} for group in groups])

    def finished(self, **things: Any) -> None:
        super().finished(**things)
        self.final_weights = self._weights()

    def columns(self, case: Case) -> dict[str, np.ndarray]:
        """Every column of the trace but those of the Hessian, by path in the file."""
        references = {"final": self.final_weights, **self.probe.references}
        references |= {f"step-{t}": self.weights[t] for t in case.reference_steps}
        found = {"steps/step": np.arange(len(self.loss)), "steps/epoch": self.epoch, "steps/loss": self.loss}
        found["steps/lr"] = [groups[0]["lr"] for groups in self.groups]
        for i, group in enumerate(self.groups[0]):
            found |= {f"groups/{i}/{name}": [groups[i][name] for groups in self.groups] for name in group}
        measured = {}
        for name, reference in references.items():
            measured |= self._against(name, reference)
        if case.replay.get("per_parameter"):
            for i, name in enumerate(self.parameters):
                rows = zip(self.weights, self.gradients, strict=True)
                only = [([w[i]], [g[i]]) for w, g in rows]
                products = _products(only, [self.final_weights[i]])
                measured |= {f"parameters/{name}/{product}": v for product, v in products.items()}
        measured["steps/clr"] = np.array(self.loss) / measured["inner_products/g.g"]
        left_out = np.arange(len(self.loss)) % case.replay.get("every", 1) != 0
        return {k: np.array(v, float) for k, v in found.items()} | {
            k: np.where(left_out, np.nan, v) for k, v in measured.items()
        }

    def _against(self, name: str, reference: Vectors) -> dict[str, np.ndarray]:
        products = _products(list(zip(self.weights, self.gradients, strict=True)), reference)
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
        undefined = dd == 0
        for ratio in ("rsi", "eb", "cosine"):
            quantities[ratio][undefined] = np.nan
        found = {f"references/{name}/{key}": value for key, value in quantities.items()}
        of_reference = {key: products[key] for key in ("g.d", "w.d", "d.d")}
        found |= {f"references/{name}/inner_products/{key}": value for key, value in of_reference.items()}
        if name == "final":
            found |= {f"steps/{key}": value for key, value in quantities.items()}
            found["steps/grad_norm"] = np.sqrt(gg)
            found |= {f"inner_products/{key}": value for key, value in products.items()}
        return found

    def _weights(self) -> Vectors:
        return [_float64(p) for p in self.parameters.values()]


def _products(rows: Sequence[tuple[Vectors, Vectors]], reference: Vectors) -> dict[str, np.ndarray]:
    """Sums over all parameters of w.w, w.g, g.g and, with d = w - reference, of g.d, w.d and d.d."""
    star = np.concatenate(reference)
    found: dict[str, list[float]] = {key: [] for key in ("g.g", "w.g", "w.w", "g.d", "w.d", "d.d")}
    for weights, gradients in rows:
        w, g = np.concatenate(weights), np.concatenate(gradients)
        vectors = {"w": w, "g": g, "d": w - star}
        for key, values in found.items():
            a, b = key.split(".")
            values.append(float(vectors[a] @ vectors[b]))
    return {key: np.array(values) for key, values in found.items()}


def _gradient(parameter: nn.Parameter) -> np.ndarray:
    if parameter.grad is None:
        return np.zeros(parameter.numel())
    return _float64(parameter.grad.to_dense())


def _float64(tensor: Tensor) -> np.ndarray:
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
