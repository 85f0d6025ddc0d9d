"""Whether the gradient that a step takes is that of any function: only then does its Jacobian, the Hessian, commute.

A double backward gives ``J^T v`` for the Jacobian ``J`` of whatever the backward pass computes. Where a hook or a
custom function changes gradients on the way, or part of a loss is detached, that is not the gradient of one function,
``J`` is not symmetric, and there is no Hessian to speak of. For a random direction u, ``u.(J^T g) - g.(J^T u)`` is 0
with a symmetric J, and else of the size of ``|(J^T - J) g|``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TIMES = 5
"""How often a run is checked where nothing else is asked for."""


def default_interval(num_steps: int | None) -> int:
    """Steps between two of `TIMES` checks in a run of so many steps; 0, for no check, where there is no run.

    >>> default_interval(1000), default_interval(3), default_interval(None)
    (200, 1, 0)
    """
    return 0 if num_steps is None else max(1, num_steps // TIMES)


def direction(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A random vector of independent normal values, one tensor for each of ``like``; draws from no stream of the run.

    >>> direction([torch.zeros(2)], 1)[0].shape
    torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in like]


def asymmetric(products: Tensor, count: int, epsilon: float) -> Tensor:
    """Whether the products show that the Jacobian is not symmetric, on their device.

    What rounding leaves is far below the square root of the machine epsilon, what a changed gradient leaves far above.

    Args:
        products: ``u.u, u.Jg, Jg.Jg`` and ``g.g, g.Ju, Ju.Ju``, float64 ``[2, 3]``, of ``J^T`` in each place.
        count: of the values of a vector.
        epsilon: machine epsilon of the coarsest type that the loss passes through.

    >>> asymmetric(torch.tensor([[2.0, 1.0, 4.0], [1.0, 1.0, 4.0]]), 2, 1e-16)
    tensor(False)
    """
    (_, along, of_g), (norm, across, of_u) = products
    size = of_g.sqrt() + (norm * of_u / max(count, 1)).sqrt()
    return (along - across).abs() > epsilon**0.5 * size


def apart(squares: Tensor, epsilon: float) -> Tensor:
    """Whether ``Hg`` is not what finite differences of the gradient tend to, on their device.

    The differences ``D(h)`` and ``D(h/2)`` over a step h are off by about ``|D(h) - D(h/2)|``, and the extrapolated
    ``2 D(h/2) - D(h)`` by less. A kink on the way makes them differ as well: what cannot be shown is not there.

    Args:
        squares: of the norms of ``2 D(h/2) - D(h) - Hg``, ``D(h) - D(h/2)`` and ``Hg``, float64.
        epsilon: machine epsilon, as for `asymmetric`.

    >>> apart(torch.tensor([1e-8, 1e-6, 1.0]), 1e-7)
    tensor(False)
    """
    off, moved, of_hg = squares.sqrt()
    return off > moved + epsilon ** (1 / 3) * of_hg


def turned(products: Tensor, epsilon: float) -> Tensor:
    """Whether the gradient of the graphs is no multiple of the optimizer's, on their device.

    Args:
        products: ``a.a, a.g, g.g`` of the graphs' gradient ``a`` and the optimizer's ``g``, float64.
        epsilon: machine epsilon, as for `asymmetric`.

    >>> turned(torch.tensor([1.0, 2.0, 4.0]), 1e-7), turned(torch.tensor([1.0, 1.0, 4.0]), 1e-7)
    (tensor(False), tensor(True))
    """
    of_again, between, of_g = products
    return between < (1 - epsilon**0.5) * (of_g * of_again).sqrt()
