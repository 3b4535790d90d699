"""Images that lie in more than one split are found, by their bytes and by what they show."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from harness.base.errors import Halt
from harness.config.contracts import Preprocessing, SplitName
from harness.data.augment import IMAGENET
from harness.data.duplicates import _name, find
from harness.data.splits import items_of, load_split, load_test
from harness.datasets.image_folder import ImageFolder
from harness.final.test_set import _duplicates
from harness.garden.dataset import Garden
from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES

SIDE = 64


@pytest.fixture
def photographs(tmp_path: Path) -> ImageFolder:
    """Twelve drawn flowers; one lies in train and test, one in val is a darker, smaller copy of one in test."""
    flowers = iter([draw(species, 0, 3 * SIDE) for species in DEMO_SPECIES[:12]])
    for split in ("train", "valid", "test"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                next(flowers).save(folder / f"{split}-{number}.png")
    test = tmp_path / "test" / "a"
    (tmp_path / "train" / "a" / "again.png").write_bytes((test / "test-0.png").read_bytes())
    with Image.open(test / "test-1.png") as image:
        smaller = image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
        ImageEnhance.Brightness(smaller).enhance(0.85).save(tmp_path / "valid" / "a" / "darker.jpg", quality=80)
    return ImageFolder(root=str(tmp_path), image_size=SIDE, stored_size=SIDE + 8, cache=str(tmp_path / "cache"))


def found(data: Any, cache: Path) -> dict[str, Any]:
    images = {
        "train": load_split(data, IMAGENET, "train", margin=True).images,
        "val": load_split(data, IMAGENET, "val").images,
        "test": load_test(data, IMAGENET).images,
    }
    splits: dict[SplitName, Any] = {split: (items_of(data, split), images[split]) for split in ("train", "val", "test")}
    return find(data, splits, cache)


def test_a_copy_and_a_darker_smaller_one_are_named_and_nothing_else(photographs: ImageFolder, tmp_path: Path) -> None:
    assert found(photographs, tmp_path / "kept") == {
        "images": 14,
        "exact": [["train/a/again.png", "test/a/test-0.png"]],
        "near": [["valid/a/darker.jpg", "test/a/test-1.png"]],
    }


def test_they_are_searched_once_for_the_same_images(photographs: ImageFolder, tmp_path: Path) -> None:
    first = found(photographs, tmp_path / "kept")
    (kept,) = (tmp_path / "kept" / "duplicates").iterdir()
    kept.write_text(json.dumps(first | {"images": 99}))
    assert found(photographs, tmp_path / "kept")["images"] == 99
    (tmp_path / "test" / "a" / "test-0.png").write_bytes((tmp_path / "test" / "b" / "test-1.png").read_bytes())
    load_test.__globals__["_load"].cache_clear()
    again = found(photographs, tmp_path / "kept")
    assert (again["images"], again["exact"]) == (14, [])


def test_files_of_one_name_are_told_apart_by_their_folders_and_no_pair_is_named_twice(
    photographs: ImageFolder, tmp_path: Path
) -> None:
    """As cameras and programs number them; the two of train and test have the same bytes, in both classes."""
    for name in ("a", "b"):
        content = (tmp_path / "valid" / name / "valid-1.png").read_bytes()
        for place in ("train", "test"):
            (tmp_path / place / name / "000.png").write_bytes(content)
        (tmp_path / "valid" / name / "valid-1.png").rename(tmp_path / "valid" / name / os.fsdecode(b"\xf6\n.png"))
    exact = found(photographs, tmp_path / "kept")["exact"]
    assert [pair for pair in exact if "again" not in pair[0]] == [
        ["train/a/000.png", "valid/a/\\udcf6\\n.png"],
        ["train/a/000.png", "test/a/000.png"],
        ["train/b/000.png", "valid/b/\\udcf6\\n.png"],
        ["train/b/000.png", "test/b/000.png"],
        ["valid/a/\\udcf6\\n.png", "test/a/000.png"],
        ["valid/b/\\udcf6\\n.png", "test/b/000.png"],
    ]


def test_a_file_whose_path_does_not_say_its_split_is_named_with_it(tmp_path: Path) -> None:
    data, other = ImageFolder(root=str(tmp_path)), Garden()
    assert _name(data, "val", tmp_path / "a" / "1.png") == "a/1.png (val)"
    assert _name(data, "val", tmp_path / "Validation" / "a" / "1.png") == "Validation/a/1.png"
    assert _name(data, "val", Path("elsewhere/1.png")) == "elsewhere/1.png (val)"
    assert _name(other, "test", "a seedling") == "a seedling (test)"


@pytest.mark.slow
def test_drawn_flowers_of_one_species_are_not_taken_for_the_same(tmp_path: Path) -> None:
    data = Garden(train_per_class=8, val_per_class=8, test_per_class=8, cache=str(tmp_path))
    assert found(data, tmp_path) == {"images": 384, "exact": [], "near": []}


def test_the_frames_of_a_fixed_camera_are_not_all_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.data.duplicates.MOST", 7)
    data = Garden(train_per_class=2, val_per_class=2, test_per_class=2, cache=str(tmp_path))
    images = torch.randint(0, 255, (1, SIDE, SIDE, 3), dtype=torch.uint8).repeat(32, 1, 1, 1)
    splits: dict[SplitName, Any] = {
        split: ([item for item, _ in data.samples(split)], images) for split in ("train", "val", "test")
    }
    assert len(find(data, splits, tmp_path)["near"]) == 7


def test_pictures_of_one_colour_are_not_alike(tmp_path: Path) -> None:
    """Nothing can be said about them, and nothing is divided by zero."""
    data, plain = Garden(), torch.full((1, SIDE, SIDE, 3), 7, dtype=torch.uint8)
    names = [data.samples(split)[0][0] for split in ("train", "val", "test")]
    splits: dict[SplitName, Any] = {
        split: ([item], plain + 40 * number)
        for number, (split, item) in enumerate(zip(("train", "val", "test"), names, strict=True))
    }
    with np.errstate(all="raise"):
        assert find(data, splits, tmp_path)["near"] == []


def test_a_cache_that_cannot_be_written_or_is_damaged_stops_nothing(
    photographs: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = found(photographs, tmp_path / "kept")
    (file,) = (tmp_path / "kept" / "duplicates").iterdir()
    file.write_text("{")
    assert found(photographs, tmp_path / "kept") == right

    def refused(*arguments: object) -> None:
        raise Halt("the cache cannot be written")

    monkeypatch.setattr("harness.data.duplicates.replace_file", refused)
    assert found(photographs, tmp_path / "other") == right


@pytest.mark.parametrize("resize", [224, 256])
def test_training_images_are_compared_as_others_are_cropped(tmp_path: Path, resize: int) -> None:
    flowers = [draw(species, 1, 3 * SIDE) for species in DEMO_SPECIES]
    for split, first in (("train", 0), ("valid", 4), ("test", 8)):
        for number, flower in enumerate(flowers[first : first + 4]):
            folder = tmp_path / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            flower.save(folder / f"{split}-{number}.png")
    copies = [tmp_path / "test" / "ab"[number % 2] / f"copy-{number}.jpg" for number in range(4)]
    for flower, copy in zip(flowers, copies, strict=False):
        flower.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC).save(copy, quality=90)
    data = ImageFolder(root=str(tmp_path), image_size=SIDE, stored_size=SIDE + 8, cache=str(tmp_path / "cache"))
    pairs = _duplicates(data, load_test(data, Preprocessing(resize=resize)))["near"]
    assert sorted(second for _, second in pairs) == sorted(copy.relative_to(tmp_path).as_posix() for copy in copies)
