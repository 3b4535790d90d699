"""Folders as people have them: which are taken for splits, which for classes, and what is said about the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.data.layout import split_of
from harness.data.splits import remarks
from harness.datasets.image_folder import ImageFolder

LATIN1 = os.fsdecode(b"r\xf6se")  # no UTF-8
COMPOSED, DECOMPOSED = "\xf6l", "o\u0308l"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def plant(folder: Path, count: int = 40) -> None:
    """Files that are pictures by their names, and differ by their folder and number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(f"{os.path.basename(folder)} {number}".encode(errors="surrogatepass"))


def plant_splits(
    root: Path, splits: Sequence[str] = ("train", "valid", "test"), classes: Sequence[str] = ("a", "b")
) -> None:
    for split in splits:
        for name in classes:
            plant(root / split / name, 2)


def at(root: Path) -> ImageFolder:
    return ImageFolder(root=str(root), cache=str(root.parent / "cache"))


def complaint(root: Path) -> str:
    """What is wrong, on one line; it never advises to make classes of splits."""
    with pytest.raises(InputError) as caught:
        remarks(at(root))
    said = str(caught.value)
    assert said.isprintable()
    return said


# --- splits ---


@pytest.mark.parametrize(
    "splits",
    [
        ("Train", "Valid", "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("training", "validation", "testing"),
        ("training_set", "dev-set", "test set"),
        ("train_images", "valdata", "Testset"),
    ],
    ids=" ".join,
)
def test_the_usual_names_of_splits_are_understood(root: Path, splits: tuple[str, str, str]) -> None:
    plant_splits(root, splits)
    data = at(root)
    assert data.classes() == ("a", "b")
    assert remarks(data) == []
    for split, folder in zip(("train", "val", "test"), splits, strict=True):
        assert {file.parent.parent for file, _ in data.samples(split)} == {root / folder}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["trains", "training day", "pretrain", "valley", "testimony", "devil", "trainee", ""])
def test_other_names_are_those_of_no_split(name: str) -> None:
    assert split_of(name) is None


@pytest.mark.parametrize("name", ["train", "test", "val", "Training", "dev"])
def test_a_class_called_like_a_split_is_a_class_beside_others(root: Path, name: str) -> None:
    for each in ("bus", "car", name):
        plant(root / each)
    assert at(root).classes() == tuple(sorted(("bus", "car", name)))


def test_folders_called_like_two_splits_are_taken_for_them_and_it_is_said(root: Path) -> None:
    for each in ("bus", "car", "train", "test"):
        plant(root / each)
    said = complaint(root)
    assert "train/, test/, read as splits" in said
    assert "only bus/, car/; rename train/, test/ if it is not a split" in said


def test_a_train_folder_of_folders_is_taken_for_a_split_and_it_is_said(root: Path) -> None:
    for each in ("bus", "car", "train/steam", "train/diesel"):
        plant(root / each)
    said = complaint(root)
    assert "train/, read as a split, but no folder for validation (valid/, " in said
    assert "nor for testing (test/, testing/), only bus/, car/" in said


@pytest.mark.parametrize(
    ("splits", "purpose", "named"),
    [
        (("train", "val", "valid", "test"), "validation", "'val' and 'valid'"),
        (("train", "Train", "valid", "test"), "training", "'Train' and 'train'"),
        (("train", "valid", "test", "testing"), "testing", "'test' and 'testing'"),
    ],
)
def test_two_folders_of_one_split_are_refused_both_named(
    root: Path, splits: tuple[str, ...], purpose: str, named: str
) -> None:
    plant_splits(root, splits)
    said = complaint(root)
    assert f"two folders for {purpose}" in said
    assert named in said


@pytest.mark.parametrize(
    ("splits", "missing"),
    [
        (("train", "test"), "for validation (valid/, val/, validation/, dev/);"),
        (("train", "val"), "for testing (test/, testing/);"),
        (("train",), "nor for testing (test/, testing/);"),
        (("train", "vlaid", "test"), ", only vlaid/; rename"),
        (("train", "eval", "test"), ", only eval/; rename"),
    ],
    ids=str,
)
def test_a_missing_split_is_named_with_what_to_do(root: Path, splits: tuple[str, ...], missing: str) -> None:
    plant_splits(root, splits)
    said = complaint(root)
    assert missing in said
    assert f"or give {root / 'train'} alone with --data-root" in said


@pytest.mark.parametrize("splits", [("test",), ("valid", "test")])
def test_splits_without_one_to_learn_from(root: Path, splits: tuple[str, ...]) -> None:
    plant_splits(root, splits)
    assert "no folder for training (train/, training/)" in complaint(root)


def test_a_test_folder_without_labels(root: Path) -> None:
    plant_splits(root, ("train", "valid"))
    plant(root / "test")
    said = complaint(root)
    assert f"{root / 'test'} is read as the testing split but holds no class folders" in said
    assert "its pictures have no labels" in said
    assert "give the training folder alone with --data-root" in said


def test_splits_that_hold_pictures_alone(root: Path) -> None:
    for split in ("train", "valid", "test"):
        plant(root / split)
    said = complaint(root)
    assert f"{root / 'train'} is read as the training split but holds no class folders" in said
    assert "into its own folder" in said


@pytest.mark.parametrize("splits", [("seg_train", "seg_test", "seg_pred"), ("fold1", "fold2"), ("A", "B")])
def test_splits_of_other_names_are_never_made_classes(root: Path, splits: tuple[str, ...]) -> None:
    plant_splits(root, splits)
    said = complaint(root)
    assert "split folders are called train, valid or test" in said
    assert "move" not in said


