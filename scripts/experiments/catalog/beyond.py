"""Experiments that neither paper has, on the questions that both leave open."""

from __future__ import annotations

from dataclasses import replace

from figures.cg import share_of_corridors

from catalog import nwt
from catalog.entry import Elsewhere, Experiment
from catalog.runs import Option, Run


def with_hg(run: Run, **changed: Option) -> Run:
    """A run trained by plain SGD, for whose steps the relative residual is meant, and replayed with Hg."""
    return replace(run, options={**run.options, "optimizer": "sgd", **changed}, hg=True)


RATES = (0.01, 0.1)

CORRIDORS = [
    *(
        (f"{name}, rate {{lr}}", [with_hg(nwt.cifar10(model=model, epochs=150), lr=rate)])
        for name, model in (("MLP", "medium-mlp"), ("ResNet", "resnet18"))
        for rate in RATES
    ),
    # Without clipping, so that g is the gradient of the loss whose Hessian is taken.
    *(("Transformer, rate {lr}", [with_hg(nwt.wikitext2(128), lr=rate, clip=1e9)]) for rate in RATES),
]

EXPERIMENTS: list[Experiment | Elsewhere] = [
    Experiment(
        "share-of-corridors",
        "CG leaves open when corridors occur in training. Drawn: left, the share of steps whose relative residual "
        "rate · ‖Hg‖ / ‖g‖ is below each threshold; middle, that below 0.1 by epoch; right, ‖Hg‖ / ‖g‖ itself.",
        CORRIDORS,
        share_of_corridors,
        nwt.TINY,
    ),
    Elsewhere(
        "clr-generalization",
        "Whether CLR generalizes as well as SGD at fixed rates, which CG's readers asked.",
        ("figure", "clr"),
        "clr_sgd.png",
        "theory.md#clr-against-sgd",
    ),
    Elsewhere(
        "held-out-gradients",
        "NWT's section 6 calls it a critical limitation that w* depends on the very gradients that are measured. "
        "Drawn: the cosine of held-out minibatches and of the whole gradient beside that of the step's own.",
        ("figure", "held-out"),
        "held_out.png",
        "../held-out.md",
    ),
    Elsewhere(
        "schedule-from-trace",
        "NWT's section 6 finds that loLR resembles the schedules in use. Drawn: trainings with one made from it.",
        ("figure", "schedule"),
        "schedule.png",
        "schedule.md",
    ),
]
