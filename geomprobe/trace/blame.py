"""Which of the things that differ in one step is to blame: `replay` and `diff` both ask here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_CAUSES = ("rng at fetch", "batch", "rng", "weights", "optimizer", "loss", "buffers")
_CAUSES_WITHOUT_LOADER = ("rng", "batch", "weights", "optimizer", "loss", "buffers")


class Difference(NamedTuple):
    """The first cause by which a step of two runs differs.

    Attributes:
        component: what differs, one of `geomprobe.trace.schema.COMPONENTS`, or ``"length"``.
        tensor: the first of its tensors or streams that differs.
        also: the other components that differ in the same step, in the order of causes.
        more: how many further tensors of ``component`` differ.
    """

    component: str
    tensor: str
    also: tuple[str, ...] = ()
    more: int = 0


def first_difference(
    names: Mapping[str, Sequence[str]], a: Mapping[str, Any], b: Mapping[str, Any]
) -> Difference | None:
    """The cause of what differs within one step, or None where nothing differs.

    A cause comes before its effects. The random numbers decide the batch: where a loader was asked, those before
    it was asked; where none was, those that were drawn up to the update. The weights and the batch decide the loss,
    and the forward pass moves the buffers.

    Args:
        names: by component, the names of its fingerprints. An RNG stream is named ``fetch/NAME`` where it was read
            before the loader was asked.
        a: by component, the fingerprints of one run at this step [names].
        b: the same of the other run.

    >>> names = {"batch": ("inputs",), "rng": ("fetch/torch", "step/torch")}
    >>> asked = {"batch": [1], "rng": [5, 6]}, {"batch": [2], "rng": [5, 7]}
    >>> first_difference(names, *asked).component
    'batch'
    >>> no_loader = {"batch": [1], "rng": [0, 6]}, {"batch": [2], "rng": [0, 7]}
    >>> first_difference(names, *no_loader)
    Difference(component='rng', tensor='step/torch', also=('batch',), more=0)
    """
    fetches = [i for i, name in enumerate(names.get("rng", ())) if _at_fetch(name)]
    # The fingerprint of a stream at the fetch is 0 where nothing was fetched.
    asked = any(run["rng"][i] for run in (a, b) for i in fetches)
    causes = _CAUSES if asked else _CAUSES_WITHOUT_LOADER
    differing: list[tuple[int, str, str]] = []
    for component, own_names in names.items():
        for name, one, other in zip(own_names, a[component], b[component], strict=True):
            if one != other:
                cause = "rng at fetch" if asked and component == "rng" and _at_fetch(name) else component
                differing.append((causes.index(cause), component, name))
    if not differing:
        return None
    differing.sort(key=lambda found: found[0])  # stable: within a component, the model's own order stays
    _, component, tensor = differing[0]
    also = dict.fromkeys(other for _, other, _ in differing if other != component)
    more = sum(other == component for _, other, _ in differing) - 1
    return Difference(component, tensor, tuple(also), more)


def _at_fetch(stream: str) -> bool:
    return stream.startswith("fetch/")
