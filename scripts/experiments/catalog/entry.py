"""What an experiment is: a figure of a paper, the runs behind it, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog.runs import Run
from catalog.tiny import ENVIRONMENT, Tiny

Lines = Mapping[str, Sequence[Path]]
"""The folders of the runs that each line of a figure is drawn from, by its label; several are seeds."""


@dataclass(frozen=True)
class Experiment:
    """A figure, and what it is drawn from.

    Attributes:
        name: of the experiment, by its figure.
        paper: what the paper draws, and what it states about it.
        lines: their labels, where ``{option}`` and ``{data_set}`` are filled in, and the paper's runs of each.
        draw: the figure of the lines.
        tiny: how the runs become small.
    """

    name: str
    paper: str
    lines: Sequence[tuple[str, Sequence[Run]]]
    draw: Callable[[Lines], Any]
    tiny: Tiny

    def at(self, scale: str) -> dict[str, list[Run]]:
        """The runs of each line, by its label, at the scale ``"paper"`` or ``"tiny"``."""
        found = {}
        for label, papers in self.lines:
            runs = [self.tiny.shrink(run) for run in papers] if scale == "tiny" else list(papers)
            found[label.format(**runs[0].options, data_set=runs[0].data_set)] = runs
        return found


@dataclass(frozen=True)
class Elsewhere:
    """A figure that the verb ``figure`` draws from trainings of its own, and another page shows.

    Attributes:
        name: of the experiment.
        paper: what the paper draws, and what it states about it.
        command: the words after ``python scripts/experiments``; its option ``-o`` is the folder of the figure.
        figure: the figure's file.
        page: where to read what it shows.
    """

    name: str
    paper: str
    command: Sequence[str]
    figure: str
    page: str


SCALES: dict[str, Mapping[str, str]] = {"paper": {}, "tiny": ENVIRONMENT}
"""By name, what a scale sets in the environment of its runs."""
