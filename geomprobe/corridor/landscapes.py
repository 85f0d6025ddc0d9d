r"""Losses with known corridors, as torch modules on which any probe can be put.

A corridor is a region where ``Hg = 0`` (CG theorem 2.11). Since :math:`Hg = \frac12 \nabla \|g\|^2`,
:math:`\|g\|` is then one number on each connected piece of the region. So corridors are the solutions of the
eikonal equation :math:`\|\nabla E\| = \alpha`. Up to sign and a constant, these are ``alpha`` times the
distance to something. The distance to a point gives a cone, that to a hyperplane a linear piece, and that to a smooth
convex body a ruled surface whose lines are the body's normals. Pieces of different ``alpha`` can be glued along
boundaries, where the gradient jumps.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

Point = Tensor | Sequence[float]


class Landscape(nn.Module, ABC):
    """A loss that is a pure function of one parameter vector, ``theta`` [n].

    Args:
        start: the initial ``theta``, [n]. The landscape's constants get its dtype and device; later, ``.to`` moves
            all of it, as it does for any module.

    A subclass defines `energy`:

    >>> class Bowl(Landscape):
    ...     def energy(self, theta):
    ...         return theta.pow(4).sum(-1)
    >>> Bowl([1.0, 2.0])().item()
    17.0
    """

    theta: nn.Parameter

    def __init__(self, start: Point) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(start).detach().clone())

    @abstractmethod
    def energy(self, theta: Tensor) -> Tensor:
        """The loss [...] at each ``theta`` [..., n]. It depends on nothing else, and has no side effects."""

    def forward(self) -> Tensor:
        """The loss at ``self.theta``, a scalar."""
        return self.energy(self.theta)

    def _constant(self, name: str, value: Point | float, shape: Sequence[int]) -> None:
        given = torch.as_tensor(value, dtype=self.theta.dtype, device=self.theta.device).detach()
        try:
            self.register_buffer(name, given.expand(shape).clone())
        except RuntimeError:
            raise ValueError(
                f"{type(self).__name__}: {name} has shape {tuple(given.shape)}, but for theta of "
                f"{self.theta.numel()} elements it must be {tuple(shape)}"
            ) from None


class ConvexCone(Landscape):
    r"""``E = alpha ||theta - center||`` (CG example 2.3): one corridor, except at its apex.

    Args:
        alpha: slope, positive.
        center: the apex, [n] or one number for all coordinates.
        start: the initial ``theta``, [n].

    >>> cone = ConvexCone(2.0, start=[3.0, 4.0])
    >>> cone().item()
    10.0
    >>> cone.energy(torch.zeros(5, 7, 2)).shape
    torch.Size([5, 7])
    """

    center: Tensor

    def __init__(self, alpha: float = 1.0, *, center: Point | float = 0.0, start: Point = (1.0, 1.0)) -> None:
        super().__init__(start)
        self.alpha = _positive("alpha", alpha)
        self._constant("center", center, self.theta.shape)

    def energy(self, theta: Tensor) -> Tensor:
        """``alpha ||theta - center||`` for ``theta`` [..., n]."""
        return self.alpha * _norm(theta - self.center)


class ConcaveCone(ConvexCone):
    r"""``E = beta - alpha ||theta - center||`` (CG example 2.4): one corridor, except at its apex; unbounded below.

    Args:
        alpha: slope, positive.
        beta: height of the apex.
        center, start: as `ConvexCone`'s.

    >>> ConcaveCone(2.0, beta=12.0, start=[3.0, 4.0])().item()
    2.0
    """

    def __init__(
        self, alpha: float = 1.0, *, beta: float = 0.0, center: Point | float = 0.0, start: Point = (1.0, 1.0)
    ) -> None:
        super().__init__(alpha, center=center, start=start)
        self.beta = beta

    def energy(self, theta: Tensor) -> Tensor:
        """``beta - alpha ||theta - center||`` for ``theta`` [..., n]."""
        return self.beta - super().energy(theta)


class LinearPiece(Landscape):
    """``E = slope . theta + offset`` (CG example 2.2): the only corridor in one dimension.

    Args:
        slope: the gradient, [n].
        offset: the loss at the origin.
        start: as `ConvexCone`'s.

    >>> LinearPiece([1.0, -2.0], offset=5.0, start=[3.0, 1.0])().item()
    6.0
    """

    slope: Tensor

    def __init__(self, slope: Point, *, offset: float = 0.0, start: Point = (1.0, 1.0)) -> None:
        super().__init__(start)
        self._constant("slope", slope, self.theta.shape)
        self.offset = offset

    def energy(self, theta: Tensor) -> Tensor:
        """``slope . theta + offset`` for ``theta`` [..., n]."""
        return theta @ self.slope + self.offset


class RuledSurface(Landscape):
    r"""``alpha`` times the distance to a solid ellipsoid (CG example 2.5): a corridor outside it, 0 inside.

    The lines of steepest descent are the ellipsoid's normals. They do not meet in one point, so the surface
    is ruled and is no cone. The closest point of the ellipsoid
    :math:`\sum_i (x_i / a_i)^2 = 1` to a point :math:`x` outside is :math:`a_i^2 x_i / (t + a_i^2)`, with
    :math:`t > 0` the root of :math:`F(t) = \sum_i (a_i x_i / (t + a_i^2))^2 - 1`, and the distance is
    :math:`t \, \| x_i / (t + a_i^2) \|`. Newton's method from below cannot overshoot, because ``F`` is convex
    and decreasing. Autograd differentiates its iterations, so gradient and Hessian are exact to rounding.

    Args:
        alpha: slope, positive.
        axes: semi-axes of the ellipsoid, positive, [n] or one number for a ball.
        center: of the ellipsoid, [n] or one number.
        start: as `ConvexCone`'s.

    >>> surface = RuledSurface(3.0, axes=[2.0, 1.0], start=[0.0, 5.0])
    >>> surface().item(), surface.energy(torch.tensor([1.0, 0.0])).item()
    (12.0, 0.0)
    """

    axes: Tensor
    center: Tensor

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        axes: Point | float = (2.0, 1.0),
        center: Point | float = 0.0,
        start: Point = (3.0, 2.0),
    ) -> None:
        super().__init__(start)
        self.alpha = _positive("alpha", alpha)
        self._constant("axes", axes, self.theta.shape)
        self._constant("center", center, self.theta.shape)
        _positive("the smallest of axes", self.axes.min().item())

    def energy(self, theta: Tensor) -> Tensor:
        """``alpha`` times the distance to the ellipsoid, for ``theta`` [..., n]."""
        offset = theta - self.center
        outside = (offset / self.axes).square().sum(-1) > 1
        # Where the distance is 0 the root is not positive; any outside point keeps its gradient finite there.
        point = torch.where(outside[..., None], offset, 2 * self.axes)
        distance = _distance_to_ellipsoid(point, self.axes)
        return self.alpha * torch.where(outside, distance, torch.zeros_like(distance))


class GluedCorridors(Landscape):
    r"""``E = max(min of valleys, max of hills)``: corridors glued along boundaries (CG example 2.6, figure 1b).

    At each point the loss is that of one of its pieces. So, if all pieces are corridors, it is a corridor except on the
    boundaries between them. There it is continuous, and not differentiable.

    Args:
        valleys: landscapes, at least one; the loss is the minimum over them. Only their `energy` is used.
        hills: landscapes that rise above the valleys: the loss is the maximum of these and of the valleys.
        start: as `ConvexCone`'s.

    >>> two = GluedCorridors([ConvexCone(1.0), ConvexCone(2.0, center=[4.0, 0.0])], start=[3.0, 0.0])
    >>> two().item(), two.energy(torch.tensor([1.0, 0.0])).item()
    (2.0, 1.0)
    """

    def __init__(
        self, valleys: Sequence[Landscape], hills: Sequence[Landscape] = (), *, start: Point = (1.0, 1.0)
    ) -> None:
        super().__init__(start)
        if not valleys:
            raise ValueError("GluedCorridors needs at least one valley, but valleys is empty")
        self.valleys = nn.ModuleList(map(_without_theta, valleys)).to(self.theta)
        self.hills = nn.ModuleList(map(_without_theta, hills)).to(self.theta)

    @classmethod
    def figure_1b(cls, start: Point = (-3.0, 2.0)) -> GluedCorridors:
        """A cone and a ruled basin, a concave cone rising between them and a linear ramp beside them.

        >>> GluedCorridors.figure_1b([-2.0, 0.0])().item()
        0.0
        """
        basin = RuledSurface(1.5, axes=[1.0, 0.5], center=[2.0, -0.5])
        hill = ConcaveCone(2.0, beta=5.0, center=[0.0, 1.5])
        ramp = LinearPiece([0.5, -2.0], offset=-3.0)
        return cls([ConvexCone(1.0, center=[-2.0, 0.0]), basin], [hill, ramp], start=start)

    def energy(self, theta: Tensor) -> Tensor:
        """The loss of the piece that ``theta`` [..., n] lies on."""
        height = functools.reduce(torch.minimum, _energies(self.valleys, theta))
        return functools.reduce(torch.maximum, _energies(self.hills, theta), height)


class Quadratic(Landscape):
    r"""``E = theta.A theta / 2 + b.theta + c``: no corridor unless linear (CG example 2.7, appendix C).

    Args:
        a: [n, n]; only its symmetric part matters.
        b: [n] or one number.
        c: the loss at the origin.
        start: as `ConvexCone`'s.

    >>> Quadratic([[1.0, 0.0], [0.0, 3.0]], b=[1.0, 0.0], c=0.5, start=[2.0, 1.0])().item()
    6.0
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        a: Tensor | Sequence[Sequence[float]],
        *,
        b: Point | float = 0.0,
        c: float = 0.0,
        start: Point = (1.0, 1.0),
    ) -> None:
        super().__init__(start)
        size = self.theta.numel()
        self._constant("a", torch.as_tensor(a), (size, size))
        self._constant("b", b, (size,))
        self.c = c

    def energy(self, theta: Tensor) -> Tensor:
        """``theta.A theta / 2 + b.theta + c`` for ``theta`` [..., n]."""
        return ((theta @ self.a) * theta).sum(-1) / 2 + theta @ self.b + self.c


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, but it is {value!r}")
    return value


def _norm(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector, dim=-1)


def _distance_to_ellipsoid(point: Tensor, axes: Tensor) -> Tensor:
    squares = axes.square()
    # F is 0 at its root, so none of its terms exceeds 1 there: the root of each term lies below that of F.
    root = (axes * point.abs() - squares).amax(-1, keepdim=True).clamp(min=0).detach()
    for _ in range(20):
        terms = (axes * point / (root + squares)).square()
        slope = -2 * (terms / (root + squares)).sum(-1, keepdim=True)
        root = root - (terms.sum(-1, keepdim=True) - 1) / slope
    return root.squeeze(-1) * _norm(point / (root + squares))


def _energies(pieces: nn.ModuleList, theta: Tensor) -> list[Tensor]:
    return [cast(Landscape, piece).energy(theta) for piece in pieces]


def _without_theta(piece: Landscape) -> Landscape:
    bare = copy.deepcopy(piece)
    bare.register_parameter("theta", None)
    return bare
