"""The garden: the same flowers everywhere, species that differ, and no species told by its colour alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from harness.base.errors import InputError
from harness.garden.dataset import Garden
from harness.garden.species import DEMO_SPECIES, PRETRAINING_SPECIES
from tests.conftest import PROJECT

DRAW = """
import hashlib
from harness.garden.dataset import Garden
garden = Garden(train_per_class=1)
pixels = b"".join(garden.open(item).tobytes() for item, _ in garden.samples("train"))
print(hashlib.sha256(pixels).hexdigest())
"""


def test_two_processes_draw_the_same_pixels() -> None:
    garden = Garden(train_per_class=1)
    here = hashlib.sha256(b"".join(garden.open(item).tobytes() for item, _ in garden.samples("train"))).hexdigest()
    there = subprocess.run([sys.executable, "-c", DRAW], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_a_drawing_is_a_square_rgb_image_of_the_stored_size() -> None:
    garden = Garden(image_size=20, stored_size=31)
    image = garden.open(garden.samples("val")[0][0])
    assert image.mode == "RGB"
    assert image.size == (31, 31)


def test_the_demo_has_sixteen_species_of_different_attributes() -> None:
    assert len(Garden().classes()) == len(set(Garden().classes())) == 16
    assert len({replace(species, name="") for species in DEMO_SPECIES}) == 16


def test_pretraining_never_shows_a_species_of_the_demo() -> None:
    shown, kept = ({replace(each, name="") for each in kind} for kind in (PRETRAINING_SPECIES, DEMO_SPECIES))
    assert len(shown) == len(PRETRAINING_SPECIES) == 64
    assert not shown & kept
    assert not {each.name for each in PRETRAINING_SPECIES} & {each.name for each in DEMO_SPECIES}


def test_every_image_of_every_split_is_another() -> None:
    garden = Garden(train_per_class=3, val_per_class=3, test_per_class=3)
    items = [item for split in ("train", "val", "test") for item, _ in garden.samples(split)]
    assert len(set(items)) == len(items) == 16 * 9
    assert len({garden.stamp(item) for item in items}) == len(items)


def test_more_images_per_class_leave_the_first_ones_as_they_are() -> None:
    few, many = (Garden(train_per_class=count).samples("train") for count in (2, 5))
    assert set(few) <= set(many)


def test_another_seed_draws_other_plants() -> None:
    assert not set(Garden(seed=1).samples("train")) & set(Garden(seed=0).samples("train"))


def colours(garden: Garden, split: str, middle: bool) -> tuple[np.ndarray, np.ndarray]:
    """The mean colour of every picture, or of the square in its middle where the flower is."""
    features, labels = [], []
    for item, label in garden.samples(split):
        pixels = np.asarray(garden.open(item), dtype=float)
        if middle:
            quarter = len(pixels) // 4
            pixels = pixels[quarter:-quarter, quarter:-quarter]
        features.append(pixels.mean((0, 1)))
        labels.append(label)
    return np.array(features), np.array(labels)


@pytest.mark.slow
@pytest.mark.parametrize("middle", [False, True])
def test_colour_alone_does_not_tell_the_species(middle: bool) -> None:
    """Four species share each colour, so even a perfect judge of colour is right one time in four."""
    garden = Garden(train_per_class=15, test_per_class=15, image_size=48, stored_size=48)
    train, train_labels = colours(garden, "train", middle)
    test, test_labels = colours(garden, "test", middle)
    means = np.array([train[train_labels == label].mean(0) for label in range(16)])
    nearest = np.linalg.norm(test[:, None] - means, axis=2).argmin(1)
    assert (nearest == test_labels).mean() < 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_per_class": 0},
        {"val_per_class": -1},
        {"test_per_class": 0},
        {"image_size": 0},
        {"stored_size": 63},
        {"limit": 0},
    ],
    ids=str,
)
def test_a_bad_field_is_named(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"data\.{next(iter(wrong))}"):
        Garden(**wrong)
