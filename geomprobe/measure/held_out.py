"""The gradient of a held-out minibatch: one that the update does not use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from geomprobe.measure.side_gradient import LossPart, SideGradient, batch_size, loss_of_samples


class HeldOutGradient(SideGradient):
    """Of a minibatch drawn from the loader's data set, without replacement, by torch's own generator."""

    name, call, option = "held_out", "probe.held_out", "held_out_every"

    def steps(self, epochs: NDArray[np.float64]) -> Sequence[int]:
        return range(0, len(epochs), self.training.options.held_out_every)

    def parts(self, loss: Callable[[Any], Tensor], loader: DataLoader[Any]) -> Iterator[LossPart]:
        samples: Any = loader.dataset
        chosen = torch.randperm(len(samples))[: batch_size(loader)]
        yield 1.0, loss_of_samples(loss, loader, chosen.tolist())
