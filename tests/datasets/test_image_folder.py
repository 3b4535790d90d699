"""Folders of photographs: layouts, the split by content, class names, and an error for each thing that can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.base.errors import InputError
from harness.data.splits import remarks
from harness.datasets.image_folder import ImageFolder

SPLITS = ("train", "val", "test")


def at(root: Path, **fields: Any) -> ImageFolder:
    """The data set in `root`, with its cache beside it."""
    return ImageFolder(root=str(root), cache=str(root.parent / "cache"), **fields)


def plant(folder: Path, count: int, first: int = 0) -> None:
    """`count` tiny images in `folder`, all of different colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        colour = (number % 256, number // 256, len(folder.name))
        Image.new("RGB", (4, 4), colour).save(folder / f"{number:04}.bmp")


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
    return Counter((path.read_bytes(), label) for path, label in at(root).samples(split))


# --- layouts ---


@pytest.mark.parametrize("name", ["valid", "val"])
def test_the_split_folders_decide_the_split(split_root: Path, name: str) -> None:
    (split_root / "valid").rename(split_root / name)
    data = at(split_root)
    for split, folder in zip(SPLITS, ("train", name, "test"), strict=True):
        samples = data.samples(split)
        assert Counter(label for _, label in samples) == {0: 2, 1: 2, 2: 2}
        assert all(path.parent.parent == split_root / folder for path, _ in samples)
        assert all(path.parent.name == data.classes()[label] for path, label in samples)


def test_classes_come_in_text_order(split_root: Path) -> None:
    assert at(split_root).classes() == ("1", "10", "2")


def test_hidden_files_and_folders_are_no_images(split_root: Path) -> None:
    (split_root / "train" / "1" / ".DS_Store").write_text("")
    (split_root / "train" / ".cache").mkdir()
    assert at(split_root).classes() == ("1", "10", "2")
    assert len(at(split_root).samples("train")) == 6


def test_extensions_count_in_any_case(split_root: Path) -> None:
    photo = next((split_root / "train" / "1").iterdir())
    photo.rename(photo.with_suffix(".BMP"))
    assert len(at(split_root).samples("train")) == 6


# --- the split by content ---


def test_class_folders_are_split_about_70_15_15(tmp_path: Path) -> None:
    """Within three standard deviations of what chance allows."""
    for number in range(2):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        for image in range(500):
            (tmp_path / "photos" / str(number) / f"{image}.jpg").write_text(f"{number} {image}")
    shares = {split: len(at(tmp_path / "photos").samples(split)) for split in SPLITS}
    assert sum(shares.values()) == 1000
    for split, share in zip(SPLITS, (0.70, 0.15, 0.15), strict=True):
        assert abs(shares[split] - 1000 * share) < 3 * (1000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("count", [13, 21, 99])
def test_the_three_parts_are_disjoint_and_complete(tmp_path: Path, count: int) -> None:
    plant(tmp_path / "photos" / "daisy", count)
    plant(tmp_path / "photos" / "rose", count, first=500)
    data = at(tmp_path / "photos")
    parts = [{path for path, _ in data.samples(split)} for split in SPLITS]
    assert sum(map(len, parts)) == 2 * count
    assert set.union(*parts) == {path for path in (tmp_path / "photos").rglob("*.bmp")}


def test_photographs_that_are_added_move_no_other(tmp_path: Path) -> None:
    def grow(first: int, count: int) -> None:
        for label in range(30):
            (tmp_path / "photos" / f"{label}").mkdir(parents=True, exist_ok=True)
            for number in range(first, first + count):
                (tmp_path / "photos" / f"{label}" / f"{9999 - number}.jpg").write_text(f"{label} {number}")

    def split() -> dict[Path, str]:
        return {file: part for part in SPLITS for file, _ in at(tmp_path / "photos").samples(part)}

    grow(0, 8)
    before = split()
    grow(8, 4)
    after = split()
    assert (len(before), len(after)) == (30 * 8, 30 * 12)
    assert [file for file, part in before.items() if after[file] != part] == []


def test_the_same_bytes_under_two_names_are_in_one_split(flat_root: Path) -> None:
    for file in sorted((flat_root / "rose").iterdir()):
        shutil.copy(file, file.with_name(f"copy of {file.name}"))
    for split in SPLITS:
        roses = [file.name for file, label in at(flat_root).samples(split) if label == 1]
        assert {name for name in roses if name.startswith("copy")} == {f"copy of {n}" for n in roses if n[0] != "c"}


def test_contents_are_read_once_and_again_when_a_file_changes(flat_root: Path) -> None:
    assert len(at(flat_root).samples("train")) > 0
    before = {split: at(flat_root).samples(split) for split in SPLITS}
    for file in flat_root.rglob("*.bmp"):
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))  # another content under the same stamp: nobody looks
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert {split: at(flat_root).samples(split) for split in SPLITS} == before
    for file in flat_root.rglob("*.bmp"):
        os.utime(file, ns=(1, 1))
    with pytest.raises(InputError, match=r"None of the .* falls into|no images in the train split"):
        at(flat_root).samples("train")  # all contents are equal now, and lie in one split


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 5}', "\xff"])
def test_a_damaged_memory_of_contents_is_made_again(flat_root: Path, text: str) -> None:
    before = {split: at(flat_root).samples(split) for split in SPLITS}
    (kept,) = (flat_root.parent / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(text.encode("latin-1"))
    assert {split: at(flat_root).samples(split) for split in SPLITS} == before
    assert kept.read_bytes() == whole


def test_without_room_for_a_memory_of_contents_the_files_are_read(flat_root: Path) -> None:
    before = {split: at(flat_root).samples(split) for split in SPLITS}
    shutil.rmtree(flat_root.parent / "cache")
    (flat_root.parent / "cache").write_text("no folder")
    assert {split: at(flat_root).samples(split) for split in SPLITS} == before


def test_renaming_and_moving_the_files_changes_nothing(flat_root: Path, tmp_path: Path) -> None:
    before: Any = {split: contents(flat_root, split) for split in SPLITS}
    other = shutil.copytree(flat_root, tmp_path / "elsewhere")
    for path in [*other.rglob("*.bmp")]:
        path.rename(path.with_name(f"{path.read_bytes()[-20:].hex()}-{9999 - int(path.stem)}.bmp"))
    assert {split: contents(other, split) for split in SPLITS} == before


# --- class names ---


def test_a_json_file_names_the_classes(split_root: Path) -> None:
    (split_root / "names.json").write_text(json.dumps({"1": "rosé", "2": "daisy", "10": "iris", "11": "unused"}))
    assert at(split_root, names="names.json").classes() == ("rosé", "iris", "daisy")


def test_the_names_may_lie_anywhere(split_root: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"1": "rose", "2": "daisy", "10": "iris"}))
    data = at(split_root, names=str(tmp_path / "names.json"))
    assert data.classes() == ("rose", "iris", "daisy")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"1"', '{"1": 5, "2": "a", "10": "b"}', "\xff"],
    ids=["empty", "cut", "list", "text", "number", "not utf-8"],
)
def test_a_bad_names_file_is_named(split_root: Path, text: str) -> None:
    (split_root / "names.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"names\.json"):
        at(split_root, names="names.json").classes()


def test_a_missing_names_file_is_named(split_root: Path) -> None:
    with pytest.raises(InputError, match=r"names\.json"):
        at(split_root, names="names.json").classes()


def test_a_class_without_a_name_is_named(split_root: Path) -> None:
    (split_root / "names.json").write_text(json.dumps({"1": "rose", "2": "daisy"}))
    with pytest.raises(InputError, match=r"names\.json lacks the class '10'"):
        at(split_root, names="names.json").classes()


# --- bad folders: each message names the place ---


def complaint(root: Path) -> str:
    data = at(root)
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


def small_class(flat_root: Path, splits: tuple[str, ...]) -> None:
    """A class `tulip` with one photograph in each of these splits."""
    (flat_root / "tulip").mkdir()
    for split in splits:
        start, end = {"train": (0, 0.70), "val": (0.70, 0.85), "test": (0.85, 1)}[split]
        content = next(text.encode() for text in map(str, range(1000)) if start <= _place(text.encode()) < end)
        (flat_root / "tulip" / f"{split}.jpg").write_bytes(content)


def _place(content: bytes) -> float:
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


@pytest.mark.parametrize("splits", [("val",), ("test",), ("val", "test")])
def test_a_class_without_a_photograph_to_learn_from_is_refused(flat_root: Path, splits: tuple[str, ...]) -> None:
    small_class(flat_root, splits)
    message = complaint(flat_root)
    assert "'tulip' has no images in the train split" in message
    assert f"{flat_root / 'tulip'} holds only {len(splits)}" in message


@pytest.mark.parametrize("splits", [("train",), ("train", "val"), ("train", "test")])
def test_a_class_that_is_not_measured_is_named_and_moves_nothing(flat_root: Path, splits: tuple[str, ...]) -> None:
    before: Any = {split: contents(flat_root, split) for split in SPLITS}
    assert remarks(at(flat_root)) == []
    limited = dataclasses.replace(at(flat_root), limit=1)
    assert remarks(limited) == ["data.limit=1 leaves 1 of 2 classes without a training image."]
    small_class(flat_root, splits)
    assert remarks(at(flat_root)) == [
        f"1 of 3 classes has no image in the {split} split, which does not measure it ('tulip' has {len(splits)} in "
        "total); add some."
        for split in SPLITS
        if split not in splits
    ]
    for split in SPLITS:
        assert sum((contents(flat_root, split) - before[split]).values()) == (split in splits)
        assert before[split] - contents(flat_root, split) == Counter()


def test_too_few_photographs_for_three_splits_are_refused(tmp_path: Path) -> None:
    for name in ("daisy", "rose"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.jpg").write_bytes(b"0")  # a content of the train split
    assert _place(b"0") < 0.70
    message = complaint(tmp_path / "photos")
    assert "None of the 2 pictures" in message
    assert "falls into the val split" in message


def test_pictures_in_a_folder_inside_of_a_class(split_root: Path) -> None:
    plant(split_root / "train" / "2" / "more", 1)
    message = complaint(split_root)
    assert str(split_root / "train" / "2" / "more") in message
    assert "move them up" in message


@pytest.mark.parametrize("place", ["train/2/lost.bmp", "train/3", "valid/3", "train"])
def test_a_link_to_nothing(split_root: Path, place: str) -> None:
    if place == "train":  # else valid/ and test/ would be taken for classes
        shutil.rmtree(split_root / "train")
    (split_root / place).symlink_to("nowhere")
    message = complaint(split_root)
    assert str(split_root / place) in message
    assert "nowhere" in message


def test_a_link_to_a_picture_is_a_picture(split_root: Path) -> None:
    photo = next((split_root / "train" / "1").iterdir())
    (split_root / "train" / "1" / "again.bmp").symlink_to(photo)
    assert len(at(split_root).samples("train")) == 7
