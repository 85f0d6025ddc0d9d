"""All experiments; those with the most telling figures come first."""

from __future__ import annotations

from catalog import beyond, cg, nwt
from catalog.entry import Elsewhere, Experiment

EXPERIMENTS: dict[str, Experiment | Elsewhere] = {
    each.name: each
    for each in [
        *nwt.EXPERIMENTS,
        *cg.EXPERIMENTS,
        *beyond.EXPERIMENTS,
    ]
}
"""By name, in the order of the gallery. A further experiment is one more list here, or one more entry of a list."""
