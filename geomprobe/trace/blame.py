"""Which of the things that differ in one step is to blame, and why likely: `replay` and `diff` both ask here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from geomprobe.trace.schema import COMPONENTS

_CAUSES = ("rng at fetch", "batch", "rng", *COMPONENTS[2:])

FINAL_WEIGHTS, FINAL_STATE = "final weights", "state after the last step"
"""Names of the weights and of the optimizer's state at the end, which are in no step's fingerprint."""


class StateSteps(NamedTuple):
    """The steps whose fingerprint holds digests of the optimizer's state; in other rows they are 0.

    A record's manifest holds the rule, and a replay follows it.

    Attributes:
        first: so many steps from the start have them.
        every: each step whose number is a multiple of it has them.

    >>> [step for step in range(12) if StateSteps(first=2, every=5).taken(step)]
    [0, 1, 5, 10]
    """

    first: int
    every: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> StateSteps:
        """The rule of a recording; that of new ones for what its manifest does not say.

        >>> StateSteps.of({"optimizer_state_steps": {"every": 16}})
        StateSteps(first=4, every=16)
        """
        found = manifest.get("optimizer_state_steps") or {}
        given = {name: found[name] for name in cls._fields if found.get(name) is not None}
        return STATE_STEPS._replace(**given)

    def taken(self, step: int) -> bool:
        """Whether a step is one of them."""
        return step < self.first or step % self.every == 0

    def last_before(self, step: int) -> int:
        """The last of them before a step that is not the first."""
        return step - 1 if step <= self.first else max(self.first - 1, (step - 1) // self.every * self.every)

    def shared(self, other: StateSteps) -> StateSteps:
        """Steps that are in both rules."""
        return StateSteps(min(self.first, other.first), math.lcm(self.every, other.every))


STATE_STEPS = StateSteps(first=4, every=64)
"""The rule for new recordings. A digest reads the whole state, which for Adam is twice the weights: read at every 64th
step, it costs far less than 1 % of a step."""


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
    the forward pass moves the buffers, and all of them decide the gradient.

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
    causes = _CAUSES if asked else COMPONENTS
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


def likely(step: int, found: Difference, state: StateSteps) -> str:
    """Why the first difference of two runs has come about, as far as what was equal before it can tell.

    Args:
        step: of the difference. All steps before it are equal.
        found: the difference.
        state: the steps at which both runs have digests of the optimizer's state.

    >>> print(likely(7, Difference("hyperparameters", "lr"), STATE_STEPS))
    the schedule, or something else that sets the learning rate, gave another one for this step
    """
    match found.component:
        case "weights":
            return _weights(step, found, state)
        case "hyperparameters":
            return _hyperparameters(found.tensor)
        case "optimizer":
            return _state(step, found, state)
    return _LIKELY[found.component]


_LIKELY = {
    "rng": "something drew a different number of random numbers before this step",
    "batch": "the samples, their order or their augmentation changed",
    "loss": "an operation of the forward pass has no deterministic form, or the loss itself changed",
    "buffers": "something changed a buffer, such as BatchNorm's running statistics",
    "gradient": "all that the gradient is made of was equal, so an operation of the backward pass has no deterministic "
    "form, or something wrote to the gradients in this step (a hook, clipping, or a sum over processes)",
    "length": "the script does not stop where it stopped before",
}


def _hyperparameters(name: str) -> str:
    if name in ("lr", "tensor lr"):
        return "the schedule, or something else that sets the learning rate, gave another one for this step"
    if name == "moving optimizer":
        return "another one of the optimizers stepped here"
    return f"something changed the optimizer's hyperparameters ({name}) before this step"


def _state(step: int, found: Difference, state: StateSteps) -> str:
    if step == 0:
        return "the optimizer began with another state, such as one loaded from another file"
    if found.also:
        return "something changed the optimizer's state"
    since = f"after step {state.last_before(step)}, when it was last compared"
    return (
        f"something other than the update changed the optimizer's state {since}, or the update has no deterministic "
        "form; the weights do not show it yet"
    )


def _weights(step: int, found: Difference, state: StateSteps) -> str:
    """The rates, the hyperparameters and the gradient of the step before are equal: what else moves the weights?"""
    if step == 0:
        return "the model began with other weights: look at its initialization, or at the file that it loads"
    before, update = step - 1, "the update has no deterministic form"
    equal = f"the gradient, the learning rate and the other hyperparameters of step {before} were equal, so"
    elsewhere = "something other than the optimizer wrote to the weights"
    if "optimizer" not in found.also and (state.taken(step) or found.tensor == FINAL_WEIGHTS):
        return f"{equal} {elsewhere}, or {update}; the optimizer's state is equal"
    last = state.last_before(step)
    if last == before:
        wrote = "to the weights and the optimizer's state" if "optimizer" in found.also else "to the weights"
        return f"{equal} {update}, or something other than it wrote {wrote}; the state that it began with was equal"
    changed = f"something changed the optimizer's state after step {last}, when it was last compared"
    if "optimizer" in found.also:
        return f"{equal} {changed}, or {update}; the state differs too"
    return f"{equal} {elsewhere}, {changed}, or {update}"


def cause_before(component: str) -> int:
    """The place of a component in the order of causes; what is in no fingerprint comes last."""
    return COMPONENTS.index(component) if component in COMPONENTS else len(COMPONENTS)


def _at_fetch(stream: str) -> bool:
    return stream.startswith("fetch/")
