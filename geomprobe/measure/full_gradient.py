"""The gradient over all samples, at the end of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from geomprobe.errors import UsageError
from geomprobe.measure.side_gradient import LossPart, SideGradient, batch_size, loss_of_samples


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
        dataset: Any = loader.dataset
        samples, size = len(dataset), batch_size(loader)
        assert size is not None
        for start in range(0, samples, size):
            chosen = list(range(start, min(start + size, samples)))
            yield len(chosen) / samples, loss_of_samples(loss, loader, chosen)
