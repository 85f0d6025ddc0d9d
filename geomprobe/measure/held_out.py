"""Gradients that the run itself does not take: of a held-out minibatch, and of all samples.

NWT section 6 calls it a critical limitation of measuring the step's own gradient that it is correlated with the
final iterate, since it is part of the path there. A gradient that no update uses is not.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from geomprobe.distributed.layout import Layout
from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.measure.curvature.double_backward import silent
from geomprobe.measure.curvature.side_evaluation import aside
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.options import MeasureOptions
from geomprobe.probe.probe import Oracle, Probe
from geomprobe.trace.record import Record
from geomprobe.trace.schema import FINAL, ORACLE_PRODUCTS

_CALLS = {"held_out": "probe.held_out", "full_gradient": "probe.full_gradient_of"}
_OPTIONS = {"held_out": "held_out_every", "full_gradient": "full_gradient_every"}
_PRODUCTS = [column.name for column in ORACLE_PRODUCTS]


class HeldOutGradients:
    """What a replay measures of the gradients that a script names by `Probe.held_out` and `full_gradient_of`.

    Every random stream is seeded anew for each measurement, from the run's seed and the step, so that a replay that
    goes on in the middle finds the same numbers. Nothing of the run is touched.

    Args:
        probe: whose parameters they are taken by.
        measure: how often.
        layout: how the training lies across processes.

    Attributes:
        columns: of a `row`, once it is open.

    Raises:
        UnsupportedTraining: they are asked for in a training of several processes.
    """

    def __init__(self, probe: Probe, measure: MeasureOptions, layout: Layout) -> None:
        self._probe = probe
        self._every = {name: n for name, option in _OPTIONS.items() if (n := getattr(measure, option))}
        if self._every and layout.kind != "one process":
            raise UnsupportedTraining(
                f"{', '.join(_OPTIONS[name] for name in self._every)}: gradients beside the step's own are measured in "
                f"one process only, and this training is laid out as {layout.kind}. Leave the option out."
            )
        self.columns = [
            f"{name}/{column}"
            for name in self._every
            for column in ("loss", *(f"inner_products/{product}" for product in _PRODUCTS))
        ]

    def open(self, final: Mapping[str, Tensor], record: Record, seed: int) -> None:
        """Make ready to measure.

        Args:
            final: the final iterate by parameter name.
            record: the recording, which knows when epochs began.
            seed: the run's.

        Raises:
            UsageError: the script does not name the loss, or epochs are asked for and unknown.
        """
        self._seed = seed
        for name in self._every:
            if name not in self._probe.oracles:
                raise UsageError(
                    f"{_OPTIONS[name]} needs a loss to measure, and the script names none before its first step. Call "
                    f"{_CALLS[name]}(loss, loader) after geomprobe.attach."
                )
            _require_batches(_CALLS[name], self._probe.oracles[name])
        if not self._every:
            return
        epochs = record.steps["epoch"]
        self._steps = {name: frozenset(self._due(name, epochs)) for name in self._every}
        parameters = list(self._probe.parameters.values())
        self._products = InnerProducts(parameters, {FINAL: list(final.values())})
        self._chosen = [self._products.names.index(product) for product in _PRODUCTS]
        self._device = parameters[0].device

    def row(self) -> Tensor:
        """The values at the present weights, float64, in the order of ``columns``; NaN where none is due."""
        pieces = [self._values(name) for name in self._every]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64)

    def _due(self, name: str, epochs: NDArray[np.float64]) -> list[int]:
        """The steps before which it is measured."""
        every = self._every[name]
        if name == "held_out":
            return list(range(0, len(epochs), every))
        if np.isnan(epochs).any():
            raise UsageError(
                "full_gradient_every counts epochs, and the recording knows of none: iterate with "
                "`for epoch in probe.epochs(n)`, or over a DataLoader."
            )
        # The weights that an epoch ended with are those before the next one's first step.
        return [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist()][::every]

    def _values(self, name: str) -> Tensor:
        width = 1 + len(_PRODUCTS)
        if self._probe.step not in self._steps[name]:
            return torch.full((width,), torch.nan, dtype=torch.float64, device=self._device)
        oracle = self._probe.oracles[name]
        parameters = list(self._probe.parameters.values())
        with aside(self._probe.model, parameters), silent(parameters), torch.enable_grad():
            source = np.random.SeedSequence([self._seed, self._probe.step, list(_OPTIONS).index(name)])
            _seed_streams(int(source.generate_state(1)[0]))
            if oracle.loader is None:
                parts = iter([(1.0, oracle.loss)])
            else:
                parts = (
                    _all(oracle, oracle.loader) if name == "full_gradient" else _one(oracle, oracle.loader)
                )
            loss, gradients = self._mean(_CALLS[name], parts)
        return torch.cat([loss.reshape(1), self._products.measure(gradients)[self._chosen]])

    def _mean(
        self, call: str, parts: Iterator[tuple[float, Callable[[], Tensor]]]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The weighted mean of losses and of their gradients, float64; one alone keeps its type."""
        members = list(self._probe.parameters.values())
        wanted = [p for p in members if p.requires_grad]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        sums: dict[Tensor, Tensor] = {}
        for weight, evaluate in parts:
            loss = _evaluated(call, evaluate)
            total += weight * loss.detach().to(total)
            for parameter, gradient in zip(
                wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    part = gradient if weight == 1 else weight * gradient.to_dense().double()
                    sums[parameter] = sums[parameter].add_(part) if parameter in sums else part
        return total, [sums.get(parameter) for parameter in members]


def _evaluated(call: str, evaluate: Callable[[], Tensor]) -> Tensor:
    loss = evaluate()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            f"The loss given to {call} returned {loss!r}: it must be one number, as a tensor, before .item() or "
            ".detach(), and outside torch.no_grad()."
        )
    return loss.reshape(())


