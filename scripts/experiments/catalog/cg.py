"""CG's experiments, figure by figure.

The paper names the models, the data, the batch size of figure 2, three seeds, and the cap of 10 on ImageNet. What it
does not say is chosen: the fixed rates, the other batch sizes, which have one seed here, the epochs, plain SGD without
weight decay, and images that are not augmented, so that the training loss can reach the 0 that the paper says it does.
"""

from __future__ import annotations

from dataclasses import replace

from figures.cg import loss_and_error, loss_and_hg, rates

from catalog.entry import Elsewhere, Experiment
from catalog.runs import Option, Run
from catalog.tiny import Tiny

TINY = Tiny(batches=32, epochs={"cifar10": 10, "imagenet": 9})

# The paper does not say how its networks start. Here each residual branch of its ResNet-50 starts at zero (Goyal et al.
# 2017), as in Flax's example of ImageNet. Otherwise the gradient's norm is 100 and more at the initial weights
# of torchvision's ResNet-50, CLR's first rate 0.0003 or less, and the loss hardly falls. The ResNet-18 needs nothing.
RESNET50: dict[str, Option] = {"model": "resnet50", "zero_init_residual": True}

SEEDS = range(3)
RATES = (0.01, 0.1, 1.0)


def cifar10(seed: int = 0, **changed: Option) -> Run:
    """CLR, or what is changed, on CIFAR-10."""
    options: dict[str, Option] = {
        "dataset": "cifar10",
        "model": "resnet18",
        "width": 1,
        "optimizer": "clr",
        "augment": False,
        "batch_size": 4096,
        "epochs": 300,
    }
    return Run("images.py", options | changed, seed)


def imagenet(seed: int = 0, **changed: Option) -> Run:
    """CLR with a cap of 10, or what is changed, on ImageNet."""
    options: dict[str, Option] = {
        "dataset": "imagenet",
        "data": "data/imagenet",
        **RESNET50,
        "width": 1,
        "batch_size": 4096,
        "epochs": 90,
        "augment": False,
    }
    clr: dict[str, Option] = {"optimizer": "clr", "max_lr": 10.0}
    return Run("images.py", options | (changed if "optimizer" in changed else clr | changed), seed)


def sgd(rate: float) -> dict[str, Option]:
    return {"optimizer": "sgd", "lr": rate, "weight_decay": 0.0}


# Figure 7 takes Hg of these, and figures 2, 4 and 9 are drawn from the same.
CLR = ("CLR", [replace(cifar10(seed), hg=True) for seed in SEEDS])
IMAGENET_CLR = ("CLR", [imagenet(seed) for seed in SEEDS])

EXPERIMENTS: list[Experiment | Elsewhere] = [
    Elsewhere(
        "cg-fig1",
        "Surfaces that are corridors, and lines of steepest descent on them.",
        ("figure", "theory", "--only", "landscapes"),
        "landscapes.png",
        "theory.md#landscapes",
    ),
    Experiment(
        "cg-fig2",
        "CLR brings the training loss of a ResNet-18 on CIFAR-10 to 0 sooner than SGD at any fixed rate of a sweep; "
        "a larger rate reaches a better test accuracy.",
        [CLR, *((f"SGD, rate {rate:g}", [cifar10(seed, **sgd(rate)) for seed in SEEDS]) for rate in RATES)],
        loss_and_error,
        TINY,
    ),
    Experiment(
        "cg-fig3",
        "CLR converges for a ResNet-50 on ImageNet whatever the batch size.",
        [
            *(("batch size {batch_size}", [imagenet(batch_size=size)]) for size in (1024, 2048)),
            ("batch size {batch_size}", IMAGENET_CLR[1]),
        ],
        loss_and_error,
        TINY,
    ),
    Experiment(
        "cg-fig4",
        "The rates that CLR takes rise at first and then decay: a warm-up that nobody set.",
        [("ResNet-18, {data_set}", CLR[1]), ("ResNet-50, at most 10, {data_set}", IMAGENET_CLR[1])],
        rates,
        TINY,
    ),
    Experiment(
        "cg-fig5",
        "CLR converges for a ResNet-50 on CIFAR-10.",
        [("CLR", [cifar10(seed, **RESNET50) for seed in SEEDS])],
        loss_and_error,
        TINY,
    ),
    Experiment(
        "cg-fig6",
        "CLR converges for a VGG on CIFAR-10.",
        [("CLR", [cifar10(seed, model="vgg16") for seed in SEEDS])],
        loss_and_error,
        TINY,
    ),
    Experiment(
        "cg-fig7",
        "The loss and the norm of Hg along a trajectory of CLR, of a ResNet-18 on CIFAR-10.",
        [CLR],
        loss_and_hg,
        TINY,
    ),
    Experiment(
        "cg-fig8",
        "CLR brings a ResNet-50 on ImageNet to a low loss sooner than SGD at fixed rates.",
        [
            IMAGENET_CLR,
            *((f"SGD, rate {rate:g}", [imagenet(seed, **sgd(rate)) for seed in SEEDS]) for rate in RATES),
        ],
        loss_and_error,
        TINY,
    ),
    Experiment(
        "cg-fig9",
        "CLR converges for a ResNet-18 on CIFAR-10 whatever the batch size.",
        [
            *(("batch size {batch_size}", [cifar10(batch_size=size)]) for size in (512, 1024, 2048)),
            ("batch size {batch_size}", CLR[1]),
        ],
        loss_and_error,
        TINY,
    ),
]
