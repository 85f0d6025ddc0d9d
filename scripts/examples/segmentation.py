"""Train a UNet or a SegNet on Vaihingen's aerial images, or on scenes of digits, which need no download.

    python scripts/examples/segmentation.py --data data/vaihingen               the UNet on Vaihingen, as NWT
    python scripts/examples/segmentation.py --data data/vaihingen --model segnet
    geomprobe record -o runs/scenes scripts/examples/segmentation.py --dataset digits --width 0.25

What is not given is as in NWT's appendix A.3 and A.4: batches of 10 random patches of 256x256 pixels, flipped and
mirrored; 10,000 patches an epoch and 1,000 for validation; SGD with momentum, rate 0.01, weight decay 1e-5; 25 epochs,
then one at a tenth of both. Scenes of digits have smaller patches, and fewer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import geomprobe

# The papers' models and data are beside the experiments.
sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

from workloads import Patches, SegNet, UNet, digit_scenes, vaihingen

PAPER = {
    "vaihingen": {"patches": 10_000, "held_out_patches": 1_000, "patch_size": 256, "workers": 4},
    "digits": {"patches": 200, "held_out_patches": 50, "patch_size": 64, "workers": 0},
}

CLASSES = {"vaihingen": 6, "digits": 11}


def make_data(options: argparse.Namespace, train: bool) -> Patches:
    """Patches of the training tiles, or of those held out: of Vaihingen, its validation tiles."""
    if options.dataset == "digits":
        tiles = digit_scenes(train=train)
    else:
        tiles = vaihingen(options.data, "train" if train else "valid")
    count = options.patches if train else options.held_out_patches
    return Patches(tiles, count=count, size=options.patch_size, flips=train)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a pixel. One pixel a row: torch's loss of whole images is not deterministic on GPUs."""
    return functional.cross_entropy(logits.movedim(1, -1).flatten(0, 2), labels.flatten())


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any], device: str) -> float:
    """Share of the held-out labeled pixels that are told right."""
    model.eval()
    right = total = 0
    for images, labels in loader:
        found = model(images.to(device)).argmax(1).cpu()
        right += int((found == labels).sum())
        total += int((labels >= 0).sum())
    model.train()
    return right / total


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=PAPER, default="vaihingen")
    parser.add_argument("--data", default="data", help="the folder that Vaihingen's folders lie in")
    parser.add_argument("--model", choices=["unet", "segnet"], default="unet")
    parser.add_argument("--width", type=float, default=1, help="factor on every channel count")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=26, help="the last one at a tenth of rate and decay")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--patches", type=int, help="in an epoch")
    parser.add_argument("--held-out-patches", type=int)
    parser.add_argument("--patch-size", type=int, help="in pixels")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(**PAPER[parser.parse_known_args()[0].dataset])
    return parser.parse_args()


def main() -> None:
    options = parse()
    loader = DataLoader(make_data(options, train=True), options.batch_size, drop_last=True, num_workers=options.workers)
    held_out = DataLoader(make_data(options, train=False), options.batch_size, num_workers=options.workers)
    make_model = {"unet": UNet, "segnet": SegNet}[options.model]
    model = make_model(CLASSES[options.dataset], width=options.width).to(options.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )

    probe = geomprobe.attach(model, optimizer)
    for epoch in probe.epochs(options.epochs):
        if epoch == options.epochs - 1:
            for group in optimizer.param_groups:
                group["lr"] /= 10
                group["weight_decay"] /= 10
        for images, labels in probe.batches(loader):
            loss = loss_of(model(images.to(options.device)), labels.to(options.device))
            optimizer.zero_grad()
            probe.backward(loss)
            optimizer.step()
        right = accuracy(model, held_out, options.device)
        print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}  held-out accuracy {right:.4f}")


if __name__ == "__main__":
    main()
