"""Vaihingen's TIFF tiles: colors to classes, the 11/5/17 split, and what is wrong with damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workloads import DamagedData, vaihingen
from workloads.data.vaihingen import SPLITS

from geomprobe.errors import UsageError

# As the contest's page has them: impervious surfaces, building, low vegetation, tree, car, clutter; then no label.
PALETTE = ["ffffff", "0000ff", "00ffff", "00ff00", "ffff00", "ff0000", "000000"]
VALID = (28, 30, 32, 34, 37)
SIZE = (7, 12)


def labels_of(area: int) -> np.ndarray:
    return np.random.default_rng(area).integers(7, size=SIZE)


def pixels_of(area: int) -> np.ndarray:
    return np.random.default_rng(100 + area).integers(256, size=(*SIZE, 3), dtype=np.uint8)


def colored(labels: np.ndarray) -> np.ndarray:
    palette = np.array([list(bytes.fromhex(color)) for color in PALETTE], dtype=np.uint8)
    return palette[labels]


def image_path(root: Path, area: int) -> Path:
    return root / "top" / f"top_mosaic_09cm_area{area}.tif"


def labels_path(root: Path, area: int) -> Path:
    return root / "gts_for_participants" / f"top_mosaic_09cm_area{area}.tif"


@pytest.fixture(params=["raw", "tiff_lzw"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for folder in ("top", "gts_for_participants"):
        (tmp_path / folder).mkdir()
    for area in VALID:
        Image.fromarray(pixels_of(area)).save(image_path(tmp_path, area), compression=request.param)
        Image.fromarray(colored(labels_of(area))).save(labels_path(tmp_path, area), compression=request.param)
    return tmp_path


def test_pixels_and_classes_read_back(root: Path) -> None:
    tiles = vaihingen(root, "valid")
    assert [tile.name for tile in tiles] == [f"top_mosaic_09cm_area{area}.tif" for area in VALID]
    for area, tile in zip(VALID, tiles, strict=True):
        assert torch.equal(tile.image, torch.from_numpy(pixels_of(area)).permute(2, 0, 1))
        expected = torch.from_numpy(labels_of(area))
        assert torch.equal(tile.labels.long(), torch.where(expected == 6, -100, expected))
        assert tile.labels.dtype == torch.int8


def test_the_split_is_11_5_and_17_of_33_tiles() -> None:
    assert [len(areas) for areas in SPLITS.values()] == [11, 5, 17]
    assert len({area for areas in SPLITS.values() for area in areas}) == 33
    labeled = {1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37}  # what participants were given
    assert {*SPLITS["train"], *SPLITS["valid"]} == labeled


def test_missing_tiles_say_where_to_get_them_and_where_they_go(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        vaihingen(tmp_path, "train")
    assert "https://www.isprs.org/" in str(raised.value)
    assert f"{tmp_path}/top/top_mosaic_09cm_area1.tif" in str(raised.value)


def test_a_misnamed_tile_is_found_beside_where_it_should_be(root: Path) -> None:
    labels_path(root, 32).rename(labels_path(root, 32).with_name("top_mosaic_09cm_area32_noBoundary.tif"))
    with pytest.raises(UsageError, match=r"area32\.tif is not there \(beside it: .*"):
        vaihingen(root, "valid")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the parts are train, valid, test"):
        vaihingen(tmp_path, "validation")


@pytest.mark.parametrize("kept", [0, 4, 8, 60, 150, -40, -200])
def test_a_truncated_tile_is_named(root: Path, kept: int) -> None:
    path = image_path(root, 34)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedData, match=r"area34\.tif: no TIFF image, or a truncated one"):
        vaihingen(root, "valid")


def test_an_image_of_another_format_is_named(root: Path) -> None:
    Image.fromarray(pixels_of(1)).save(image_path(root, 28), format="PNG")
    with pytest.raises(DamagedData, match=r"area28\.tif: no TIFF image"):
        vaihingen(root, "valid")


def test_a_surface_model_in_an_images_place_is_named(root: Path) -> None:
    Image.fromarray(np.zeros(SIZE, np.float32)).save(image_path(root, 28), format="TIFF")
    with pytest.raises(DamagedData, match=r"area28\.tif: its pixels are 'F', \[7, 12\]"):
        vaihingen(root, "valid")


def test_labels_of_another_size_are_named(root: Path) -> None:
    Image.fromarray(colored(labels_of(30))[:, :-1]).save(labels_path(root, 30))
    with pytest.raises(DamagedData, match=r"area30\.tif: 11x7 pixels, and its image .*area30\.tif has 12x7"):
        vaihingen(root, "valid")


def test_a_color_that_stands_for_no_class_is_named_with_its_place(root: Path) -> None:
    colors = colored(labels_of(37))
    colors[2, 5] = (254, 255, 255)
    Image.fromarray(colors).save(labels_path(root, 37))
    with pytest.raises(DamagedData, match=r"the color \(254, 255, 255\) at row 2, column 5 stands for no class; 1 p"):
        vaihingen(root, "valid")
