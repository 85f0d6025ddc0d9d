"""The gallery's page: each figure with its command, its runs, what the paper shows, and what is seen here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from catalog.entry import Elsewhere, Experiment
from catalog.runs import certified

import geomprobe

HEAD = """# The papers' experiments

Made by one command from the repository's root, which continues where it was stopped; it needs the extra `examples`:

    python scripts/experiments gallery --scale {scale}{jobs}

NWT is *No Wrong Turns*, CG is *Corridor Geometry in Gradient-Based Optimization*. The texts of the papers were at hand,
their pictures were not: where a comparison is made, it is with what text and captions say. Every run is recorded and
replayed by `python -m geomprobe`, and certified: each step equal, and the final weights bit for bit.
"""

TINY = """
At this scale each experiment is the paper's with its values, but for four things: data at hand, narrow models, fewer
epochs, smaller batches.

- *CIFAR-10 and ImageNet* are scikit-learn's 1,497 training digits of 8x8 pixels; channel counts are an eighth; NWT's
  epochs are a tenth, its batches a quarter (256 becomes 64) and its warm-up one epoch; CG's batches are a 32nd (4096
  becomes 128), its epochs 30 for CIFAR-10 and 10 for ImageNet.
- *WikiText-2* is 40,000 words of Python's standard library, a vocabulary of 1,000; the Transformer has 4 layers of 32
  features for 12 of 128; batches are a quarter (32 becomes 8).
- *Vaihingen* is scenes of digits, 200 patches an epoch of 32x32 pixels; channel counts are an eighth.

So a run has hundreds of steps where the paper's have tens of thousands. This matters: the cosine that the choice
of w* alone brings about, `(T - t)^-1/2` for a random walk of T steps (NWT eq. 8), starts at 0.05 for the 437
steps of the default on CIFAR-10, where it starts at 0.005 in the paper. It is drawn dotted in every figure of
cosines. Lines are the mean of an epoch and bands its minimum to maximum (NWT), or the mean and the range of three
seeds (CG). NWT's final epoch is left out, as in the paper.

All of it takes less than an hour of processor time, with two trainings at a time half of that on two idle cores.
"""


def page(experiments: Iterable[Experiment | Elsewhere], scale: str, root: Path, folder: Path) -> str:
    """The page, with the experiments whose figures are in its folder.

    Args:
        experiments: all of them.
        scale: that they were run at.
        root: the folder of the runs.
        folder: of the page and the figures.
    """
    drawn = [each for each in experiments if (folder / figure_of(each)).exists()]
    tiny = scale == "tiny"
    head = HEAD.format(scale=scale, jobs=" --jobs 2" if tiny else "") + (TINY if tiny else "")
    machine = f"Made with {made_with(drawn, scale, root)}.\n"
    return "\n".join([head, machine, *(section(each, scale, root) for each in drawn)])


def found() -> dict[str, str]:
    """By experiment, what somebody saw in its figure at the tiny scale: the text of found.md."""
    text = Path(__file__).with_name("found.md").read_text()
    return dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def figure_of(experiment: Experiment | Elsewhere) -> str:
    return experiment.figure if isinstance(experiment, Elsewhere) else f"{experiment.name}.png"


def section(experiment: Experiment | Elsewhere, scale: str, root: Path) -> str:
    """An experiment's heading, command, figure, and text."""
    small = " --scale tiny" if scale == "tiny" else ""
    command = f"`python scripts/experiments run {experiment.name}{small}`"
    if isinstance(experiment, Elsewhere):
        command = f"`python scripts/experiments {' '.join(experiment.command)}`"
        seen = f"see [the page of its own]({experiment.page})."
    else:
        seen = account(experiment, scale, root) + (f" {found().get(experiment.name, '')}" if scale == "tiny" else "")
    figure = f"![{experiment.name}]({figure_of(experiment)})"
    texts = [fill(text.strip(), 120) for text in (f"*The paper*: {experiment.paper}", f"*Here*: {seen}")]
    return "\n\n".join([f"## {experiment.name}", command, figure, *texts]) + "\n"


def folders_of(experiment: Experiment | Elsewhere, scale: str, root: Path) -> list[Path]:
    if isinstance(experiment, Elsewhere):
        return []
    return [root / run.name for runs in experiment.at(scale).values() for run in runs]


def account(experiment: Experiment, scale: str, root: Path) -> str:
    """How many runs and steps there are, and that they are certified."""
    folders = folders_of(experiment, scale, root)
    steps = sum(geomprobe.open_trace(folder).num_steps for folder in folders)
    proven = all(certified(folder) for folder in folders)
    word = "run" if len(folders) == 1 else "runs"
    return f"{len(folders)} {word}, {steps:,} steps{', certified' if proven else ', NOT certified'}."


def made_with(experiments: Iterable[Experiment | Elsewhere], scale: str, root: Path) -> str:
    """Software and machine of the runs, from their manifests, each once."""
    found = set()
    for experiment in experiments:
        for folder in folders_of(experiment, scale, root):
            manifest = geomprobe.open_trace(folder).manifest
            hardware, threads = manifest["hardware"], manifest["flags"]["num_threads"]
            devices = ", ".join(map(str, hardware["devices"])) or "no GPU"
            found.add(
                f"torch {manifest['software']['torch']} on {hardware['machine']} ({hardware['cpu_capability']}), "
                f"{devices}, {threads} thread{'s' * (threads > 1)} a run"
            )
    return "; ".join(sorted(found)) or "nothing but the commands below"
