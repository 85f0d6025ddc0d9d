"""Train the papers' image classifiers: ResNets, Medium-MLP or VGG on CIFAR-10, ImageNet or digits.

    python scripts/examples/images.py --data data                                    ResNet-18 on CIFAR-10, as NWT
    python scripts/examples/images.py --dataset imagenet --data data/imagenet --model resnet50
    geomprobe record -o runs/digits scripts/examples/images.py --dataset digits --width 0.25

What is not given is as in NWT's tables 1 to 3, which differ by data set; digits, which need no download, are
trained on as CIFAR-10 is, but for fewer epochs. CG's rate is --optimizer clr.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import geomprobe
from geomprobe.corridor import CLR

# The papers' models and data are beside the experiments.
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

from workloads import cifar10, digits, imagenet, medium_mlp, resnet, vgg

PAPER: dict[str, dict[str, Any]] = {
    "cifar10": {
        "epochs": 190,
        "batch_size": 256,
        "lr": 0.01,
        "weight_decay": 1e-6,
        "warmup": None,
        "workers": 4,
    },
    "imagenet": {
        "epochs": 180,
        "batch_size": 256,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "warmup": 3,
        "workers": 8,
    },
    "digits": {
        "epochs": 20,
        "batch_size": 64,
        "lr": 0.01,
        "weight_decay": 1e-6,
        "warmup": None,
        "workers": 0,
    },
}

IMAGE_SIZE = {"cifar10": 32, "imagenet": 224, "digits": 8}


def make_data(options: argparse.Namespace, train: bool) -> Any:
    """The data set's training images, or those held out: CIFAR-10's test images, ImageNet's validation images."""
    augment = train and options.augment
    if options.dataset == "digits":
        return digits(train=train, augment=augment)
    read = {"cifar10": cifar10, "imagenet": imagenet}[options.dataset]
    return read(options.data, train=train, augment=augment)


def make_model(options: argparse.Namespace) -> nn.Module:
    size, width = IMAGE_SIZE[options.dataset], options.width
    classes = 1000 if options.dataset == "imagenet" else 10
    if options.model == "medium-mlp":
        return medium_mlp(inputs=3 * size**2, classes=classes, width=width)
    if options.model == "vgg16":
        return vgg(16, width=width, classes=classes, image_size=size)
    depth = int(options.model.removeprefix("resnet"))
    return resnet(
        depth,
        width=width,
        classes=classes,
        stem="cifar" if size <= 32 else "imagenet",
        zero_init_residual=options.zero_init_residual,
    )


def make_optimizer(options: argparse.Namespace, model: nn.Module) -> Optimizer:
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "clr":
        return CLR(model.parameters(), max_lr=options.max_lr)
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), **common)
    return torch.optim.SGD(model.parameters(), momentum=0.9 if options.optimizer == "momentum" else 0, **common)


def warmup_then_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """The rate's factor by step: up to 1 in a line over ``warmup`` steps, then a half cosine down to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return factor


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any], device: str) -> float:
    """Share of the held-out images that are told right."""
    model.eval()
    right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in loader)
    model.train()
    return right / len(loader.dataset)  # type: ignore[arg-type]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=PAPER, default="cifar10")
    parser.add_argument("--data", default="data", help="the folder that the data set lies in")
    models = ["resnet18", "resnet50", "resnet152", "medium-mlp", "vgg16"]
    parser.add_argument("--model", choices=models, default="resnet18")
    parser.add_argument("--width", type=float, default=1, help="factor on every channel count")
    parser.add_argument(
        "--zero-init-residual",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start each block of a ResNet as its shortcut",
    )
    parser.add_argument("--optimizer", choices=["sgd", "momentum", "adam", "clr"], default="momentum")
    parser.add_argument("--lr", type=float, help="of ImageNet, the greatest one")
    parser.add_argument("--max-lr", type=float, help="cap on CLR's rate; CG has 10 on ImageNet")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--warmup", type=int, help="epochs of linear warm-up, before a cosine; else constant")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**PAPER[parser.parse_known_args()[0].dataset])
    return parser.parse_args()


def main() -> None:
    options = parse()
    loader = DataLoader(
        make_data(options, train=True),
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
    )
    held_out = DataLoader(make_data(options, train=False), options.batch_size, num_workers=options.workers)
    model = make_model(options).to(options.device)
    optimizer = make_optimizer(options, model)
    scheduler = None
    if options.warmup is not None and options.optimizer != "clr":  # CLR measures its rate: there is none to schedule
        steps = len(loader)
        scheduler = LambdaLR(optimizer, warmup_then_cosine(options.warmup * steps, options.epochs * steps))

    probe = geomprobe.attach(model, optimizer, scheduler=scheduler)
    for epoch in probe.epochs(options.epochs):
        for images, labels in probe.batches(loader):
            images, labels = images.to(options.device), labels.to(options.device)
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            probe.backward(loss)
            if isinstance(optimizer, CLR):
                optimizer.step(loss=loss)
            else:
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
        right = accuracy(model, held_out, options.device)
        print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}  held-out accuracy {right:.4f}")


if __name__ == "__main__":
    main()
