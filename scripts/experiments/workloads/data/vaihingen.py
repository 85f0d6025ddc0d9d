"""ISPRS Vaihingen: aerial images as TIFF tiles, and their labels as colors."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomprobe.errors import UsageError
from workloads.data.files import DamagedData, Source
from workloads.data.patches import UNLABELED, Tile
from workloads.libraries import library

SOURCE = Source(
    "The Vaihingen data set of the ISPRS semantic labeling contest",
    "https://www.isprs.org/education/benchmarks/UrbanSemLab/2d-sem-label-vaihingen.aspx",
    "Unpack ISPRS_semantic_labeling_Vaihingen.zip into {root}, so that there are {root}/top/top_mosaic_09cm_area1.tif "
    "and {root}/gts_for_participants/top_mosaic_09cm_area1.tif; labels of the test tiles, from "
    "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE.zip, go beside the latter.",
)

SPLITS = {
    "train": (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26),
    "valid": (28, 30, 32, 34, 37),
    "test": (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38),
}
"""The 11, 5 and 17 areas of NWT's code; the test areas are those whose labels the contest kept back."""

COLORS = {
    (255, 255, 255): 0,
    (0, 0, 255): 1,
    (0, 255, 255): 2,
    (0, 255, 0): 3,
    (255, 255, 0): 4,
    (255, 0, 0): 5,
    (0, 0, 0): UNLABELED,
}
"""Impervious surface, building, low vegetation, tree, car, clutter, and the eroded borders of some label files."""

CLASSES = 6


def vaihingen(root: str | os.PathLike[str], split: str) -> list[Tile]:
    """The tiles of one part of Vaihingen (Cramer 2010), whole, in the order of their areas' numbers.

    NWT calls the bands RGB; in the contest's files they are near infrared, red and green.

    Args:
        root: the folder that holds ``top`` and ``gts_for_participants``.
        split: ``"train"`` (11 tiles), ``"valid"`` (5) or ``"test"`` (17).

    Returns:
        Tiles with the classes 0 to 5, for `Patches`.

    Raises:
        UsageError: an unknown split, a missing file, or Pillow is not installed.
        DamagedData: a file is no 8-bit color TIFF, or a truncated one; image and labels differ in size; or a
            label's color is none of the contest's.

    >>> vaihingen("no/such/folder", "train")
    Traceback (most recent call last):
    geomprobe.errors.UsageError: no/such/folder/top/top_mosaic_09cm_area1.tif is not there. The Vaihingen data set ...
    """
    if split not in SPLITS:
        raise UsageError(f"vaihingen(split={split!r}): the parts are {', '.join(SPLITS)}")
    folder = Path(root)
    names = [f"top_mosaic_09cm_area{area}.tif" for area in SPLITS[split]]
    paths = [
        [SOURCE.require(folder / kind / name, folder) for kind in ("top", "gts_for_participants")] for name in names
    ]
    return [read_tile(image, labels) for image, labels in paths]


def read_tile(image_path: Path, labels_path: Path) -> Tile:
    """A tile from the file of its image and that of its labels' colors.

    Raises:
        DamagedData: see `vaihingen`.
    """
    image, colors = read_tiff(image_path), read_tiff(labels_path)
    if image.shape != colors.shape:
        raise DamagedData(
            f"{labels_path}: {colors.shape[1]}x{colors.shape[0]} pixels, and its image {image_path} has "
            f"{image.shape[1]}x{image.shape[0]}"
        )
    known = np.zeros(colors.shape[:2], dtype=bool)
    labels = np.full(colors.shape[:2], UNLABELED, dtype=np.int8)
    for color, label in COLORS.items():
        here = (colors == color).all(axis=2)
        labels[here] = label
        known |= here
    if not known.all():
        row, column = np.argwhere(~known)[0]
        color = tuple(colors[row, column].tolist())
        raise DamagedData(
            f"{labels_path}: the color {color} at row {row}, column {column} stands for no class; "
            f"{np.count_nonzero(~known):,} pixels have such colors. Is it the label file?"
        )
    return Tile(image_path.name, torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(labels))


def read_tiff(path: Path) -> np.ndarray[Any, Any]:
    """Pixels uint8 [height, width, 3].

    Raises:
        DamagedData: it is no TIFF of three 8-bit bands, or a truncated one.
    """
    pillow = library("PIL.Image", "vision")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of some truncated files
            with pillow.open(path, formats=["TIFF"]) as image:
                mode, pixels = image.mode, np.array(image)
    except Exception as error:  # a damaged TIFF fails in as many ways as it has tags
        raise DamagedData(f"{path}: no TIFF image, or a truncated one: {error or type(error).__name__}") from None
    if mode != "RGB":
        raise DamagedData(f"{path}: its pixels are {mode!r}, {list(pixels.shape)}; they should be three 8-bit bands")
    return pixels
