"""Inner products in, geometry out: RSI, EB, cosine, loLR, CLR and the corridor residuals.

Everything here is arithmetic on NumPy arrays (or floats). Where a quantity is undefined, because
``w = w*`` or the gradient is zero, the result is NaN: a number is right, or it is not there.

NWT is "No Wrong Turns" (Guille-Escuret et al.), CG is "Corridor Geometry" (Dherin, Rosca).
``G`` is the minibatch gradient without weight decay, ``d = w - w*``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Quotient that is NaN, without a warning, where it is undefined."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    with np.errstate(all="ignore"):
        return np.where(bottom == 0, np.nan, top / np.where(bottom == 0, 1.0, bottom))


def _norm(square: ArrayLike) -> Array:
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.asarray(square, float))


def distance(d_d: ArrayLike) -> Array:
    """``||w - w*||`` from ``d.d`` (NWT figures 12 and 13).

    >>> float(distance(9.0))
    3.0
    """
    return _norm(d_d)


def grad_norm(g_g: ArrayLike) -> Array:
    """``||G||`` from ``g.g``.

    >>> float(grad_norm(4.0))
    2.0
    """
    return _norm(g_g)


def rsi(g_d: ArrayLike, d_d: ArrayLike) -> Array:
    """Restricted secant inequality, ``G.d / ||d||^2``, in 1/lr (NWT section 3).

    >>> float(rsi(6.0, 4.0))
    1.5
    """
    return _ratio(g_d, d_d)


def eb(g_g: ArrayLike, d_d: ArrayLike) -> Array:
    """Error bound, ``||G|| / ||d||``, in 1/lr (NWT section 3).

    >>> float(eb(36.0, 4.0))
    3.0
    """
    return _ratio(_norm(g_g), _norm(d_d))


def cosine(g_d: ArrayLike, g_g: ArrayLike, d_d: ArrayLike) -> Array:
    """``gamma = RSI / EB = G.d / (||G|| ||d||)`` (NWT section 3).

    >>> float(cosine(6.0, 36.0, 4.0))
    0.5
    """
    return _ratio(_ratio(g_d, _norm(g_g)), _norm(d_d))


def lolr(g_d: ArrayLike, g_g: ArrayLike) -> Array:
    """Locally optimal learning rate, ``RSI / EB^2 = G.d / ||G||^2`` (NWT eq. 5).

    >>> float(lolr(6.0, 36.0))
    0.16666666666666666
    """
    return _ratio(g_d, g_g)


def clr(loss: ArrayLike, g_g: ArrayLike) -> Array:
    """Corridor learning rate, ``E / ||G||^2`` (CG eq. 3).

    >>> float(clr(2.0, 4.0))
    0.5
    """
    return _ratio(loss, g_g)


def corridor_residual(hg_hg: ArrayLike, g_g: ArrayLike) -> Array:
    """``||HG|| / ||G||``, in 1/lr: how fast the gradient turns along the flow (CG lemma 2.8).

    >>> float(corridor_residual(9.0, 4.0))
    1.5
    """
    return _ratio(_norm(hg_hg), _norm(g_g))


def relative_residual(lr: ArrayLike, hg_hg: ArrayLike, g_g: ArrayLike) -> Array:
    """``lr ||HG|| / ||G||``: the relative turn of the gradient over one step, 0 in a corridor (CG theorem 2.11).

    >>> float(relative_residual(0.1, 9.0, 4.0))
    0.15000000000000002
    """
    return np.asarray(lr, float) * corridor_residual(hg_hg, g_g)


def flow_drift(lr: ArrayLike, hg_hg: ArrayLike) -> Array:
    """``lr^2 ||HG|| / 2``: leading order of the gap between a step and the gradient flow (CG theorem 3.1).

    >>> float(flow_drift(2.0, 9.0))
    6.0
    """
    return np.asarray(lr, float) ** 2 * _norm(hg_hg) / 2


def next_square_distance(lr: ArrayLike, g_d: ArrayLike, g_g: ArrayLike, d_d: ArrayLike) -> Array:
    """``||w - lr G - w*||^2 = ||d||^2 - 2 lr G.d + lr^2 ||G||^2``, plain SGD's next step (NWT eq. 4).

    >>> float(next_square_distance(0.5, 6.0, 4.0, 9.0))
    4.0
    """
    rate = np.asarray(lr, float)
    return np.asarray(d_d, float) - 2 * rate * np.asarray(g_d, float) + rate**2 * np.asarray(g_g, float)


def random_walk_cosine(steps_left: ArrayLike) -> Array:
    """The null model: ``gamma ~ (T - t)^(-1/2)`` of a random walk in high dimension (NWT eq. 8).

    A step of a walk with independent increments has ``G.d = ||G||^2 lr`` in expectation, and
    ``||d||^2 = (T - t) lr^2 ||G||^2``; their ratio is exactly this power, and 1 at the last step.

    >>> [float(x) for x in random_walk_cosine([4, 1])]
    [0.5, 1.0]
    """
    return _ratio(1.0, _norm(steps_left))
