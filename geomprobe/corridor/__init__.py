"""Corridors (CG): landscapes that have them, flows through them, the CLR optimizer, and where a run's lie.

The names below load on first use, so that finding the corridors of a trace never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geomprobe.corridor.clr import CLR
    from geomprobe.corridor.counterexamples import AsymmetricLinear, RandomWalk, SinusoidalMixture
    from geomprobe.corridor.detection import Occupancy, Segments, occupancy, segments
    from geomprobe.corridor.flows import (
        EpochFlow,
        epoch_flow,
        gradient_descent,
        gradient_flow,
        momentum,
        runge_kutta_4,
    )
    from geomprobe.corridor.landscapes import (
        ConcaveCone,
        ConvexCone,
        GluedCorridors,
        Landscape,
        LinearPiece,
        Quadratic,
        RuledSurface,
    )

_HOMES = {
    "CLR": "clr",
    "AsymmetricLinear": "counterexamples",
    "RandomWalk": "counterexamples",
    "SinusoidalMixture": "counterexamples",
    "Occupancy": "detection",
    "Segments": "detection",
    "occupancy": "detection",
    "segments": "detection",
    "EpochFlow": "flows",
    "epoch_flow": "flows",
    "gradient_descent": "flows",
    "gradient_flow": "flows",
    "momentum": "flows",
    "runge_kutta_4": "flows",
    "ConcaveCone": "landscapes",
    "ConvexCone": "landscapes",
    "GluedCorridors": "landscapes",
    "Landscape": "landscapes",
    "LinearPiece": "landscapes",
    "Quadratic": "landscapes",
    "RuledSurface": "landscapes",
}

__all__ = [
    "CLR",
    "AsymmetricLinear",
    "ConcaveCone",
    "ConvexCone",
    "EpochFlow",
    "GluedCorridors",
    "Landscape",
    "LinearPiece",
    "Occupancy",
    "Quadratic",
    "RandomWalk",
    "RuledSurface",
    "Segments",
    "SinusoidalMixture",
    "epoch_flow",
    "gradient_descent",
    "gradient_flow",
    "momentum",
    "occupancy",
    "runge_kutta_4",
    "segments",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'geomprobe.corridor' has no attribute {name!r}")
    return getattr(import_module(f"geomprobe.corridor.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
