"""NWT's experiments, figure by figure, with the values of its tables 1 to 5 and appendix A.4."""

from __future__ import annotations

import math

from figures.nwt import (
    distances,
    distances_by_scenario,
    epoch_budgets,
    overlay,
    rate_and_schedule,
    scenarios,
)

from catalog.entry import Elsewhere, Experiment
from catalog.runs import Option, Run
from catalog.tiny import STEPS, Tiny

TINY = Tiny(batches=4, epochs={"cifar10": 10, "imagenet": 10})


def cifar10(seed: int = 0, reference_steps: tuple[int, ...] = (), **changed: Option) -> Run:
    """Appendix A.4's default on CIFAR-10, but for what is changed."""
    options: dict[str, Option] = {
        "dataset": "cifar10",
        "model": "resnet18",
        "width": 1,
        "optimizer": "momentum",
        "lr": 0.01,
        "weight_decay": 1e-6,
        "batch_size": 256,
        "epochs": 190,
    }
    return Run("images.py", options | changed, seed, reference_steps)


def imagenet(model: str, width: float) -> Run:
    """Table 3: three epochs of warm-up to a rate of 0.1, then a cosine."""
    options: dict[str, Option] = {
        "dataset": "imagenet",
        "data": "data/imagenet",
        "model": model,
        "width": width,
        "optimizer": "momentum",
        "lr": 0.1,
        "warmup": 3,
        "weight_decay": 1e-4,
        "batch_size": 256,
        "epochs": 180,
    }
    return Run("images.py", options)


def wikitext2(batch_size: int) -> Run:
    """Table 4: a rate of 1e-4 at a batch size of 32, which grows with its square root."""
    options: dict[str, Option] = {
        "optimizer": "adam",
        "lr": 1e-4 * math.sqrt(batch_size / 32),
        "weight_decay": 1e-5,
        "batch_size": batch_size,
        "epochs": 20,
    }
    return Run("language.py", options)


def vaihingen(model: str) -> Run:
    """Table 5: 25 epochs, and one at a tenth of rate and decay."""
    options: dict[str, Option] = {
        "data": "data/vaihingen",
        "model": model,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "batch_size": 10,
        "epochs": 26,
    }
    return Run("segmentation.py", options)


OPTIMIZERS = [
    ("SGD", [cifar10(optimizer="sgd", lr=0.001)]),
    ("momentum", [cifar10(lr=0.001)]),
    ("Adam", [cifar10(optimizer="adam", lr=0.001)]),
]
RESNETS = [
    ("ResNet-18-1", [imagenet("resnet18", 1)]),
    ("ResNet-18-2", [imagenet("resnet18", 2)]),
    ("ResNet-50-1", [imagenet("resnet50", 1)]),
    ("ResNet-50-2", [imagenet("resnet50", 2)]),
    ("ResNet-152-0.5", [imagenet("resnet152", 0.5)]),
    ("ResNet-152-1", [imagenet("resnet152", 1)]),
]
WIKITEXT2 = [("batch size {batch_size}", [wikitext2(size)]) for size in (32, 64, 128, 256)]
VAIHINGEN = [("UNet", [vaihingen("unet")]), ("SegNet", [vaihingen("segnet")])]
SCENARIOS = [
    ("ResNet-18, constant rate, {data_set}", [cifar10()]),
    ("ResNet-50, warm-up and cosine, {data_set}", [imagenet("resnet50", 1)]),
    ("Transformer, {data_set}", [wikitext2(32)]),
]
SEEDS = [(f"seed {seed}", [cifar10(seed)]) for seed in range(3)]
CIFAR10_BATCHES = [
    ("batch size {batch_size}", [cifar10(batch_size=size, lr=0.005 * math.sqrt(size / 64))])
    for size in (64, 128, 256, 512)
]
BUDGETS = [("budgets", [cifar10(0, tuple(epochs * STEPS["cifar10"] for epochs in (100, 190)), epochs=280)])]
MODELS = [
    ("Medium-MLP", [cifar10(model="medium-mlp", epochs=150)]),
    ("ResNet-18-2", [cifar10(width=2, epochs=150)]),
]

