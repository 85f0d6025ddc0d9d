"""The models and data of the two papers' experiments, and what stands in for the data where nothing is downloaded.

The names below load on first use, and the libraries behind them (torchvision, Pillow, scikit-learn) only where
they are needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workloads.data.cifar10 import cifar10
    from workloads.data.corpus import Corpus, columns, segments
    from workloads.data.digit_scenes import digit_scenes
    from workloads.data.digits import digits
    from workloads.data.files import DamagedData
    from workloads.data.imagenet import imagenet
    from workloads.data.images import Images
    from workloads.data.patches import Patches, Tile
    from workloads.data.stdlib import stdlib
    from workloads.data.vaihingen import vaihingen
    from workloads.data.wikitext2 import wikitext2
    from workloads.gpt import GPT
    from workloads.perceptron import medium_mlp
    from workloads.resnets import resnet
    from workloads.segnet import SegNet
    from workloads.transformer import WordTransformer
    from workloads.unet import UNet
    from workloads.vggs import vgg

_HOMES = {
    "Corpus": "data.corpus",
    "DamagedData": "data.files",
    "GPT": "gpt",
    "Images": "data.images",
    "Patches": "data.patches",
    "SegNet": "segnet",
    "Tile": "data.patches",
    "UNet": "unet",
    "WordTransformer": "transformer",
    "cifar10": "data.cifar10",
    "columns": "data.corpus",
    "digit_scenes": "data.digit_scenes",
    "digits": "data.digits",
    "imagenet": "data.imagenet",
    "medium_mlp": "perceptron",
    "resnet": "resnets",
    "segments": "data.corpus",
    "stdlib": "data.stdlib",
    "vaihingen": "data.vaihingen",
    "vgg": "vggs",
    "wikitext2": "data.wikitext2",
}

__all__ = [
    "GPT",
    "Corpus",
    "DamagedData",
    "Images",
    "Patches",
    "SegNet",
    "Tile",
    "UNet",
    "WordTransformer",
    "cifar10",
    "columns",
    "digit_scenes",
    "digits",
    "imagenet",
    "medium_mlp",
    "resnet",
    "segments",
    "stdlib",
    "vaihingen",
    "vgg",
    "wikitext2",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workloads' has no attribute {name!r}")
    return getattr(import_module(f"workloads.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
