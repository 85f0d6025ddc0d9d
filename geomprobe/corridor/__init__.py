"""Corridors (CG): landscapes that have them, flows through them, the CLR optimizer, and where a run's lie.

The names below load on first use, so that finding the corridors of a trace never imports torch.
"""

from typing import TYPE_CHECKING

from geomprobe._package import lazy_names

if TYPE_CHECKING:
    from geomprobe.corridor.clr import CLR as CLR
    from geomprobe.corridor.counterexamples import AsymmetricLinear as AsymmetricLinear
    from geomprobe.corridor.counterexamples import RandomWalk as RandomWalk
    from geomprobe.corridor.counterexamples import SinusoidalMixture as SinusoidalMixture
    from geomprobe.corridor.detection import Occupancy as Occupancy
    from geomprobe.corridor.detection import Segments as Segments
    from geomprobe.corridor.detection import occupancy as occupancy
    from geomprobe.corridor.detection import segments as segments
    from geomprobe.corridor.flows import EpochFlow as EpochFlow
    from geomprobe.corridor.flows import epoch_flow as epoch_flow
    from geomprobe.corridor.flows import gradient_descent as gradient_descent
    from geomprobe.corridor.flows import gradient_flow as gradient_flow
    from geomprobe.corridor.flows import momentum as momentum
    from geomprobe.corridor.flows import runge_kutta_4 as runge_kutta_4
    from geomprobe.corridor.landscapes import ConcaveCone as ConcaveCone
    from geomprobe.corridor.landscapes import ConvexCone as ConvexCone
    from geomprobe.corridor.landscapes import GluedCorridors as GluedCorridors
    from geomprobe.corridor.landscapes import Landscape as Landscape
    from geomprobe.corridor.landscapes import LinearPiece as LinearPiece
    from geomprobe.corridor.landscapes import Quadratic as Quadratic
    from geomprobe.corridor.landscapes import RuledSurface as RuledSurface

__getattr__, __dir__ = lazy_names(__name__)
