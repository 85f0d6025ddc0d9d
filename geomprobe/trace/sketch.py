"""Inner products between the steps of a run, estimated from the sketches that its recording has kept.

See `geomprobe.trace.projection` for what a sketch is, and why its inner products are those of the vectors on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geomprobe.errors import UsageError
from geomprobe.trace import geometry, projection
from geomprobe.trace.schema import FINAL

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """Estimates, and the standard error of each; arrays of one shape, NaN where there is nothing to estimate."""

    value: Array
    error: Array


class HorizonMap(NamedTuple):
    """The cosine between a step's gradient and the way that the weights go over the next h steps, over steps and h.

    Attributes:
        steps: t, [M].
        horizons: h, [H], increasing.
        cosine: of ``G_t`` and ``w_t - w_{t+h}``, [H, M]; NaN where the run has no step t + h.
        mean: over the steps at each horizon [H]; the error is the sketch's, as `Sketch.mean_cosine` has it.
    """

    steps: NDArray[np.int64]
    horizons: NDArray[np.int64]
    cosine: Estimate
    mean: Estimate

    def random_walk(self) -> Array:
        """What a random walk has at each horizon, ``h^-1/2`` (NWT eq. 8) [H]."""
        return geometry.random_walk_cosine(self.horizons)


class Sketch:
    """The sketches of a recording; `geomprobe.trace.record.Record.sketch` and `Trace.sketch` give it.

    Methods with a ``target`` compare each step with one point: the name of a reference, the number of a sketched step
    (steps from that one on are left out), or the projection of any weights of the same parameters. Errors are standard
    errors to first order in 1/size. They hold for vectors that are spread over many more elements than ``size``, and
    are too large for others.

    Args:
        rows: ``[steps, n]``, as the record has them; see ``layout`` there.
        described: the manifest's ``sketch``.
        references: projections by name.
        num_steps: steps of the run, to which the final iterate belongs; None where the run has not ended well.

    Attributes:
        size: numbers of each vector.
        every: each how many-th step has one.
        steps: those that have one, [M].
        exact: whether the model has at most ``size`` parameters; then nothing has an error but rounding.
        references: names of the points that ``target`` may name.

    >>> described = {"size": 4, "every": 1, "seed": 0, "shapes": [[3]]}
    >>> weights = np.array([[3.0, 1, 0], [2, 1, 0], [1, 1, 0]])
    >>> gradients = np.array([[1.0, 0, 0], [1, 0, 0], [0, 2, 0]])
    >>> rows = np.zeros((3, 8))
    >>> for row, w, g in zip(rows, weights, gradients):
    ...     projection.add(w, 0, row[:4]), projection.add(g, 0, row[4:])
    (None, None)
    (None, None)
    (None, None)
    >>> final = projected(described, [(np.array([1.0, 0, 0]), "float64")])
    >>> sketch = Sketch(rows, described, {"final": final}, num_steps=3)
    >>> sketch.rsi("final").value.tolist()
    [0.4, 0.5, 2.0]
    >>> sketch.cosine(2).value.tolist(), sketch.cosine(2).error.tolist()  # of 3 elements in 4 numbers: exact
    ([1.0, 1.0, nan], [0.0, 0.0, nan])
    >>> sketch.distances().value[0].tolist()
    [0.0, 1.0, 2.0]
    """

    def __init__(
        self,
        rows: Array,
        described: Mapping[str, Any],
        references: Mapping[str, Array],
        num_steps: int | None = None,
    ) -> None:
        self.size, self.every = int(described["size"]), int(described["every"])
        whole = len(rows) // self.every
        both = rows[: whole * self.every].reshape(whole, -1)[:, : 2 * self.size].reshape(whole, 2, self.size)
        self._weights, self._gradients = both[:, 0], both[:, 1]
        self._references = dict(references)
        self._num_steps = num_steps
        self.steps = np.arange(whole, dtype=np.int64) * self.every
        self.exact = sum(int(np.prod(shape, dtype=np.int64)) for shape in described["shapes"]) <= self.size

    def __repr__(self) -> str:
        return f"<Sketch of {len(self.steps)} steps, {self.size} numbers of the weights and of the gradient of each>"

    @property
    def references(self) -> list[str]:
        """Names of the points that ``target`` may name."""
        return list(self._references)

    # The vectors

    def weights(self, steps: ArrayLike | None = None) -> Array:
        """Projections of the weights of these steps [..., size]; of all sketched ones when None.

        Raises:
            UsageError: a step has no sketch.
        """
        return self._weights[self._rows(steps)]

    def gradients(self, steps: ArrayLike | None = None) -> Array:
        """Projections of the gradients of these steps, as `weights`."""
        return self._gradients[self._rows(steps)]

    def inner(self, a: Array, b: Array) -> Estimate:
        """Inner products of the vectors that have these projections [..., size].

        A projection is linear: ``sketch.weights(0) - sketch.weights(100)`` is that of the difference. The error is
        ``sqrt((||a||^2 ||b||^2 + (a.b)^2) / size)``.
        """
        product, squares = _dot(a, b), _dot(a, a) * _dot(b, b)
        return self._estimate(product, np.sqrt((squares + product**2) / self.size))

    # Each step's gradient against one later point

    def cosine(self, target: str | int | Array = FINAL) -> Estimate:
        """Gamma of each sketched step, ``G.d / (||G|| ||d||)`` with d the way from the target [M].

        Of two projections it is a coefficient of correlation, whose standard error is ``(1 - gamma^2) / sqrt(size)``.
        """
        return self._angle(self._gradients, self.offsets(target))

    def mean_cosine(
        self, target: str | int | Array = FINAL, of_row: NDArray[np.intp] | None = None, groups: int = 1
    ) -> Estimate:
        """The mean of `cosine` over groups of sketched steps [groups]; ``of_row`` [M] numbers each one's, -1 for none.

        All steps share signs and buckets, so their errors depend on one another, the more the gradients are alike. The
        standard error counts that in: it is the spread over the buckets of what each adds to the mean.
        """
        return self._mean_angle(
            self._gradients,
            self.offsets(target),
            np.zeros(len(self.steps), np.intp) if of_row is None else of_row,
            groups,
        )

    def rsi(self, target: str | int | Array = FINAL) -> Estimate:
        """``G.d / ||d||^2`` [M], with the error ``EB sqrt((1 - gamma^2) / size)`` of a coefficient of regression."""
        g_g, g_d, d_d, spread = self._products(target)
        return self._estimate(geometry.rsi(g_d, d_d), geometry.eb(g_g, d_d) * spread)

    def eb(self, target: str | int | Array = FINAL) -> Estimate:
        """``||G|| / ||d||`` [M], with the error ``EB sqrt((1 - gamma^2) / size)``."""
        g_g, _, d_d, spread = self._products(target)
        value = geometry.eb(g_g, d_d)
        return self._estimate(value, value * spread)

    def lolr(self, target: str | int | Array = FINAL) -> Estimate:
        """``G.d / ||G||^2`` [M], with the error ``sqrt((1 - gamma^2) / size) / EB``."""
        g_g, g_d, d_d, spread = self._products(target)
        return self._estimate(geometry.lolr(g_d, g_g), geometry.eb(d_d, g_g) * spread)

    def distance(self, target: str | int | Array = FINAL) -> Estimate:
        """``||w - w*||`` of each sketched step to the target [M], with the error ``distance / sqrt(2 size)``."""
        offsets = self.offsets(target)
        value = geometry.distance(_dot(offsets, offsets))
        return self._estimate(value, value / np.sqrt(2 * self.size))

    # Between steps

    def distances(self) -> Estimate:
        """Distances between the weights of all pairs of sketched steps [M, M]."""
        w = self._weights - self._weights.mean(0)  # so that little is lost in the squares
        squares = _dot(w, w)
        square = np.maximum(squares[:, None] + squares - 2 * w @ w.T, 0.0)
        np.fill_diagonal(square, 0.0)
        value = np.sqrt(square)
        return self._estimate(value, value / np.sqrt(2 * self.size))

    def gradient_cosines(self) -> Estimate:
        """Cosines between the gradients of all pairs of sketched steps [M, M]; 1 on the diagonal."""
        g = self._gradients / geometry.grad_norm(_dot(self._gradients, self._gradients))[:, None]
        value = np.clip(g @ g.T, -1.0, 1.0)
        np.fill_diagonal(value, np.where(np.isnan(np.diag(value)), np.nan, 1.0))
        return self._estimate(value, (1 - value**2) / np.sqrt(self.size))

    def horizon(self, h: int) -> Estimate:
        """The cosine between ``G_t`` and ``w_t - w_{t+h}`` [M]; NaN where step t + h has no sketch.

        The final iterate counts as the step after the last.
        """
        return self._angle(self._gradients, self._way(h))

    def horizon_map(self, horizons: Sequence[int] | None = None) -> HorizonMap:
        """`horizon` at each of some horizons; at about eight in each factor of two when None."""
        if horizons is None:
            most = max(1, int(self.steps[-1]) // self.every) if len(self.steps) else 1
            grid = np.round(2.0 ** np.arange(0, np.log2(most) + 1e-9, 1 / 8)).astype(np.int64)
            horizons = [int(h) * self.every for h in np.unique(grid)]
        ways = map(self._way, horizons)
        together = np.zeros(len(self.steps), np.intp)
        found = [
            (*self._angle(self._gradients, way), *self._mean_angle(self._gradients, way, together, 1)) for way in ways
        ]
        cosine, error, mean, mean_error = (np.array(each) for each in zip(*found, strict=True))
        means = Estimate(mean[:, 0], mean_error[:, 0])
        return HorizonMap(self.steps, np.array(horizons, np.int64), Estimate(cosine, error), means)

    def offsets(self, target: str | int | Array = FINAL) -> Array:
        """Projections of ``w - w*`` for each sketched step [M, size]; NaN from the target on, where that is a step.

        Raises:
            UsageError: there is no such reference or sketched step.
        """
        if isinstance(target, str):
            if target not in self._references:
                there = ", ".join(self._references) or "none"
                raise UsageError(f"there is no reference {target!r} to compare the sketches with; there is: {there}")
            return self._weights - self._references[target]
        if isinstance(target, np.ndarray):
            return self._weights - target
        offsets = self._weights - self.weights(target)
        offsets[self.steps >= target] = np.nan
        return offsets

    def _rows(self, steps: ArrayLike | None) -> Any:
        if steps is None:
            return slice(None)
        wanted = np.asarray(steps)
        if (missing := ~np.isin(wanted, self.steps)).any():
            last = self.steps[-1] if len(self.steps) else "none"
            raise UsageError(
                f"step {wanted[missing].flat[0]} has no sketch: there is one of every {self.every}. step up to {last}"
            )
        return wanted // self.every

    def _products(self, target: str | int | Array) -> tuple[Array, Array, Array, Array]:
        """``G.G``, ``G.d``, ``d.d``, and the standard error of a ratio of their norms."""
        g, d = self._gradients, self.offsets(target)
        g_g, g_d, d_d = _dot(g, g), _dot(g, d), _dot(d, d)
        gamma = geometry.cosine(g_d, g_g, d_d)
        return g_g, g_d, d_d, np.sqrt(np.maximum(0, 1 - gamma**2) / self.size)

    def _angle(self, a: Array, b: Array) -> Estimate:
        value = geometry.cosine(_dot(a, b), _dot(a, a), _dot(b, b))
        return self._estimate(value, (1 - value**2) / np.sqrt(self.size))

    def _mean_angle(self, a: Array, b: Array, of_row: NDArray[np.intp], groups: int) -> Estimate:
        value = geometry.cosine(_dot(a, b), _dot(a, a), _dot(b, b))
        means, errors = np.full(groups, np.nan), np.full(groups, np.nan)
        for group in range(groups):
            rows = np.flatnonzero((of_row == group) & np.isfinite(value))
            if len(rows):
                means[group] = value[rows].mean()
                added = np.zeros(self.size)
                for row in rows:
                    added += _added(a[row], b[row], value[row])
                errors[group] = np.sqrt(added @ added) / len(rows)
        return self._estimate(means, errors)

    def _way(self, h: int) -> Array:
        """``w_t - w_{t+h}`` [M, size], NaN where it is not known."""
        later = np.full_like(self._weights, np.nan)
        rows = (self.steps + h) // self.every
        known = (rows < len(self.steps)) & (h % self.every == 0)
        later[known] = self._weights[rows[known]]
        if self._num_steps is not None and FINAL in self._references:
            later[self.steps + h == self._num_steps] = self._references[FINAL]
        return self._weights - later

    def _estimate(self, value: Array, error: Array) -> Estimate:
        return Estimate(value, np.where(np.isnan(value), np.nan, 0.0) if self.exact else error)


def projected(described: Mapping[str, Any], arrays: Sequence[tuple[NDArray[Any], str]]) -> Array:
    """The projection [size] of weights: of each parameter in their order the raw array and the name of its torch dtype.

    Raises:
        UsageError: they have other shapes than the run's, or a dtype whose values NumPy cannot read.
    """
    out = np.zeros(int(described["size"]))
    shapes = [tuple(shape) for shape in described["shapes"]]
    if [array.shape for array, _ in arrays] != shapes:
        raise UsageError(f"weights of the shapes {shapes} are needed; these have {[a.shape for a, _ in arrays]}")
    start = 0
    for array, dtype in arrays:
        for block in np.array_split(array.reshape(-1), max(1, array.size >> 18)):
            projection.add(_values(block, dtype), start, out, int(described["seed"]))
            start += block.size
    return out


def joined(shards: Sequence[NDArray[Any]], shape: Sequence[int]) -> NDArray[Any]:
    """A parameter of a known shape from its shards by rank; those that come when it is whole are copies.

    Raises:
        ValueError: they are no shards of such a parameter.

    >>> joined([np.ones((2, 2)), np.zeros((1, 2)), np.ones((2, 2))], (3, 2)).tolist()
    [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    if any(shard.ndim != len(shape) for shard in shards):
        raise ValueError(f"a shard of a parameter of the shape {list(shape)} has another number of dimensions")
    cut = [dim for dim, length in enumerate(shape) if shards[0].shape[dim] != length]
    if not cut:
        return shards[0]
    ends = np.cumsum([shard.shape[cut[0]] for shard in shards])
    return np.concatenate(shards[: int(np.searchsorted(ends, shape[cut[0]])) + 1], axis=cut[0])


def _values(raw: NDArray[Any], dtype: str) -> Array:
    """Stored values as float64; those of bfloat16 are stored as unsigned integers."""
    if dtype == "bfloat16":
        raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif raw.dtype.kind != "f":
        raise UsageError(f"weights of the dtype {dtype} cannot be read here")
    return raw.astype(np.float64)


def _added(a: Array, b: Array, cosine: float) -> Array:
    """What each bucket adds to the error of a cosine, to first order [size]; the sum over the buckets is 0."""
    a, b = a / np.sqrt(a @ a), b / np.sqrt(b @ b)
    added: Array = a * b - cosine * (a**2 + b**2) / 2
    return added


def _dot(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        product: Array = np.einsum("...k,...k->...", a, b)
    return product
