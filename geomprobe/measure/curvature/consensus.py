"""What processes must know of one another before a step's Hg: that all can take it, and that all are still there."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import torch

from geomprobe.distributed.layout import ElsewhereFailed, Layout
from geomprobe.measure.curvature.autograd_graph import Blocker, CurvatureUnavailable

# What a process knows of a step's Hg before it is taken: the largest over all processes holds.
_READY, _PARTIAL, _BLOCKED = range(3)


def fail_together(layout: Layout, failure: Exception | None, device: torch.device) -> None:
    """Raise on every process if one has failed, so that none waits for another's product.

    Args:
        layout: of the processes.
        failure: what this process failed with, if it did.
        device: of the one number that is exchanged.

    Raises:
        CurvatureUnavailable: this or another process's loss has no exact product.
        ElsewhereFailed: another process failed in a way that ends it.
        Exception: ``failure``.

    >>> fail_together(Layout(), None, torch.device("cpu"))
    """
    reasons = layout.failures(failure, device)
    mild = failure is None or isinstance(failure, CurvatureUnavailable)
    fatal = {rank: text for rank, (kind, text) in reasons.items() if kind != CurvatureUnavailable.__name__}
    if mild and fatal:
        raise ElsewhereFailed(fatal)
    if failure is not None:
        raise failure
    for rank, (_, text) in reasons.items():
        raise CurvatureUnavailable(
            Blocker("the global loss", f'has none, says rank {rank} ("{text}")', "See there.")
        )


def all_ready(
    layout: Layout,
    whole: bool,
    blocked: CurvatureUnavailable | None,
    used: Mapping[str, bool],
    device: torch.device,
) -> bool:
    """Whether every process has all of a step's losses.

    Args:
        layout: of the processes.
        whole: whether this one has.
        blocked: why it can never have, if so.
        used: whether each parameter got a gradient here.
        device: of the three numbers that are exchanged.

    Raises:
        CurvatureUnavailable: one of them is blocked.
        UnsupportedTraining: they used different parameters, and the optimizer has what comes of it.

    >>> all_ready(Layout(), True, None, {"weight": True}, torch.device("cpu"))
    True
    """
    state = _BLOCKED if blocked is not None else _READY if whole else _PARTIAL
    mark = crc32(bytes(used.values()))
    state, largest, smallest = layout.largest([state, mark, -mark], device)
    if largest != -smallest:
        layout.require_same_use(used, device)
    if state == _BLOCKED:
        fail_together(layout, blocked, device)
    return state == _READY
