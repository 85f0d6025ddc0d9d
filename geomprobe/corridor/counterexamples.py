"""NWT's objectives without beneficial geometry (section 6, eq. 8 and 9), as torch modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geomprobe.corridor.landscapes import Landscape


class AsymmetricLinear(Landscape):
    r"""ALM: :math:`\sum_i \max(0, w \cdot x_i - y_i)^2`, convex, on stochastic minibatches (NWT eq. 9).

    A linear model that should stay below its targets. `forward` gives the sum over a fresh minibatch, drawn
    with replacement; `energy` the sum over all samples. (The paper's text also calls the error RMSE; eq. 9,
    followed here, has neither the mean nor the root.)

    Args:
        dimension: n, the size of ``theta``.
        samples: how many ``x_i`` and ``y_i`` there are.
        batch_size: samples in a minibatch.
        seed: of the samples and of the initial ``theta``, all standard normal.
        generator: draws the minibatches; None is torch's global generator, whose state a recording keeps.
        dtype: of the parameter and of the samples.

    >>> model = AsymmetricLinear(4, samples=100, batch_size=8)
    >>> model().shape, model.energy(torch.zeros(3, 4)).shape
    (torch.Size([]), torch.Size([3]))
    """

    inputs: Tensor
    targets: Tensor

    def __init__(
        self,
        dimension: int,
        *,
        samples: int = 1000,
        batch_size: int = 8,
        seed: int = 0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        source = torch.Generator().manual_seed(seed)
        super().__init__(torch.randn(dimension, generator=source, dtype=dtype))
        self.register_buffer("inputs", torch.randn(samples, dimension, generator=source, dtype=dtype))
        self.register_buffer("targets", torch.randn(samples, generator=source, dtype=dtype))
        self.batch_size = batch_size
        self.generator = generator

    def energy(self, theta: Tensor) -> Tensor:
        """The loss over all samples, for ``theta`` [..., n]."""
        return _asymmetric(theta, self.inputs, self.targets)

    def forward(self) -> Tensor:
        """The loss at ``self.theta`` over the next minibatch, a scalar."""
        device = self.inputs.device
        size = (self.batch_size,)
        chosen = torch.randint(len(self.targets), size, generator=self.generator, device=device)
        return _asymmetric(self.theta, self.inputs[chosen], self.targets[chosen])


class SinusoidalMixture(Landscape):
    r"""SM: :math:`\|w\|^2 + 100 \sum_i \sin(a_i w_i)^2`, deterministic and far from convex (NWT eq. 9).

    Args:
        dimension: n, the size of ``theta``.
        seed: of ``a`` and of the initial ``theta``, both standard normal.
        dtype: of both.

    >>> mixture = SinusoidalMixture(3)
    >>> mixture.energy(torch.zeros(3)).item()
    0.0
    """

    frequencies: Tensor

    def __init__(self, dimension: int, *, seed: int = 0, dtype: torch.dtype | None = None) -> None:
        source = torch.Generator().manual_seed(seed)
        super().__init__(torch.randn(dimension, generator=source, dtype=dtype))
        self.register_buffer("frequencies", torch.randn(dimension, generator=source, dtype=dtype))

    def energy(self, theta: Tensor) -> Tensor:
        """``||theta||^2 + 100 sum_i sin(a_i theta_i)^2`` for ``theta`` [..., n]."""
        return theta.square().sum(-1) + 100 * torch.sin(self.frequencies * theta).square().sum(-1)


class RandomWalk(nn.Module):
    """A loss whose gradient is a fresh random unit vector at each call, so that SGD walks at random (NWT eq. 8).

    With learning rate s, SGD on it is the isotropic random walk of fixed step size s from which NWT derive
    ``RSI ~ 1 / (T - t)`` and ``EB ~ gamma ~ (T - t)^(-1/2)``. This alignment comes only from the choice of the last
    iterate as the reference. The value of the loss has no meaning.

    Args:
        dimension: n, the size of ``theta``, which starts at 0; the law needs n far above the steps taken.
        generator: draws the directions; None is torch's global generator, whose state a recording keeps.
        dtype: of ``theta``.

    >>> walk = RandomWalk(1000)
    >>> walk().backward()
    >>> round(walk.theta.grad.norm().item(), 5)
    1.0
    """

    def __init__(
        self, dimension: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension, dtype=dtype))
        self.generator = generator

    def forward(self) -> Tensor:
        """``direction . theta`` with the next direction, a scalar."""
        direction = torch.empty_like(self.theta).normal_(generator=self.generator)
        return self.theta @ (direction / torch.linalg.vector_norm(direction))


def _asymmetric(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    excess = theta @ inputs.T - targets
    return excess.clamp(min=0).square().sum(-1)
