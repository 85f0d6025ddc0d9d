"""How the papers' runs become small: data at hand in place of theirs, narrow models, few epochs, small batches.

All else is as in the paper: the optimizers and their rates, the schedules, the ratios of widths and of batch sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from catalog.runs import Run

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Models as small as these are fastest on one thread, and two of them then have a core each."""

WIDTH = 1 / 8
MLP_WIDTH = 17 / 128
"""Medium-MLP's, so that it has as many parameters as ResNet-18-2 on digits: 703 thousand, and 701 thousand."""

STEPS = {"cifar10": 50_000 // 256, "digits": 1_497 // 64}
"""In an epoch at NWT's default batch size, and at its quarter."""

LANGUAGE = {"corpus": "stdlib", "vocabulary": 1_000, "train_words": 40_000}
TRANSFORMER = {"features": 32, "hidden": 32, "layers": 4}
SCENES = {"dataset": "digits", "patch_size": 32, "patches": 200, "held_out_patches": 50}


@dataclass(frozen=True)
class Tiny:
    """A paper's scale.

    Attributes:
        batches: what batch sizes are divided by.
        epochs: what numbers of epochs are divided by, for each data set of images.
    """

    batches: int
    epochs: Mapping[str, int]

    def shrink(self, run: Run) -> Run:
        """The small run that stands for a paper's.

        >>> paper = Run("images.py", {"dataset": "cifar10", "width": 2, "batch_size": 256, "epochs": 190})
        >>> " ".join(Tiny(4, {"cifar10": 10}).shrink(paper).arguments)
        '--dataset digits --width 0.25 --batch-size 64 --epochs 19'
        """
        shrink = {"images.py": self._images, "language.py": self._language}
        options = shrink.get(run.script, self._scenes)(dict(run.options))
        steps = tuple(step * STEPS["digits"] // (STEPS["cifar10"] * 10) for step in run.reference_steps)
        return replace(run, options=options, reference_steps=steps)

    def _images(self, options: dict[str, Any]) -> dict[str, Any]:
        factor = MLP_WIDTH if options.get("model") == "medium-mlp" else WIDTH
        small = {
            **options,
            "dataset": "digits",
            "width": options.get("width", 1) * factor,
            "batch_size": options["batch_size"] // self.batches,
            "epochs": options["epochs"] // self.epochs[options["dataset"]],
        }
        small.pop("data", None)
        return small | ({"warmup": 1} if "warmup" in options else {})

    def _language(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, **LANGUAGE, **TRANSFORMER, "batch_size": options["batch_size"] // self.batches}

    def _scenes(self, options: dict[str, Any]) -> dict[str, Any]:
        small = {**options, **SCENES, "width": WIDTH}
        small.pop("data", None)
        return small