EXPERIMENTS: list[Experiment | Elsewhere] = [
    Experiment(
        "nwt-fig1-batch-size",
        "The cosine of a Transformer on WikiText-2 is positive and steady, and the higher the larger the batch.",
        WIKITEXT2,
        overlay("cosine"),
        TINY,
    ),
    Experiment(
        "nwt-fig1-optimizer",
        "The cosine of a ResNet-18 on CIFAR-10 is positive with each optimizer, and lowest with Adam.",
        OPTIMIZERS,
        overlay("cosine"),
        TINY,
    ),
    Experiment(
        "nwt-fig1-depth-width",
        "The cosine of ResNets on ImageNet is almost always positive and steady, whatever the depth and width.",
        RESNETS,
        overlay("cosine"),
        TINY,
    ),
    Experiment(
        "nwt-fig1-architecture",
        "The cosine of a UNet and of a SegNet on Vaihingen is positive and steady.",
        VAIHINGEN,
        overlay("cosine"),
        TINY,
    ),
    Experiment(
        "nwt-fig2",
        "On CIFAR-10, which the model interpolates, RSI and EB stay bounded to the end; on ImageNet and WikiText-2, "
        "where it does not, both rise. The cosine is almost always positive.",
        SCENARIOS,
        scenarios,
        TINY,
    ),
    Experiment(
        "nwt-fig3-architecture",
        "loLR (equation 5) of various architectures on CIFAR-10.",
        [("ResNet-18-1", [cifar10()]), *MODELS],
        overlay("lolr"),
        TINY,
    ),
    Experiment(
        "nwt-fig3-batch-size",
        "loLR of a Transformer on WikiText-2 falls about linearly, and is higher for larger batches.",
        WIKITEXT2,
        overlay("lolr"),
        TINY,
    ),
    Experiment(
        "nwt-fig3-schedule",
        "Section 6 on ImageNet: loLR mirrors the linear warm-up and the cosine that are in use, but for a sharper "
        "decrease right after the warm-up.",
        [SCENARIOS[1]],
        rate_and_schedule,
        TINY,
    ),
    Experiment(
        "nwt-fig4-seed",
        "The cosine of a ResNet-18 on CIFAR-10 hardly depends on the seed.",
        SEEDS,
        overlay("cosine"),
        TINY,
    ),
    Experiment(
        "nwt-fig4-epochs",
        "The cosine depends little on the budget of epochs, until the end comes near.",
        BUDGETS,
        epoch_budgets,
        TINY,
    ),
    Elsewhere(
        "nwt-fig5",
        "On the objectives ALM and SM, RSI and the cosine are erratic and often negative.",
        ("figure", "theory", "--only", "counterexamples"),
        "counterexamples.png",
        "theory.md#objectives-without-beneficial-geometry",
    ),
    Experiment(
        "nwt-fig6",
        "The cosine of a ResNet-18 on CIFAR-10 grows with the batch size.",
        CIFAR10_BATCHES,
        overlay("cosine"),
        TINY,
    ),
    Experiment(
        "nwt-fig7",
        "RSI and EB of figure 1's Transformers by batch size.",
        WIKITEXT2,
        overlay("rsi", "eb"),
        TINY,
    ),
    Experiment(
        "nwt-fig8",
        "RSI and EB of figure 1's ResNet-18 by optimizer.",
        OPTIMIZERS,
        overlay("rsi", "eb"),
        TINY,
    ),
    Experiment(
        "nwt-fig9",
        "RSI and EB of figure 1's ResNets by depth and width.",
        RESNETS,
        overlay("rsi", "eb"),
        TINY,
    ),
    Experiment(
        "nwt-fig10",
        "RSI and EB by seed. The caption says ImageNet, but also that it complements figure 4, whose runs, as table "
        "2's, are on CIFAR-10; these are taken here.",
        SEEDS,
        overlay("rsi", "eb"),
        TINY,
    ),
    Experiment(
        "nwt-fig11",
        "RSI and EB of figure 1's UNet and SegNet.",
        VAIHINGEN,
        overlay("rsi", "eb"),
        TINY,
    ),
    Experiment(
        "nwt-fig12",
        "On the way to the final weights Adam travels farther than SGD and momentum do, and at a steadier pace.",
        OPTIMIZERS,
        distances,
        TINY,
    ),
    Experiment(
        "nwt-fig13",
        "The distance from the final weights in figure 2's scenarios; on ImageNet, where the rate decays, it is "
        "negligible over the last 25 epochs of 180.",
        SCENARIOS,
        distances_by_scenario,
        TINY,
    ),
    Experiment(
        "nwt-fig14",
        "The cosine of a wide perceptron of four layers is steadier than that of a ResNet-18-2 of as many parameters.",
        MODELS,
        overlay("cosine"),
        TINY,
    ),
]
