"""The models and data of the two papers' experiments, and what stands in for the data where nothing is downloaded.

The names below load on first use, and the libraries behind them (torchvision, Pillow, scikit-learn) only where
they are needed.
"""

from typing import TYPE_CHECKING

from geomprobe._package import lazy_names

if TYPE_CHECKING:
    from workloads.data.cifar10 import cifar10 as cifar10
    from workloads.data.corpus import Corpus as Corpus
    from workloads.data.corpus import columns as columns
    from workloads.data.corpus import segments as segments
    from workloads.data.digit_scenes import digit_scenes as digit_scenes
    from workloads.data.digits import digits as digits
    from workloads.data.files import DamagedData as DamagedData
    from workloads.data.imagenet import imagenet as imagenet
    from workloads.data.images import Images as Images
    from workloads.data.patches import Patches as Patches
    from workloads.data.patches import Tile as Tile
    from workloads.data.stdlib import stdlib as stdlib
    from workloads.data.vaihingen import vaihingen as vaihingen
    from workloads.data.wikitext2 import wikitext2 as wikitext2
    from workloads.gpt import GPT as GPT
    from workloads.perceptron import medium_mlp as medium_mlp
    from workloads.resnets import resnet as resnet
    from workloads.segnet import SegNet as SegNet
    from workloads.transformer import WordTransformer as WordTransformer
    from workloads.unet import UNet as UNet
    from workloads.vggs import vgg as vgg

__getattr__, __dir__ = lazy_names(__name__)
