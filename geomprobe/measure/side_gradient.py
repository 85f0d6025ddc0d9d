"""Gradients that the run itself does not take, of losses that the script names by `Probe.held_out` and the like.

NWT section 6 calls it a critical limitation of measuring the step's own gradient that it is correlated with the
final iterate, since it is part of the path there. A gradient that no update uses is not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from geomprobe.errors import UnsupportedTraining, UsageError
from geomprobe.measure.inner_products import InnerProducts
from geomprobe.measure.quantity import Combine, Part, Quantity, Recorded, Step, Training
from geomprobe.probe.probe import Oracle
from geomprobe.reproducibility.isolation import side_computation, silence_hooks
from geomprobe.reproducibility.seeding import seed_in_use
from geomprobe.trace.schema import ORACLE_PRODUCTS

PRODUCTS = tuple(column.name for column in ORACLE_PRODUCTS)
OPTIONS = ("held_out_every", "full_gradient_every")

LossPart = tuple[float, Callable[[], Tensor]]


class SideGradient(Quantity):
    """Loss and inner products of a gradient that is taken beside the step's own.

    Every random generator is seeded for each measurement, from the run's seed and the step, so that a resumed replay
    finds the same numbers.

    Attributes:
        call: of the probe, which names the loss.

    Raises:
        UnsupportedTraining: it is asked for in a training of several processes.
        UsageError: by `open`: the script does not name the loss, or epochs are asked for and unknown.
    """

    call: ClassVar[str]

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        if training.layout.kind != "one process":
            asked = ", ".join(option for option in OPTIONS if getattr(training.options, option))
            raise UnsupportedTraining(
                f"{asked}: gradients beside the step's own are measured in one process only, and this training is "
                f"laid out as {training.layout.kind}. Leave the option out."
            )

    @abstractmethod
    def steps(self, epochs: NDArray[np.float64]) -> Sequence[int]:
        """The steps before which it is due, of a run with these epochs by step."""

    @abstractmethod
    def parts(self, loss: Callable[[Any], Tensor], loader: DataLoader[Any]) -> Iterator[LossPart]:
        """The losses whose weighted mean it is of."""

    def open(self, recorded: Recorded) -> None:
        probe = self.training.probe
        if self.name not in probe.oracles:
            raise UsageError(
                f"{self.option} needs a loss to measure, and the script names none before its first step. Call "
                f"{self.call}(loss, loader) after geomprobe.attach."
            )
        _require_batches(self.call, probe.oracles[self.name])
        assert recorded.record is not None
        self._seed = recorded.seed
        self._steps = frozenset(self.steps(recorded.record.steps["epoch"]))
        self._products = InnerProducts(self.training.parameters, recorded.final, only=PRODUCTS)
        self.columns = (f"{self.name}/loss", *(f"{self.name}/inner_products/{name}" for name in PRODUCTS))

    def due(self, step: int) -> bool:
        return step in self._steps

    def local(self, step: Step) -> dict[str, Part]:
        probe, parameters = self.training.probe, self.training.parameters
        oracle = probe.oracles[self.name]
        with side_computation(probe.model, parameters), silence_hooks(parameters), torch.enable_grad():
            source = np.random.SeedSequence([self._seed, step.number, OPTIONS.index(self.option)])
            seed_in_use(int(source.generate_state(1)[0]))
            if oracle.loader is None:
                loss, gradients = self._mean(iter([(1.0, oracle.loss)]))
            else:
                loss, gradients = self._mean(self.parts(oracle.loss, oracle.loader))
        products = self._products.measure(gradients)
        return {"loss": Part(loss, Combine.SAME), "products": Part(products, Combine.SAME)}

    def _mean(self, parts: Iterator[LossPart]) -> tuple[Tensor, list[Tensor | None]]:
        """The weighted mean of losses and of their gradients, float64; one alone keeps its type."""
        members = self.training.parameters
        wanted = [p for p in members if p.requires_grad]
        total = torch.zeros((), dtype=torch.float64, device=members[0].device)
        sums: dict[Tensor, Tensor] = {}
        for weight, evaluate in parts:
            loss = _evaluated(self.call, evaluate)
            total += weight * loss.detach().to(total)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    part = gradient if weight == 1 else weight * gradient.to_dense().double()
                    sums[parameter] = sums[parameter].add_(part) if parameter in sums else part
        return total, [sums.get(parameter) for parameter in members]


class HeldOutGradient(SideGradient):
    """Of a minibatch drawn from the loader's data set, without replacement, by torch's own generator."""

    name, call, option = "held_out", "probe.held_out", "held_out_every"

    def steps(self, epochs: NDArray[np.float64]) -> Sequence[int]:
        return range(0, len(epochs), self.training.options.held_out_every)

    def parts(self, loss: Callable[[Any], Tensor], loader: DataLoader[Any]) -> Iterator[LossPart]:
        chosen = torch.randperm(_size(loader))[: _batch_size(loader)]
        yield 1.0, _loss_of_samples(loss, loader, chosen.tolist())


class FullGradient(SideGradient):
    """Of all samples of the loader's data set, in order, in minibatches, each with its share of them."""

    name, call, option = "full_gradient", "probe.full_gradient_of", "full_gradient_every"

    def steps(self, epochs: NDArray[np.float64]) -> Sequence[int]:
        if np.isnan(epochs).any():
            raise UsageError(
                "full_gradient_every counts epochs, and the recording knows of none: iterate with "
                "`for epoch in probe.epochs(n)`, or over a DataLoader."
            )
        # The weights that an epoch ended with are those before the next one's first step.
        ends = [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist()]
        return ends[:: self.training.options.full_gradient_every]

    def parts(self, loss: Callable[[Any], Tensor], loader: DataLoader[Any]) -> Iterator[LossPart]:
        samples, size = _size(loader), _batch_size(loader)
        assert size is not None
        for start in range(0, samples, size):
            chosen = list(range(start, min(start + size, samples)))
            yield len(chosen) / samples, _loss_of_samples(loss, loader, chosen)


def _loss_of_samples(loss: Callable[[Any], Tensor], loader: DataLoader[Any], chosen: list[int]) -> Callable[[], Tensor]:
    """Evaluates ``loss`` on the minibatch that ``loader`` would make of some samples of its data set."""
    collate = loader.collate_fn or default_collate
    return lambda: loss(collate([loader.dataset[index] for index in chosen]))


def _size(loader: DataLoader[Any]) -> int:
    samples: Any = loader.dataset
    return len(samples)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """How many samples a minibatch of ``loader`` has; None where it makes none."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


def _evaluated(call: str, evaluate: Callable[[], Tensor]) -> Tensor:
    loss = evaluate()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise UsageError(
            f"The loss given to {call} returned {loss!r}: it must be one number, as a tensor, before .item() or "
            ".detach(), and outside torch.no_grad()."
        )
    return loss.reshape(())


def _require_batches(call: str, oracle: Oracle) -> None:
    """Refuse a loader whose data set cannot be drawn from."""
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
