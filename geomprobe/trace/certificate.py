"""The certificate of a replay: what its comparison with the recording found, and whether that is a proof."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from geomprobe.errors import RunError
from geomprobe.trace.json_values import CERTIFICATE, require_form


class FirstDifference(NamedTuple):
    """Where a replay first differed from its recording; ``rank`` is that of several processes which saw it.

    >>> print(FirstDifference(4, "rng", "step/torch"))
    step 4, rng, step/torch
    """

    step: int
    component: str
    tensor: str
    rank: int | None = None

    def __str__(self) -> str:
        return f"step {self.step}, {self.component}, {self.tensor}"


@dataclass(frozen=True)
class Certificate:
    """What a replay's comparison with the recording found; ``/certificate`` of a sealed trace.

    The replay makes it, `geomprobe.trace.seal` writes it, and every report asks it.

    Attributes:
        steps_recorded: steps of the recording.
        steps_compared: steps of the replay that were compared with it.
        steps_equal: steps before the first difference.
        final_weights_equal: whether the weights after the last step were w_T, bit for bit.
        components: what was compared in each step.
        first_difference: where the two runs first differed, or None.
        steps_attempted: steps, and attempts at one that a gradient scaler skipped.

    >>> found = Certificate.of({"steps_recorded": 3, "steps_compared": 3, "steps_equal": 3})
    >>> found.why_not(rows=3)
    'w_T is not bitwise equal'
    """

    steps_recorded: int = 0
    steps_compared: int = 0
    steps_equal: int = 0
    final_weights_equal: bool = False
    components: tuple[str, ...] = ()
    first_difference: FirstDifference | None = None
    steps_attempted: int | None = None

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Certificate:
        """The certificate that `as_json` gave; of a mapping that lacks an entry, one that holds nothing there.

        Raises:
            RunError: an entry is not what `as_json` gives.
        """
        require_form(dict(entries), CERTIFICATE, "certificate")
        known = {name: entries[name] for name in cls.__dataclass_fields__ if entries.get(name) is not None}
        if "components" in known:
            known["components"] = tuple(known["components"])
        if "first_difference" in known:
            try:
                known["first_difference"] = FirstDifference(**known["first_difference"])
            except TypeError as error:
                raise RunError("certificate.first_difference is damaged: it names no place") from error
        return cls(**known)

    def as_json(self) -> dict[str, Any]:
        """Its entries as JSON values, without those that it does not have."""
        first = self.first_difference
        place = None if first is None else {k: v for k, v in first._asdict().items() if v is not None}
        entries = {**self.__dict__, "components": list(self.components), "first_difference": place}
        return {name: value for name, value in entries.items() if value is not None}

    def write(self, file: Any) -> None:
        """Put it into an open ``h5py.File``: numbers and booleans as attributes, the rest as JSON text."""
        group = file.create_group("certificate")
        for name, value in self.as_json().items():
            group.attrs[name] = json.dumps(value) if isinstance(value, (list, dict)) else value

    @property
    def counts(self) -> str:
        """How many steps are equal.

        >>> Certificate(steps_recorded=3, steps_equal=2).counts
        '2 of 3 steps equal'
        """
        return f"{self.steps_equal} of {self.steps_recorded} steps equal"

    def why_not(self, rows: int) -> str:
        """Why a trace of ``rows`` steps is not proven to be the whole recorded run; empty where it is."""
        if not rows == self.steps_recorded == self.steps_compared == self.steps_equal:
            return f"{self.counts}, {rows} rows"
        if not self.final_weights_equal:
            return "w_T is not bitwise equal"
        return f"first difference: {self.first_difference}" if self.first_difference else ""
