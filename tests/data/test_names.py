"""The names that people see for the classes: each can be written, and told from the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.data.augment import IMAGENET
from harness.data.layout import check_names, look
from harness.datasets.image_folder import ImageFolder

COMPOSED, DECOMPOSED = "\xf6l", "o\u0308l"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        for name in ("1", "2", COMPOSED):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.jpg").write_text(f"{split} {name}")
    return tmp_path


def named(root: Path, text: str) -> tuple[str, ...]:
    (root / "names.json").write_text(text, encoding="utf-8")
    return ImageFolder(root=str(root), names="names.json").classes()


def complaint(root: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        named(root, text)
    assert str(caught.value).isprintable()
    assert "names.json" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "second", ["rose", "rose ", " rose", "ro\u200bse", "ro\u00adse"], ids=["same", "end", "start", "no width", "hyphen"]
)
def test_two_folders_of_one_shown_name_are_refused_both_named(root: Path, second: str) -> None:
    said = complaint(root, f'{{"1": "rose", "2": "{second}", "{COMPOSED}": "oil"}}')
    assert "The classes '1' and '2' would both be shown as" in said


def test_the_forms_of_unicode_are_one_name(root: Path) -> None:
    assert named(root, f'{{"1": "a", "2": "b", "{DECOMPOSED}": "{DECOMPOSED}"}}') == ("a", "b", COMPOSED)
    said = complaint(root, f'{{"1": "{COMPOSED}", "2": "{DECOMPOSED}", "{COMPOSED}": "a"}}')
    assert "The classes '1' and '2' would both be shown as" in said


@pytest.mark.parametrize(("again", "words"), [("1", "'1' twice"), (COMPOSED, "'öl' twice"), (DECOMPOSED, "'öl' twice")])
def test_two_names_of_one_folder_are_refused(root: Path, again: str, words: str) -> None:
    assert words in complaint(root, f'{{"1": "a", "2": "b", "{COMPOSED}": "c", "{again}": "d"}}')


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is blank"),
        (" ", "is blank"),
        ("\\u200b", "is blank"),
        ("a\\nb", "a\\nb"),
        ("\\u001b[2J", "control character"),
        ("\\ud800", "is not UTF-8 (\\ud800)"),
        ("x" * 256, "256 characters"),
    ],
)
def test_a_name_that_cannot_be_shown_or_written_is_refused(root: Path, name: str, words: str) -> None:
    said = complaint(root, f'{{"1": "a", "2": "{name}", "{COMPOSED}": "c"}}')
    assert "The name of class '2'" in said
    assert words in said


def test_a_mark_at_the_start_of_the_file_is_no_fault(root: Path) -> None:
    assert named(root, f'\ufeff{{"1": "a", "2": "b", "{COMPOSED}": "c"}}') == ("a", "b", "c")


def test_names_in_many_scripts_are_let_through() -> None:
    names = [
        "rose",
        "Rose",
        "öl",
        "薔薇",
        "وردة",
        "गुलाब",
        "می\u200cخواهم",
        "👩\u200d🌾",
        "m²",
        "m2",
        "a/b",
        "<b>",
        "-1",
        "CON",
    ]
    check_names(names, names, "here")
    assert look(" a\xa0 b ") == "a b"


def test_names_of_any_data_set_are_checked_before_its_images_are_looked_at() -> None:
    from harness.data.splits import prepare
    from harness.garden.dataset import Garden

    class Twins(Garden):
        def classes(self) -> tuple[str, ...]:
            return ("rose", *("x" * n for n in range(1, 15)), "rose ")

    with pytest.raises(InputError, match="The classes 'rose' and 'rose ' would both be shown as 'rose '"):
        prepare(Twins(), IMAGENET)


def test_equal_names_are_refused_by_their_places() -> None:
    with pytest.raises(InputError, match="classes 0 and 2 here have the same name, 'crane'; give them different names"):
        check_names(("crane", "ox", "crane"), ("crane", "ox", "crane"), "here")
