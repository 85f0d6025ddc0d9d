"""The witness of a training loop: what is true at each update, found without geomprobe, and what a trace says of it.

A loop is a function of a `Witness`. It runs once plainly, where `truth` looks at each update, and once under
`geomprobe.two_pass`, where `truth` does nothing. `examine` compares every cell of the trace.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.oracle import float64, gradient, seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import geomprobe
from geomprobe.trace.reader import Trace

Loss = Callable[[], Tensor]

SEED = 3
STEP = 1e-3  # of the finite differences, along a direction of norm 1

LOSS = frozenset({"loss", "clr"})
HG = frozenset({"hg_norm", "g_hg"})
ALL_OF_LOSS = LOSS | HG
"""What needs to know which loss the gradient is of."""


# The loops


@dataclass(frozen=True)
class Loop:
    """A training loop of the zoo.

    Attributes:
        family: what the loops beside it have in common.
        name: of its function.
        what: it does, in a few words.
        run: the loop.
        absent: the columns that may be NaN where the truth is a number.
        refused: a pattern of the message of the pass that refuses it, or None.
        options: of `geomprobe.two_pass`.
    """

    family: str
    name: str
    what: str
    run: Callable[[Witness], None]
    absent: frozenset[str] = frozenset()
    refused: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


LOOPS: dict[str, Loop] = {}


def loop(
    family: str, what: str, absent: Collection[str] = (), refused: str | None = None, **options: Any
) -> Callable[..., Any]:
    """Put a function into `LOOPS`."""

    def register(run: Callable[[Witness], None]) -> Callable[[Witness], None]:
        name = run.__name__
        if name in LOOPS and LOOPS[name].run.__module__ != run.__module__:  # two files have a loop of that name
            name += f"_{family}"
        assert name not in LOOPS, name
        LOOPS[name] = Loop(family, name, what, run, frozenset(absent), refused, options)
        return run

    return register


def all_loops() -> dict[str, Loop]:
    """`LOOPS`, once every file of them is imported."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith(("loops_", "more_")):
            importlib.import_module(f"{__package__}.{module.name}")
    return LOOPS


# What loops are built from


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A float64 network, by default of 26 parameters."""
    sizes = sizes or (3, 5, 1)
    layers: list[nn.Module] = []
    for wide, out in itertools.pairwise(sizes):
        layers += [nn.Linear(wide, out), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batches(count: int = 4, size: int = 6, features: int = 3, targets: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, the same in each run."""
    generator = torch.Generator().manual_seed(7)
    shape = (count, size, features + targets)
    return [(row[:, :features], row[:, features:]) for row in torch.randn(shape, generator=generator).double()]