def test_a_root_one_folder_too_high(root: Path) -> None:
    plant_splits(root / "flower_data")
    assert f"give {root / 'flower_data'} with --data-root" in complaint(root)


def test_one_folder_as_two_splits(root: Path) -> None:
    plant_splits(root, ("train", "test"))
    (root / "valid").symlink_to("test")
    assert f"{root / 'test'} and {root / 'valid'} are the same folder" in complaint(root)


# --- what is neither a split nor a class ---


def test_what_systems_make_is_passed_over(root: Path) -> None:
    plant_splits(root)
    for name in ("Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", ".DS_Store", "._0.jpg"):
        (root / "train" / "a" / name).write_bytes(b"x")
    for place in (root, root / "train", root / "train" / "a"):
        for name in ("__MACOSX", "__pycache__", ".cache", "@eaDir", "System Volume Information"):
            plant(place / name, 1)
    data = at(root)
    assert data.classes() == ("a", "b")
    assert len(data.samples("train")) == 4
    assert remarks(data) == []


@pytest.mark.parametrize("name", ["__background__", "_", "__init__", "#1", "~"])
def test_other_names_with_signs_in_front_are_classes(root: Path, name: str) -> None:
    plant_splits(root, classes=("a", name))
    assert set(at(root).classes()) == {"a", name}
    shutil.rmtree(root / "valid")
    shutil.rmtree(root / "test")
    plant(root / "train" / name)
    plant(root / "train" / "a")
    assert set(at(root / "train").classes()) == {"a", name}


def test_pictures_beside_class_folders_are_named(root: Path) -> None:
    plant(root / "a")
    plant(root / "b")
    (root / "README.txt").write_text("no picture")
    assert remarks(at(root)) == []
    (root / "preview.JPG").write_bytes(b"x")
    assert remarks(at(root)) == [f"1 picture is ignored, such as {root / 'preview.JPG'}: it is in no class folder."]


def test_pictures_and_folders_beside_splits_are_named(root: Path) -> None:
    plant_splits(root)
    plant(root, 2)
    (root / "valid" / os.fsdecode(b"\xf6\n.jpg")).write_bytes(b"x")
    plant(root / "unlabeled")
    plant(root / "extra" / "a")
    assert remarks(at(root)) == [
        f"{root / 'extra'} is ignored: it belongs to no split.",
        f"{root / 'unlabeled'} is ignored: it belongs to no split.",
        f"2 pictures are ignored, such as {root / '0.jpg'}: they are in no class folder.",
        f"1 picture is ignored, such as {root / 'valid'}/\\udcf6\\n.jpg: it is in no class folder.",
    ]


# --- classes ---


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1b[2Jb", "a\u2028b", " ", "\u200b", LATIN1])
@pytest.mark.parametrize("flat", [True, False])
def test_a_name_that_cannot_be_written_is_refused_on_one_line(root: Path, name: str, flat: bool) -> None:
    if flat:
        plant(root / "a")
        plant(root / name)
    else:
        plant_splits(root, classes=("a", name))
    said = complaint(root)
    assert "The name of the folder" in said
    assert "rename it" in said or "give it a readable name" in said
    assert name != LATIN1 or "r\\udcf6se is not UTF-8" in said


def test_one_name_in_two_forms_of_unicode_is_one_class(root: Path) -> None:
    plant_splits(root, ("train",), ("a", COMPOSED))
    plant_splits(root, ("valid", "test"), ("a", DECOMPOSED))
    data = at(root)
    assert data.classes() == ("a", COMPOSED)
    assert [label for _, label in data.samples("val")] == [0, 0, 1, 1]


@pytest.mark.parametrize("split", ["train", "valid", "."])
def test_two_folders_that_differ_only_by_form_are_refused(root: Path, split: str) -> None:
    if split == ".":
        plant(root / COMPOSED)
    else:
        plant_splits(root, classes=("a", COMPOSED))
    plant(root / split / DECOMPOSED, 2)
    said = complaint(root)
    assert "'o\\u0308l' and '\\xf6l'" in said
    assert str(root / split) in said


@pytest.mark.parametrize(
    ("one", "other"), [("rose", "rose "), ("rose", "ro\u200bse"), ("a b", "a\xa0b"), ("a b", "a  b")]
)
def test_classes_that_look_the_same_are_refused_and_told_apart(root: Path, one: str, other: str) -> None:
    plant_splits(root, classes=(one, other))
    said = complaint(root)
    assert repr(one) in said
    assert repr(other) in said


@pytest.mark.parametrize("other", ["rose ", "Rose", "ro\u200bse"])
def test_a_class_that_train_has_under_a_like_name_is_named_with_it(root: Path, other: str) -> None:
    plant_splits(root, ("train",), ("a", "rose"))
    plant_splits(root, ("valid", "test"), ("a", other))
    said = complaint(root)
    assert f"has a class {other!r} that the train folder lacks" in said
    assert f"{other!r} and 'rose'" in said


def test_names_that_differ_in_case_are_two_classes(root: Path) -> None:
    for name in "aAbB":
        plant(root / name)
    assert at(root).classes() == ("A", "B", "a", "b")


def test_a_class_that_is_another_by_a_link(root: Path) -> None:
    plant(root / "a")
    (root / "b").symlink_to("a")
    assert f"{root / 'a'} and {root / 'b'} are the same folder" in complaint(root)


def test_a_link_that_goes_round(root: Path) -> None:
    plant(root / "a")
    plant(root / "b")
    (root / "again").symlink_to("again")
    assert "again is a link to again" in complaint(root)
    (root / "again").unlink()
    (root / "b" / "again").symlink_to("..")
    assert f"{root / 'b' / 'again'} is a folder inside a class" in complaint(root)