def _one(oracle: Oracle, loader: DataLoader[Any]) -> Iterator[tuple[float, Callable[[], Tensor]]]:
    """A minibatch drawn from the loader's data set, without replacement, by torch's own stream."""
    dataset: Any = loader.dataset
    chosen = torch.randperm(len(dataset))[: _batch_size(loader)]
    yield 1.0, functools.partial(_loss_of, oracle, chosen.tolist())


def _all(oracle: Oracle, loader: DataLoader[Any]) -> Iterator[tuple[float, Callable[[], Tensor]]]:
    """All samples of the loader's data set in order, in minibatches, each with its share of them."""
    dataset: Any = loader.dataset
    samples, size = len(dataset), _batch_size(loader)
    assert size is not None
    for start in range(0, samples, size):
        chosen = list(range(start, min(start + size, samples)))
        yield len(chosen) / samples, functools.partial(_loss_of, oracle, chosen)


def _loss_of(oracle: Oracle, chosen: list[int]) -> Tensor:
    assert oracle.loader is not None
    collate = oracle.loader.collate_fn or default_collate
    return oracle.loss(collate([oracle.loader.dataset[index] for index in chosen]))


def _batch_size(loader: DataLoader[Any]) -> int | None:
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


def _require_batches(call: str, oracle: Oracle) -> None:
    """Hold a loader to one whose data set can be drawn from."""
    loader = oracle.loader
    if loader is None:
        return
    reason = None
    if not isinstance(loader, DataLoader):
        reason = f"a {type(loader).__name__} is no DataLoader"
    elif isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        reason = f"its {type(loader.dataset).__name__} can only be iterated over, not drawn from"
    elif type(sampler := loader.sampler) not in (RandomSampler, SequentialSampler):
        reason = f"it draws by a {type(sampler).__name__}, which would be passed by (torch.utils.data.Subset is not)"
    elif not _batch_size(loader):
        reason = "it makes no batches (batch_size=None)"
    if reason is not None:
        raise UsageError(
            f"{call}(loss, loader): {reason}. Give a DataLoader of a map-style data set, or no loader and a loss that "
            "takes nothing and draws its own batch, by the global random streams."
        )


def _seed_streams(seed: int) -> None:
    """Seed what `torch.manual_seed` would, but leave a device that is not in use without one for later."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