def loader(count: int = 4, size: int = 6, features: int = 3, **options: Any) -> DataLoader[Any]:
    """The same as a DataLoader."""
    parts = batches(count, size, features)
    data = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return DataLoader(data, size, **options)


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def parts(x: Tensor, y: Tensor, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """A batch as micro-batches."""
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def elsewhere(model: nn.Module, offsets: Sequence[Tensor], loss: Callable[[nn.Module], Tensor]) -> Loss:
    """A loss evaluated where each parameter is further by a constant offset, as in SAM."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model)

    names = [f"model.{name}" for name, _ in model.named_parameters()]
    kept = [offset.detach().clone() for offset in offsets]
    return lambda: functional_call(
        Moved(), {n: p + e for n, p, e in zip(names, model.parameters(), kept, strict=True)}, ()
    )


def simple(witness: Witness, attach: bool = True, lr: float = 0.1, **options: Any) -> tuple[nn.Module, Any, Any]:
    """A network, its SGD and its probe."""
    model = mlp()
    optimizer = sgd(model, lr, **options)
    return model, optimizer, witness.watch(model, optimizer, attach)


class PlainProbe:
    """What a loop is given for a probe where there is no geomprobe."""

    def epochs(self, count: int) -> Iterator[int]:
        yield from range(count)

    def batches(self, loader: Any) -> Any:
        return loader

    def backward(self, loss: Tensor, closure: Loss | None = None, **options: Any) -> None:
        loss.backward(**options)

    def reference(self, name: str) -> None:
        pass


# The witness


class Witness:
    """What a loop is given: this one, in a pass, only attaches geomprobe."""

    def watch(
        self, model: nn.Module | None, optimizer: Optimizer | Sequence[Optimizer], attach: bool = True, **stateful: Any
    ) -> Any:
        """The probe of the loop. ``attach=False`` stands for a script that does not know of geomprobe.

        The optimizer's parameters are what is measured; of several optimizers, those of all.
        """
        self.model, self.attached = model, attach
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        return self._probe(model, optimizer, stateful) if attach else PlainProbe()

    def _probe(self, model: Any, optimizer: Any, stateful: dict[str, Any]) -> Any:
        return geomprobe.attach(model, optimizer, **stateful)

    def truth(
        self,
        loss: Loss | None,
        *,
        epoch: float = np.nan,
        lr: float | None = None,
        hessian_of: Loss | None = None,
        hessian: bool = True,
        changed: bool = False,
        scale: float = 1.0,
        moving: Optimizer | None = None,
    ) -> None:
        """Called where the optimizer is about to take the gradient; the next update takes just this one.

        Args:
            loss: evaluates the loss whose gradient the script's backward passes left, as a number and at any weights;
                None where there is no such loss, and the columns of it must be absent.
            epoch: of the update; NaN where nobody can know it, and the column must be absent.
            lr: of the first parameter group as the update uses it; as it is now when None.
            hessian_of: the loss whose Hessian is meant, where that is another.
            hessian: False where there is no such Hessian, and its columns must be absent.
            changed: whether the script changed the gradient after its backward passes, or in them.
            scale: what the gradient still has on it, under a GradScaler.
            moving: which of several optimizers takes it; that of all other parameters counts as 0.
        """

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizers' parameters as they are now, each once."""
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return list({id(p): p for group in groups for p in group["params"]}.values())

    @property
    def weights(self) -> np.ndarray:
        return flat(self.parameters)


@dataclass
class Row:
    """What is true at one update."""

    w: np.ndarray
    g: np.ndarray
    hg: np.ndarray
    loss: float
    lr: float
    epoch: float
    optimizer: int | None = None  # which of several moves


class PlainWitness(Witness):
    """Looks at each update of a run without geomprobe, and leaves no trace of it in the run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def _probe(self, model: Any, optimizer: Any, stateful: dict[str, Any]) -> Any:
        return PlainProbe()

    def truth(
        self,
        loss: Loss | None,
        *,
        epoch: float = np.nan,
        lr: float | None = None,
        hessian_of: Loss | None = None,
        hessian: bool = True,
        changed: bool = False,
        scale: float = 1.0,
        moving: Optimizer | None = None,
    ) -> None:
        taken = np.concatenate([np.full(p.numel(), self._is_moved(p, moving)) for p in self.parameters])
        w, g = self.weights, np.where(taken, np.concatenate([gradient(p) for p in self.parameters]), 0.0) / scale
        if not np.isfinite(g).all():
            return  # a GradScaler skips this update
        value, hg = np.nan, np.full_like(g, np.nan)
        with self._undisturbed():
            if loss is not None:
                value, found = self._gradient(loss)
                if not changed:  # else what the loop says of its loss is wrong
                    np.testing.assert_allclose(g, np.where(taken, found, 0.0), rtol=1e-9, atol=1e-12)
            if loss is not None and hessian:
                hg = self._hessian_gradient(hessian_of or loss, g)
        moves = self.optimizers[0] if moving is None else moving
        rate = moves.param_groups[0]["lr"] if lr is None else lr
        number = next(i for i, each in enumerate(self.optimizers) if each is moves)
        self.rows.append(Row(w, g, hg, value, float(rate), epoch, number if len(self.optimizers) > 1 else None))

    def _is_moved(self, p: Tensor, moving: Optimizer | None) -> bool:
        return moving is None or any(p is own for group in moving.param_groups for own in group["params"])

    def _gradient(self, loss: Loss) -> tuple[float, np.ndarray]:
        value = loss()
        trained = [p for p in self.parameters if p.requires_grad]
        found = dict(zip(trained, torch.autograd.grad(value, trained, allow_unused=True), strict=True))
        return value.item(), np.concatenate([dense(found.get(p), p) for p in self.parameters])

    def _hessian_gradient(self, loss: Loss, g: np.ndarray) -> np.ndarray:
        """Central differences of the gradient along ``g``, extrapolated: the error is of fourth order in the step."""
        norm = float(np.linalg.norm(g))
        if norm == 0.0:
            return np.zeros_like(g)
        far, near = (self._difference(loss, g / norm, step) for step in (STEP, STEP / 2))
        return norm * (4 * near - far) / 3

    def _difference(self, loss: Loss, direction: np.ndarray, step: float) -> np.ndarray:
        start = [p.detach().clone() for p in self.parameters]
        ends = []
        for signed in (step, -step):
            begin = 0
            for p, at in zip(self.parameters, start, strict=True):
                part = torch.from_numpy(direction[begin : begin + p.numel()]).reshape(p.shape)
                p.data.copy_(at + signed * part)
                begin += p.numel()
            ends.append(self._gradient(loss)[1])
        for p, at in zip(self.parameters, start, strict=True):
            p.data.copy_(at)
        return (ends[0] - ends[1]) / (2 * step)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluate losses inside: random streams and buffers are as before on leaving, and no parameter's hook runs."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        modules = [] if self.model is None else list(self.model.modules())
        buffers = [(module._buffers, dict(module._buffers)) for module in modules]
        for of_module, _ in buffers:
            of_module.update({name: b.clone() for name, b in of_module.items() if b is not None})
        hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in self.parameters if p._backward_hooks]
        for registered, _ in hooks:
            registered.clear()
        try:
            with torch.enable_grad():
                yield
        finally:
            for registered, kept in hooks:
                registered.update(kept)
            for of_module, kept in buffers:
                of_module.update(kept)
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([float64(tensor) for tensor in tensors])


def dense(found: Tensor | None, parameter: Tensor) -> np.ndarray:
    return np.zeros(parameter.numel()) if found is None else float64(found.to_dense())


# The verdict


@dataclass
class Verdict:
    """What became of a loop's columns.

    Attributes:
        right: columns without a wrong or an absent cell.
        absent: the reasons of the columns that lack cells; no reason where the trace has no column of them.
        wrong: a line for each column that is not as it must be.
    """

    right: list[str] = field(default_factory=list)
    absent: dict[str, set[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def examine(loop: Loop, folder: Path) -> Verdict:
    """Run a loop plainly and in two passes, and compare every cell.

    Raises:
        GeomprobeError: the passes refuse it.
    """
    plain, ends = PlainWitness(), []
    with seeded(SEED):
        loop.run(plain)

    def train() -> None:
        witness = Witness()
        loop.run(witness)
        ends.append(witness.weights)

    trace = geomprobe.two_pass(train, folder, seed=SEED, **loop.options)
    verdict = Verdict()
    if ("optimizer" in trace) != (plain.rows[0].optimizer is not None if plain.rows else False):
        verdict.wrong.append("optimizer: a column where one steps, or none where several do")
    for end in ends:
        if not np.array_equal(end, plain.weights, equal_nan=True):
            verdict.wrong.append("weights: a pass ends with others than the plain run")
    if trace.status != "complete" or trace.num_steps != len(plain.rows):
        verdict.wrong.append(f"rows: {trace.num_steps}, {trace.status}, of {len(plain.rows)} updates")
        return verdict
    for column, (truth, allowed) in columns(plain.rows, plain.weights).items():
        got = trace[column]
        may_lack = np.full(len(got), column in loop.absent)
        may_lack[0] |= column in HG and not plain.attached  # the probe comes with the first update
        _judge(verdict, column, got, truth, allowed, may_lack, _reasons(trace, column))
    return verdict


def _reasons(trace: Trace, column: str) -> list[set[str]] | None:
    """The reasons for which each row lacks the column; None where the trace knows of no reasons."""
    if "absent" not in trace:
        return None
    absences = importlib.import_module("geomprobe.trace.absence").ABSENCES
    of_column = [absence for absence in absences if absence.hides_column(column)]
    return [{each.reason for each in of_column if int(number) & each.number} for number in trace["absent"]]


def _judge(
    verdict: Verdict,
    column: str,
    got: np.ndarray,
    truth: np.ndarray,
    allowed: np.ndarray,
    may_lack: np.ndarray,
    reasons: list[set[str]] | None,
) -> None:
    """Note in the verdict what became of one column.

    A loss, or a product with the Hessian, that must be absent needs a reason as well as one that may be. A ratio may be
    undefined, and a loop may have no epochs.
    """
    lacks, undefined = np.isnan(got), np.isnan(truth)
    wrong = ~(np.abs(got - truth) <= allowed) & ~(lacks & (undefined | may_lack))
    absent = lacks & (~undefined | (column in {"loss", *HG}))
    for row in np.flatnonzero(wrong)[:2]:
        verdict.wrong.append(f"{column}[{row}]: {got[row]:.10g}, and the truth is {truth[row]:.10g}")
    if reasons is not None:
        unexplained = [row for row in np.flatnonzero(absent & ~wrong) if not reasons[row]]
        verdict.wrong += [f"{column}[{row}]: absent without a reason" for row in unexplained[:1]]
        refuted = [row for row in np.flatnonzero(~lacks) if reasons[row]]
        verdict.wrong += [f"{column}[{row}]: there, in spite of {reasons[row]}" for row in refuted[:1]]
    if absent.any():
        rows = np.flatnonzero(absent)
        verdict.absent[column] = set().union(*(reasons[row] for row in rows)) if reasons is not None else set()
    elif not wrong.any() and not undefined.all():
        verdict.right.append(column)


def columns(rows: Sequence[Row], final: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each column the truth, and how far a right number may be from it."""
    w, g, hg = (np.array([getattr(row, name) for row in rows]) for name in ("w", "g", "hg"))
    loss, lr, epoch = (np.array([getattr(row, name) for row in rows]) for name in ("loss", "lr", "epoch"))
    d = w - final
    norm, distance, hg_norm = (np.linalg.norm(vectors, axis=1) for vectors in (g, d, hg))
    gd, g_hg = (g * d).sum(1), (g * hg).sum(1)
    gap = 1e-5 * hg_norm + 1e-9 * norm
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = {
            "rsi": (gd / distance**2, 1e-10 * norm / distance),
            "eb": (norm / distance, 1e-10 * norm / distance),
            "cosine": (gd / (norm * distance), np.full_like(gd, 1e-10)),
            "lolr": (gd / norm**2, 1e-10 * distance / norm),
            "clr": (loss / norm**2, 1e-10 * np.abs(loss) / norm**2),
        }
    undefined = {"rsi": distance, "eb": distance, "cosine": norm * distance, "lolr": norm, "clr": norm}
    which = np.array([row.optimizer for row in rows], float)
    several = {} if np.isnan(which).all() else {"optimizer": (which, np.zeros_like(which))}
    return (
        several
        | {
            "loss": (loss, 1e-10 * np.abs(loss)),
            "lr": (lr, 1e-10 * np.abs(lr)),
            "epoch": (epoch, np.zeros_like(epoch)),
            "grad_norm": (norm, 1e-10 * norm),
            "distance": (distance, 1e-10 * distance),
            "grad_dot_offset": (gd, 1e-10 * norm * distance),
            "hg_norm": (hg_norm, gap),
            "g_hg": (g_hg, gap * norm),
        }
        | {name: (np.where(undefined[name] == 0, np.nan, of), by) for name, (of, by) in ratio.items()}
    )
