"""Folders of photographs: layouts, the split by content, class names, and an error for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.data.image_folder import ImageFolder
from harness.errors import InputError

SPLITS = ("train", "val", "test")


def plant(folder: Path, count: int, first: int = 0) -> None:
    """`count` tiny images in `folder`, all of different colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        colour = (number % 256, number // 256, len(folder.name))
        Image.new("RGB", (4, 4), colour).save(folder / f"{number:04}.png")


@pytest.fixture
def split_root(tmp_path: Path) -> Path:
    """train/, valid/ and test/ with the classes 1, 2 and 10."""
    for start, split in enumerate(("train", "valid", "test")):
        for name in ("1", "2", "10"):
            plant(tmp_path / "photos" / split / name, 2, first=1000 * start)
    return tmp_path / "photos"


@pytest.fixture
def flat_root(tmp_path: Path) -> Path:
    """Class folders alone: 20 daisies and 40 roses."""
    plant(tmp_path / "photos" / "daisy", 20)
    plant(tmp_path / "photos" / "rose", 40, first=500)
    return tmp_path / "photos"


def contents(root: Path, split: Any) -> Counter[tuple[bytes, int]]:
    return Counter((path.read_bytes(), label) for path, label in ImageFolder(root=str(root)).samples(split))


# --- layouts ---


@pytest.mark.parametrize("name", ["valid", "val"])
def test_the_split_folders_decide_the_split(split_root: Path, name: str) -> None:
    (split_root / "valid").rename(split_root / name)
    data = ImageFolder(root=str(split_root))
    for split, folder in zip(SPLITS, ("train", name, "test"), strict=True):
        samples = data.samples(split)
        assert Counter(label for _, label in samples) == {0: 2, 1: 2, 2: 2}
        assert all(path.parent.parent == split_root / folder for path, _ in samples)
        assert all(path.parent.name == data.classes()[label] for path, label in samples)


def test_classes_come_in_text_order(split_root: Path) -> None:
    assert ImageFolder(root=str(split_root)).classes() == ("1", "10", "2")


def test_hidden_files_and_folders_are_no_images(split_root: Path) -> None:
    (split_root / "train" / "1" / ".DS_Store").write_text("")
    (split_root / "train" / ".cache").mkdir()
    assert ImageFolder(root=str(split_root)).classes() == ("1", "10", "2")
    assert len(ImageFolder(root=str(split_root)).samples("train")) == 6


def test_extensions_count_in_any_case(split_root: Path) -> None:
    photo = next((split_root / "train" / "1").iterdir())
    photo.rename(photo.with_suffix(".PNG"))
    assert len(ImageFolder(root=str(split_root)).samples("train")) == 6


# --- the split by content ---


def test_class_folders_are_split_70_15_15_within_each_class(flat_root: Path) -> None:
    data = ImageFolder(root=str(flat_root))
    shares = {split: Counter(label for _, label in data.samples(split)) for split in SPLITS}
    assert shares == {"train": {0: 14, 1: 28}, "val": {0: 3, 1: 6}, "test": {0: 3, 1: 6}}


@pytest.mark.parametrize("count", [6, 7, 9, 10, 13, 21, 99])
def test_the_three_parts_are_disjoint_and_complete(tmp_path: Path, count: int) -> None:
    plant(tmp_path / "photos" / "daisy", count)
    plant(tmp_path / "photos" / "rose", count, first=500)
    data = ImageFolder(root=str(tmp_path / "photos"))
    parts = [{path for path, _ in data.samples(split)} for split in SPLITS]
    assert sum(map(len, parts)) == 2 * count
    assert set.union(*parts) == {path for path in (tmp_path / "photos").rglob("*.png")}
    assert abs(len(parts[0]) - 0.70 * 2 * count) <= 2


def test_renaming_and_moving_the_files_changes_nothing(flat_root: Path, tmp_path: Path) -> None:
    before = {split: contents(flat_root, split) for split in SPLITS}
    other = shutil.copytree(flat_root, tmp_path / "elsewhere")
    for path in [*other.rglob("*.png")]:
        path.rename(path.with_name(f"{path.read_bytes()[-20:].hex()}-{9999 - int(path.stem)}.png"))
    assert {split: contents(other, split) for split in SPLITS} == before


# --- class names ---


def test_a_json_file_names_the_classes(split_root: Path) -> None:
    (split_root / "names.json").write_text(json.dumps({"1": "rosé", "2": "daisy", "10": "iris", "11": "unused"}))
    assert ImageFolder(root=str(split_root), names="names.json").classes() == ("rosé", "iris", "daisy")


def test_the_names_may_lie_anywhere(split_root: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"1": "rose", "2": "daisy", "10": "iris"}))
    data = ImageFolder(root=str(split_root), names=str(tmp_path / "names.json"))
    assert data.classes() == ("rose", "iris", "daisy")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"1"', '{"1": 5, "2": "a", "10": "b"}', "\xff"],
    ids=["empty", "cut", "list", "text", "number", "not utf-8"],
)
def test_a_bad_names_file_is_named(split_root: Path, text: str) -> None:
    (split_root / "names.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"names\.json"):
        ImageFolder(root=str(split_root), names="names.json").classes()


def test_a_missing_names_file_is_named(split_root: Path) -> None:
    with pytest.raises(InputError, match=r"names\.json"):
        ImageFolder(root=str(split_root), names="names.json").classes()


def test_a_class_without_a_name_is_named(split_root: Path) -> None:
    (split_root / "names.json").write_text(json.dumps({"1": "rose", "2": "daisy"}))
    with pytest.raises(InputError, match=r"names\.json names no class '10'"):
        ImageFolder(root=str(split_root), names="names.json").classes()


# --- bad folders: each message names the place ---


def complaint(root: Path) -> str:
    data = ImageFolder(root=str(root))
    with pytest.raises(InputError) as caught:
        [data.samples(split) for split in SPLITS]
    return str(caught.value)


def test_a_missing_root(tmp_path: Path) -> None:
    message = complaint(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "--data-root" in message


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "photos").write_text("")
    assert str(tmp_path / "photos") in complaint(tmp_path / "photos")


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_classes(tmp_path: Path, count: int) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(count):
        plant(tmp_path / "photos" / f"class-{number}", 10)
    held = ("no class folders", "one class folder, 'class-0'")[count]
    assert f"{tmp_path / 'photos'} holds {held}" in complaint(tmp_path / "photos")


@pytest.mark.parametrize("folder", ["valid", "test"])
def test_a_missing_split_folder(split_root: Path, folder: str) -> None:
    shutil.rmtree(split_root / folder)
    message = complaint(split_root)
    assert str(split_root) in message
    assert f"{folder}/" in message


@pytest.mark.parametrize("folder", ["train", "valid", "test"])
def test_a_class_without_images_in_a_split(split_root: Path, folder: str) -> None:
    for path in (split_root / folder / "2").iterdir():
        path.unlink()
    assert str(split_root / folder / "2") in complaint(split_root)


@pytest.mark.parametrize("folder", ["valid", "test"])
def test_a_class_folder_missing_from_a_split(split_root: Path, folder: str) -> None:
    shutil.rmtree(split_root / folder / "2")
    assert str(split_root / folder / "2") in complaint(split_root)


@pytest.mark.parametrize("folder", ["valid", "test"])
def test_a_class_that_train_lacks(split_root: Path, folder: str) -> None:
    plant(split_root / folder / "mystery", 1)
    message = complaint(split_root)
    assert str(split_root / folder) in message
    assert "'mystery'" in message


def test_a_file_that_is_no_image_by_its_name(split_root: Path) -> None:
    (split_root / "valid" / "2" / "notes.txt").write_text("watered")
    assert str(split_root / "valid" / "2" / "notes.txt") in complaint(split_root)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_class_too_small_to_be_split(flat_root: Path, count: int) -> None:
    plant(flat_root / "tulip", count)
    assert str(flat_root / "tulip") in complaint(flat_root)


def test_pictures_in_a_folder_inside_of_a_class(split_root: Path) -> None:
    plant(split_root / "train" / "2" / "more", 1)
    message = complaint(split_root)
    assert str(split_root / "train" / "2" / "more") in message
    assert "move them up" in message


@pytest.mark.parametrize("place", ["train/2/lost.png", "train/3", "valid/3", "train"])
def test_a_link_to_nothing(split_root: Path, place: str) -> None:
    if place == "train":  # else valid/ and test/ would be taken for classes
        shutil.rmtree(split_root / "train")
    (split_root / place).symlink_to("nowhere")
    message = complaint(split_root)
    assert str(split_root / place) in message
    assert "nowhere" in message


def test_a_link_to_a_picture_is_a_picture(split_root: Path) -> None:
    photo = next((split_root / "train" / "1").iterdir())
    (split_root / "train" / "1" / "again.png").symlink_to(photo)
    assert len(ImageFolder(root=str(split_root)).samples("train")) == 7
