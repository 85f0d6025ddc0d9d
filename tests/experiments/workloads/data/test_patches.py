"""Random patches: image and labels move together, uniformly, and by torch's generator alone."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import Patches, Tile, digit_scenes, digits

from geomprobe.errors import UsageError


def numbered(name: str, first: int, shape: tuple[int, int] = (5, 6)) -> Tile:
    """A tile whose every pixel has a number of its own, the same in image and labels."""
    count = shape[0] * shape[1]
    numbers = torch.arange(first, first + count, dtype=torch.uint8).view(shape)
    return Tile(name, numbers.expand(3, -1, -1), numbers.to(torch.int8))


TILES = [numbered("a", 0), numbered("b", 30)]


def drawn(patches: Patches, count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [patches[index % len(patches)] for index in range(count)]


def test_image_and_labels_stay_together() -> None:
    for image, labels in drawn(Patches(TILES, count=10, size=4), 50):
        assert torch.equal((image * 255).round().long(), labels.expand(3, -1, -1))
        assert image.shape == (3, 4, 4)


def test_every_place_of_every_tile_and_every_flip_is_as_likely() -> None:
    patches = Patches(TILES, count=10, size=4)
    draws = 4000
    seen = Counter(tuple(labels.flatten().tolist()) for _, labels in drawn(patches, draws))
    places = [tile.labels[y : y + 4, x : x + 4] for tile in TILES for y in range(2) for x in range(3)]
    expected = {
        tuple(turned.flatten().tolist())
        for place in places
        for turned in (place, place.flip(0), place.flip(1), place.flip(0, 1))
    }
    assert len(expected) == 48
    assert set(seen) == expected
    mean = draws / 48
    assert sum((count - mean) ** 2 / mean for count in seen.values()) < 84  # chi squared, 47 degrees: 0.1 %


def test_without_flips_patches_are_as_they_lie() -> None:
    for _, labels in drawn(Patches(TILES, count=10, size=2, flips=False), 50):
        assert (labels.diff(dim=1) == 1).all()
        assert (labels.diff(dim=0) == 6).all()


def test_they_replay_and_leave_other_generators_alone() -> None:
    patches = Patches(TILES, count=10, size=3)
    before = random.getstate(), str(np.random.get_state())
    first, second = drawn(patches, 10), drawn(patches, 10)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert before == (random.getstate(), str(np.random.get_state()))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_its_count_and_differs_from_the_next(workers: int) -> None:
    loader = DataLoader(Patches(TILES, count=10, size=2), batch_size=4, num_workers=workers)
    torch.manual_seed(0)
    epochs = [torch.cat([labels for _, labels in loader]) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [10, 10]
    assert not torch.equal(*epochs)
    torch.manual_seed(0)
    assert torch.equal(epochs[0], torch.cat([labels for _, labels in loader]))


def test_unlabeled_pixels_keep_the_label_that_cross_entropy_passes_over() -> None:
    tile = Tile(
        "a",
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        torch.tensor([[0, -100], [-100, -100]], dtype=torch.int8),
    )
    _, labels = Patches([tile], count=1, size=2, flips=False)[0]
    logits = torch.tensor([[2.0, 1.0]]).expand(4, 2)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-6)


def test_an_index_past_the_epoch_ends_it() -> None:
    assert len(list(Patches(TILES, count=3, size=2))) == 3  # type: ignore[call-overload]


@pytest.mark.parametrize(("tiles", "text"), [([], "no tiles"), ([*TILES, numbered("c", 60, (3, 9))], "c: .*3, 9")])
def test_tiles_that_give_no_patch_are_refused(tiles: list[Tile], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Patches(tiles, count=1, size=4)


def test_digit_scenes_are_the_digits_side_by_side() -> None:
    data, tiles = digits(train=True), digit_scenes(train=True)
    for number in (0, 17, 255, 256, 700):
        tile, (row, column) = tiles[number // 256], divmod(number % 256, 16)
        place = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
        assert torch.equal(tile.image[:, place[0], place[1]], data.images[number])
        ink = data.images[number][0] > 0
        expected = torch.where(ink, data.labels[number], 10)
        assert torch.equal(tile.labels[place].long(), expected)


def test_held_out_digits_are_in_no_scene_that_is_trained_on() -> None:
    held_out = {tuple(image.flatten().tolist()) for image in digits(train=False).images}
    trained = {tuple(image.flatten().tolist()) for image in digits(train=True).images}
    assert len(digits(train=True)) + len(digits(train=False)) == 1797
    assert not held_out & trained
