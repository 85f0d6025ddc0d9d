"""CIFAR-10's pickle batches, as Python 2 wrote them, and what is wrong with damaged ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import python2_pickle
from workloads import DamagedData, cifar10
from workloads.data.cifar10 import MEAN, STD

from geomprobe.errors import UsageError

NAMES = [f"data_batch_{i}" for i in range(1, 6)]


def batch(number: int, count: int = 3) -> dict[bytes, Any]:
    random = np.random.default_rng(number)
    return {
        b"batch_label": b"training batch %d of 5" % number,
        b"labels": random.integers(10, size=count).tolist(),
        b"data": random.integers(256, size=(count, 3072), dtype=np.uint8),
        b"filenames": [b"leptodactylus_pentadactylus_s_%06d.png" % i for i in range(count)],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(NAMES, 1):
        (folder / name).write_bytes(python2_pickle.dumps(batch(number)))
    (folder / "test_batch").write_bytes(python2_pickle.dumps(batch(6, count=2)))
    return tmp_path


def test_images_and_labels_come_in_the_files_order(root: Path) -> None:
    data = cifar10(root, train=True, published=False)
    pixels = np.concatenate([batch(number)[b"data"] for number in range(1, 6)])
    labels = [label for number in range(1, 6) for label in batch(number)[b"labels"]]
    assert [label for _, label in data] == labels  # type: ignore[attr-defined]
    for index, row in enumerate(pixels):
        image = data[index][0]
        red, green, blue = row.reshape(3, 32, 32)  # row by row, a color at a time
        for channel, expected in enumerate((red, green, blue)):
            found = image[channel] * STD[channel] + MEAN[channel]
            np.testing.assert_allclose(found * 255, expected, atol=1e-3)
    assert len(cifar10(root, train=False, published=False)) == 2


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_written_by_python_3_are_read_too(root: Path, protocol: int) -> None:
    path = root / "cifar-10-batches-py" / "test_batch"
    before = cifar10(root, train=False, published=False)
    path.write_bytes(pickle.dumps(batch(6, count=2), protocol=protocol))
    after = cifar10(root, train=False, published=False)
    assert torch.equal(before.images, after.images)
    assert torch.equal(before.labels, after.labels)


def test_augmented_images_are_crops_drawn_from_torchs_generator(root: Path) -> None:
    plain = cifar10(root, train=True, published=False)
    data = cifar10(root, train=True, augment=True, published=False)
    torch.manual_seed(0)
    first = [data[0][0] for _ in range(20)]
    torch.manual_seed(0)
    assert all(torch.equal(image, data[0][0]) for image in first)
    black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(STD)
    padded = black[:, None, None].expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = plain[0][0]
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    places = {i for image in first for i, window in enumerate(windows) if torch.allclose(window, image)}
    assert all(any(torch.allclose(window, image) for window in windows) for image in first)
    assert len(places) > 10


def test_the_published_checksums_are_asked_for(root: Path) -> None:
    with pytest.raises(DamagedData, match=r"data_batch_1: its MD5 is \w{32}, the published file's is c99cafc1"):
        cifar10(root, train=True)


def test_a_missing_folder_says_where_to_get_it_and_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        cifar10(tmp_path, train=False)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in str(raised.value)
    assert f"so that {tmp_path}/cifar-10-batches-py holds data_batch_1" in str(raised.value)


def test_a_misnamed_file_is_found_beside_where_it_should_be(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    (folder / "test_batch").rename(folder / "test_batch.bin")
    with pytest.raises(UsageError, match=r"test_batch is not there \(beside it: .*test_batch\.bin"):
        cifar10(root, train=False)


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 5000, -1])
def test_a_truncated_file_is_named(root: Path, kept: int) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedData, match="data_batch_3: no CIFAR-10 batch, or a truncated one"):
        cifar10(root, train=True, published=False)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {b"data": np.zeros((3, 1024), np.uint8)},
            r"data is uint8 \[3, 1024\], and should be uint8 \[count, 3072\]",
        ),
        ({b"data": np.zeros((3, 3072), np.float32)}, r"data is float32"),
        ({b"data": np.zeros((3, 3, 32, 32), np.uint8)}, r"\[3, 3, 32, 32\]"),
        ({b"labels": [1, 2]}, r"labels are int64 \[2\], and should be 3 of 0 to 9"),
        ({b"labels": [1, 2, 10]}, r"should be 3 of 0 to 9"),
        ({b"labels": [b"a", b"b", b"c"]}, r"should be 3 of 0 to 9"),
    ],
)
def test_a_wrong_shape_is_named(root: Path, changes: dict[bytes, Any], text: str) -> None:
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(python2_pickle.dumps(batch(6) | changes))
    with pytest.raises(DamagedData, match=f"test_batch: .*{text}"):
        cifar10(root, train=False, published=False)


def test_cifar_100s_labels_are_told_from_cifar_10s(root: Path) -> None:
    of_100 = batch(6)
    of_100[b"fine_labels"] = of_100.pop(b"labels")
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(python2_pickle.dumps(of_100))
    with pytest.raises(DamagedData, match="no b'labels' in it"):
        cifar10(root, train=False, published=False)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_a_pickle_that_would_run_code_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch(6) | {b"more": Evil()}))
    with pytest.raises(DamagedData, match=r"it asks for posix\.mkdir, where only arrays belong"):
        cifar10(root, train=False, published=False)
    assert not (tmp_path / "evil").exists()
