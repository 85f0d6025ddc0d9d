"""ImageNet-1K from its folders of JPEGs, one folder a class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from workloads.data.files import DamagedData, Source
from workloads.libraries import library

SOURCE = Source(
    "ImageNet-1K (ILSVRC 2012)",
    "https://image-net.org/download.php",
    "It needs a login. Unpack each class of both archives into a folder of its own, {root}/train/n01440764 and so on, "
    "and {root}/val/n01440764 and so on (the validation archive is flat: "
    "https://github.com/pytorch/examples/tree/main/imagenet names a script that sorts it).",
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def imagenet(root: str | os.PathLike[str], *, train: bool, augment: bool = False) -> Dataset[tuple[Any, int]]:
    """torchvision's ``ImageFolder`` over ``root/train`` or ``root/val``, in the order of the folders' and files' names.

    Args:
        root: the folder that holds ``train`` and ``val``.
        train: the training images, else the validation images.
        augment: a random part of the image at 224x224 pixels, flipped half the time; else the image at 256
            pixels, its middle 224x224, as in PyTorch's ImageNet example.

    Returns:
        Normalized images [3, 224, 224] with their labels: the classes' places among the sorted folder names.

    Raises:
        UsageError: the folder is missing, or torchvision is not installed.
        DamagedData: there are no class folders, one is empty, or the two halves have other classes than each
            other; on fetching an image, that its file is damaged.

    >>> imagenet("no/such/folder", train=True)
    Traceback (most recent call last):
    geomprobe.errors.UsageError: no/such/folder/train is not there. ImageNet-1K (ILSVRC 2012) is to be had ...
    """
    folder = Path(root) / ("train" if train else "val")
    _require_classes(folder, Path(root))
    v2 = library("torchvision.transforms.v2", "vision")
    if augment:
        cut = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    else:
        cut = [v2.Resize(256, antialias=True), v2.CenterCrop(224)]
    steps = [
        v2.ToImage(),
        *cut,
        v2.ToDtype(torch.float32, scale=True),
        v2.ToPureTensor(),
        v2.Normalize(MEAN, STD),
    ]
    datasets = library("torchvision.datasets", "vision")
    try:
        return datasets.ImageFolder(str(folder), v2.Compose(steps), loader=read_image)
    except FileNotFoundError as error:
        raise DamagedData(f"{folder}: {error}") from None


def read_image(path: str) -> Any:
    """The image in a file, in color.

    Raises:
        DamagedData: it cannot be decoded.
    """
    pillow = library("PIL.Image", "vision")
    try:
        with pillow.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DamagedData(f"{path}: no image, or a truncated one: {error}") from None


def _require_classes(folder: Path, root: Path) -> None:
    classes = {name: _folders(SOURCE.require(root / name, root)) for name in {"train", folder.name}}
    if not classes[folder.name]:
        raise DamagedData(
            f"{folder}: no folders of classes in it, such as n01440764. {SOURCE.advice.format(root=root)}"
        )
    different = sorted(classes["train"] ^ classes[folder.name])
    if different:
        raise DamagedData(
            f"{root}: train has {len(classes['train'])} classes and val {len(classes['val'])}; only one of them has "
            f"{', '.join(different[:5])}. Labels are the places among the sorted folders, so both need the same ones."
        )


def _folders(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir()}
