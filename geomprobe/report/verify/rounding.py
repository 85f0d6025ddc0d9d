"""What rounding allows: of the parameters' dtype, and of the inner products' sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from geomprobe.errors import RunError
from geomprobe.report.verify.check import UNIT_ROUNDOFF

# dtype: unit roundoff (half the spacing of numbers at 1), smallest subnormal (spacing of numbers at 0).
_DTYPES = {
    "float64": (2.0**-53, 2.0**-1074),
    "float32": (2.0**-24, 2.0**-149),
    "bfloat16": (2.0**-8, 2.0**-133),
    "float16": (2.0**-11, 2.0**-24),
}


@dataclass(frozen=True)
class Precision:
    """The arithmetic that a run's weights live in.

    ``sums`` bounds the error of a measured inner product, ``|fl(a.b) - a.b| <= sums ||a|| ||b||``. The
    probe forms ``w - w*`` and every product in float64, and adds n of them, in whatever order: n unit
    roundoffs at most, and 8 more for the difference, the product and the arithmetic of the check.
    """

    dtype: str
    unit_roundoff: float
    smallest: float
    sums: float
    num_parameters: int

    def update_error(self, weight_norm: Any, step_norm: Any) -> Any:
        """Bound on ``||e||`` in ``w' = w - lr G + e``, one rounded SGD update (arrays or floats).

        Per element: the learning rate, a gradient scaler's quotient, and the product of the two round by
        ``u lr |g_i|`` each; the sum rounds by ``u |w'_i|``, or by half the smallest number where it lands
        among the subnormals, and the product likewise. Hence
        ``||e|| <= u ||w'|| + 3 u lr ||G|| + sqrt(n) smallest``.

        >>> p = precision({"model": {"dtype": "bfloat16"}}, num_parameters=1)
        >>> p.update_error(weight_norm=256.0, step_norm=0.0)
        1.0
        """
        floor = sqrt(self.num_parameters) * self.smallest
        return self.unit_roundoff * (weight_norm + 3 * step_norm) + floor


def precision(manifest: Mapping[str, Any], num_parameters: int) -> Precision:
    """The precision of a run: the coarsest of its manifest's ``model.dtype``, float32 where it does not say.

    Raises:
        RunError: a dtype that is none of float64, float32, bfloat16, float16.

    >>> precision({}, num_parameters=100).dtype
    'float32'
    """
    stated = (manifest.get("model") or {}).get("dtype", "float32")
    dtypes = stated if isinstance(stated, list) else [stated]
    unknown = [dtype for dtype in dtypes if dtype not in _DTYPES]
    if unknown:
        raise RunError(
            f"the manifest's model.dtype is {stated!r}; verify knows the rounding of {', '.join(_DTYPES)}"
        )
    roundoff, smallest = (max(values) for values in zip(*(_DTYPES[dtype] for dtype in dtypes), strict=True))
    sums = (num_parameters + 8) * UNIT_ROUNDOFF
    return Precision("+".join(dtypes), roundoff, smallest, sums, num_parameters)
