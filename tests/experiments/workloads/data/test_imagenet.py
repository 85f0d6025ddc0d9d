"""ImageNet's folders of JPEGs: labels by sorted names, crops from torch's generator, clear errors."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workloads import DamagedData, imagenet

from geomprobe.errors import UsageError

COLORS = {"n02": (250, 10, 10), "n01": (10, 250, 10), "n03": (10, 10, 250)}
MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def write(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, quality=95)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for half in ("val", "train"):
        for name, color in COLORS.items():  # not in the order of their names
            for number in (2, 1):
                write(tmp_path / half / name / f"{name}_{number}.JPEG", color)
    return tmp_path


@pytest.mark.parametrize("train", [True, False])
def test_labels_are_places_among_the_sorted_folders(root: Path, train: bool) -> None:
    data = imagenet(root, train=train)
    found = [(image, label) for image, label in (data[i] for i in range(6))]
    assert [label for _, label in found] == [0, 0, 1, 1, 2, 2]
    for image, label in found:
        expected = torch.tensor(COLORS[f"n0{label + 1}"]) / 255
        assert image.shape == (3, 224, 224)
        assert type(image) is torch.Tensor
        color = image.mean((1, 2)) * STD + MEAN
        torch.testing.assert_close(color, expected, atol=0.02, rtol=0)


def test_gray_images_come_in_color(root: Path) -> None:
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(root / "train" / "n01" / "n01_1.JPEG")
    assert imagenet(root, train=True)[0][0].shape == (3, 224, 224)


def test_augmentation_draws_from_torchs_generator_alone(root: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train" / "n01" / "n01_1.JPEG")
    data = imagenet(root, train=True, augment=True)
    states = random.getstate(), str(np.random.get_state())
    torch.manual_seed(0)
    first = [data[0][0] for _ in range(3)]
    torch.manual_seed(0)
    assert all(torch.equal(image, data[0][0]) for image in first)
    assert not torch.equal(first[0], first[1])
    assert states == (random.getstate(), str(np.random.get_state()))


def test_missing_data_says_where_to_get_it_and_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        imagenet(tmp_path, train=True)
    assert "https://image-net.org/download.php" in str(raised.value)
    assert f"{tmp_path}/train/n01440764" in str(raised.value)


def test_the_flat_validation_archive_is_recognized(root: Path) -> None:
    shutil.rmtree(root / "val")
    write(root / "val" / "ILSVRC2012_val_00000001.JPEG", (1, 2, 3))
    with pytest.raises(DamagedData, match=r"val: no folders of classes in it, .* a script that sorts it"):
        imagenet(root, train=False)


def test_halves_with_other_classes_are_refused(root: Path) -> None:
    shutil.rmtree(root / "val" / "n02")
    with pytest.raises(DamagedData, match="train has 3 classes and val 2; only one of them has n02"):
        imagenet(root, train=False)


def test_an_empty_class_is_named(root: Path) -> None:
    (root / "train" / "n03" / "n03_1.JPEG").unlink()
    (root / "train" / "n03" / "n03_2.JPEG").rename(root / "train" / "n03" / "n03_2.txt")
    with pytest.raises(DamagedData, match=r"train: .*n03"):
        imagenet(root, train=True)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0", b"<html>not found</html>", None])
def test_a_damaged_file_is_named(root: Path, content: bytes | None) -> None:
    path = root / "train" / "n01" / "n01_1.JPEG"
    write(path, (1, 200, 3), (300, 300))
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(DamagedData, match=r"n01_1\.JPEG: no image, or a truncated one"):
        imagenet(root, train=True)[0]
