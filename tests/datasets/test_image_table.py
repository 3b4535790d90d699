"""Photographs in a table: the readers, the split by group or content, and an error for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from harness.base.errors import InputError
from harness.datasets.image_table import ImageTable, _group

SPLITS = ("train", "val", "test")
Rows = list[dict[str, Any]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 60 images, all of different colours."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(60):
        Image.new("RGB", (4, 4), (number, 255 - number, 7)).save(tmp_path / "photos" / "a" / f"{number}.png")
    return tmp_path / "photos"


def listed(count: int = 60, **columns: Any) -> Rows:
    """Rows of the first images, daisies and roses in turn; a further column is a function of the number."""
    return [
        {"path": f"a/{number}.png", "label": ("daisy", "rose")[number % 2]}
        | {name: column(number) for name, column in columns.items()}
        for number in range(count)
    ]


def at(photos: Path, rows: Any, suffix: str = ".csv") -> ImageTable:
    file = photos / f"labels{suffix}"
    frame = pandas.DataFrame(rows)
    if suffix == ".csv":
        frame.to_csv(file, index=False)
    elif suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".parquet":
        frame.to_parquet(file)
    table = frame if suffix == "frame" else file.name
    return ImageTable(root=str(photos), file=table, cache=str(photos.parent / "cache"))


def names(data: ImageTable) -> dict[str, list[str]]:
    return {split: [path.name for path, _ in data.samples(split)] for split in SPLITS}  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", "frame"])
def test_every_reader_gives_the_same_photographs(photos: Path, suffix: str) -> None:
    rows = listed(split=lambda number: ("train", "val", "Validation", "test")[number // 2 % 4])
    data = at(photos, rows, suffix)
    assert data.classes() == ("daisy", "rose")
    for split, places in (("train", {0}), ("val", {1, 2}), ("test", {3})):
        wanted = [(photos / "a" / f"{n}.png", n % 2) for n in range(60) if n // 2 % 4 in places]
        assert data.samples(split) == wanted  # type: ignore[arg-type]
    assert data.open(data.samples("train")[0][0]).size == (4, 4)


def test_metadata_of_hugging_face_lies_beside_the_images(photos: Path) -> None:
    rows = [{"file_name": f"{number}.png", "label": number % 3} for number in range(60)]
    (photos / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ImageTable(root=str(photos), file="a/metadata.jsonl", cache=str(photos.parent / "cache"))
    assert data.classes() == ("0", "1", "2")
    assert sum(len(each) for each in names(data).values()) == 60


def in_folders(photos: Path, **rows: Rows) -> ImageTable:
    """Hugging Face's layout: a folder for each split, with a metadata.csv beside its images."""
    for folder, table in rows.items():
        (photos / folder).mkdir()
        for row in table:
            shutil.copy(photos / "a" / Path(row["file_name"]).name, photos / folder)
        pandas.DataFrame(table).to_csv(photos / folder / "metadata.csv", index=False)
    return ImageTable(root=str(photos), file="metadata.csv", cache=str(photos.parent / "cache"))


def rows_of(*numbers: int, **columns: Any) -> Rows:
    return [{"file_name": f"{number}.png", "label": ("daisy", "rose")[number % 2]} | columns for number in numbers]


def test_metadata_of_hugging_face_lies_in_the_folder_of_each_split(photos: Path) -> None:
    data = in_folders(photos, train=rows_of(0, 1, 2, 3), validation=rows_of(4, 5), test=rows_of(6, 7))
    assert names(data) == {
        "train": [f"{n}.png" for n in range(4)],
        "val": ["4.png", "5.png"],
        "test": ["6.png", "7.png"],
    }
    assert [label for _, label in data.samples("val")] == [0, 1]
    assert all(path.parent.name == "validation" for path, _ in data.samples("val"))


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        (None, "no table for the val split"),
        (rows_of(4, 5, split="test"), "has the split test; write val"),
        (rows_of(4, 5, group="plant 7"), "Group 'plant 7'"),
        ([{"file_name": "../train/0.png", "label": "rose"}], r"both list .*0\.png"),
    ],
)
def test_tables_of_splits_that_contradict_are_refused(photos: Path, validation: Rows | None, words: str) -> None:
    tables = {"train": rows_of(0, 1, group="plant 7"), "test": rows_of(6, 7)}
    data = in_folders(photos, **tables, **({} if validation is None else {"validation": validation}))
    with pytest.raises(InputError, match=words):
        data.classes()


def test_two_folders_of_one_split_are_refused(photos: Path) -> None:
    some = {"train": rows_of(0, 1), "val": rows_of(2, 3), "test": rows_of(4, 5), "training": rows_of(6, 7)}
    with pytest.raises(InputError, match="two folders with a table for the train split; merge them"):
        in_folders(photos, **some).classes()


def test_folders_of_splits_that_a_table_does_not_name_are_told(photos: Path) -> None:
    for folder, numbers in (("train", range(0, 30)), ("val", range(30, 45)), ("test", range(45, 60))):
        (photos / folder).mkdir()
        for number in numbers:
            (photos / "a" / f"{number}.png").rename(photos / folder / f"{number}.png")
    rows = [{"path": f"{path.parent.name}/{path.name}", "label": path.stem[-1:]} for path in photos.rglob("*.png")]
    (said,) = at(photos, rows).remarks()
    assert "has no column 'split': they are split by their content" in said
    assert at(photos, [row | {"split": row["path"].partition("/")[0]} for row in rows]).remarks() == []


def test_a_table_without_folders_of_splits_has_no_remarks(photos: Path) -> None:
    assert at(photos, listed()).remarks() == []


def test_without_a_split_photographs_stay_in_theirs_when_rows_are_added(photos: Path) -> None:
    before, after = names(at(photos, listed(50))), names(at(photos, listed(60)[::-1]))
    assert all(set(before[split]) <= set(after[split]) for split in SPLITS)
    assert sum(map(len, after.values())) == 60
    assert len(after["train"]) > 30
    assert min(map(len, after.values())) > 0


def test_nullable_columns_are_as_others(photos: Path) -> None:
    frame, numbers = pandas.DataFrame(listed(20)), pandas.Series([number % 2 for number in range(20)])
    for label in (numbers.astype("Int64"), pandas.Series([np.int64(each) for each in numbers], dtype=object)):
        table: Any = frame.assign(label=label)
        assert ImageTable(file=table, root=str(photos), cache=str(photos / "cache")).classes() == ("0", "1")


def test_contents_are_looked_up_once_for_a_split(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = at(photos, listed(60)), []
    monkeypatch.setattr(ImageTable, "stamp", lambda self, item: calls.append(item) or str(item))
    data.samples("val")
    assert len(calls) == 60


def test_a_group_is_in_one_split_only(photos: Path) -> None:
    data = at(photos, listed(group=lambda number: f"plant {number // 4}" if number < 40 else ""))
    found = {name: split for split, each in names(data).items() for name in each}
    assert len(found) == 60
    assert len(set(found.values())) == 3
    for plant in range(10):
        assert len({found[f"{number}.png"] for number in range(4 * plant, 4 * plant + 4)}) == 1
    fewer = at(photos, listed(59, group=lambda number: f"plant {number // 4}" if number < 40 else ""))
    assert all(found[name] == split for split, each in names(fewer).items() for name in each)


def test_a_frame_belongs_to_the_definition_by_its_content(photos: Path) -> None:
    one, same, other = (at(photos, rows, "frame") for rows in (listed(), listed(), listed(59)))
    assert one == same != other
    assert json.loads(json.dumps(one.file)) == one.file
    assert hash(one) == hash(same)


def test_a_frame_that_changes_later_changes_no_table(photos: Path) -> None:
    frame = pandas.DataFrame(listed(split=lambda number: SPLITS[number // 2 % 3]))
    before = ImageTable(root=str(photos), file=frame)  # type: ignore[arg-type]
    first = names(before)
    frame["split"] = frame["split"].map({"train": "val", "val": "test", "test": "train"})
    assert names(ImageTable(root=str(photos), file=frame)) != first == names(before)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", "frame"])
def test_numbered_groups_stay_in_their_split_when_a_row_without_one_is_added(photos: Path, suffix: str) -> None:
    whole = names(at(photos, listed(58, group=lambda number: number // 2), suffix))
    more = names(at(photos, listed(59, group=lambda number: number // 2 if number < 58 else None), suffix))
    assert all(set(each) <= set(more[split]) for split, each in whole.items())


@pytest.mark.parametrize(
    ("cell", "name"),
    [("7.0", "7"), (7.0, "7"), (1e17, str(10**17)), ("v1.0", "v1.0"), ("2.10.0", "2.10.0"), ("1:05.0", "1:05.0")],
)
def test_the_name_of_a_group_is_its_text(cell: Any, name: str) -> None:
    assert _group(cell) == name


def test_cells_of_bytes_are_text(photos: Path) -> None:
    rows = [{"path": row["path"].encode(), "label": row["label"].encode()} for row in listed()]
    assert at(photos, rows, ".parquet").classes() == ("daisy", "rose")


def test_blank_lines_and_lines_in_a_cell_leave_the_numbers_of_an_editor(photos: Path) -> None:
    lines = ["", "path,label,note", "a/0.png,daisy,", "", ",,", 'a/1.png,rose,"two\nlines"', "a/2.png,,"]
    (photos / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"Row 8 of .*labels\.csv has no label"):
        ImageTable(root=str(photos)).classes()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"path": "a/0.png"}], "has no column 'label', but path; add it"),
        ([{"image;label": "a/0.png;x"}], "separates its columns by ';'; save it with commas"),
        ([*listed(), {"path": "a/9.png", "label": "rose"}], r"Rows 11 and 62 of .*labels\.csv both list .*9\.png"),
        ([*listed(), {"path": "a/../a/9.png", "label": "rose"}], r"Rows 11 and 62 .*both list"),
        ([*listed(59), {"path": "a/60.png", "label": "rose"}], r"Row 61 of .* lists .*60\.png, which is no file"),
        ([*listed(59), {"path": "a/59.png", "label": " "}], r"Row 61 of .* has no label; fill it in"),
        ([*listed(59), {"path": "", "label": "rose"}], r"Row 61 of .* has no path"),
        (listed(split=lambda number: "train" if number else ""), r"Row 2 of .* has no split"),
        (listed(split=lambda number: "trian"), r"Row 2 of .* has the split 'trian'; write train, val or test"),
        (
            listed(split=lambda n: SPLITS[n % 3], group=lambda n: n // 2),
            r"Group '0' of .* is in the train split \(row 2",
        ),
        (
            listed(split=lambda n: SPLITS[n // 2 % 3] if n % 2 else SPLITS[n % 4]),
            "Class 'daisy' has no images in the val split",
        ),
        ([{"path": "a/0.png", "label": "rose"}], "has one label, 'rose'; a classifier needs at least two"),
    ],
)
def test_what_is_wrong_is_said_with_its_row(photos: Path, rows: Rows, words: str) -> None:
    data = at(photos, rows)
    with pytest.raises(InputError, match=words):
        names(data)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("labels.csv", None, "There is no table"),
        ("labels.csv", b"", "cannot be read as a table"),
        ("labels.csv", b"path,label\n", "has no rows"),
        ("labels.csv", b'path,label,note\na/0.png,rose,"5 inch\na/1.png,daisy,\n', "unexpected end of data"),
        ("labels.csv", b"path,label\na/0.png,rose,3\na/1.png,rose,3\n", "cannot be read as a table"),
        ("labels.csv", b"path,label\na/0.png,\xff\n", "is not UTF-8; save it as UTF-8"),
        ("labels.csv", b"path,label,label\na/0.png,rose,5\n", "has two columns 'label'; rename one"),
        ("labels.csv", b"path,Label,label\na/0.png,rose,5\n", "has two columns 'label'; rename one"),
        ("labels.csv", b"image,label\n" + b"A" * 5000 + b",rose\n", r"Row 2 of .* lists .*which is no file"),
        ("labels.jsonl", b"{", "cannot be read as a table"),
        ("labels.jsonl", b'[{"path": "a/0.png", "label": "rose"}]', "it is one JSON list; write one object per line"),
        ("labels.jsonl", b'{"path": "a/0.png", "label": "rose"}\nnull\n', "cannot be read as a table"),
        ("labels.csv", ",".join(map(str, range(99))).encode() + b"\n", "but 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …; add it"),
        ("labels.parquet", b"PAR1", "cannot be read as a table"),
        ("labels.xlsx", b"PK", r"is no table; give a file that ends with \.csv"),
    ],
)
def test_a_file_that_is_no_table_is_refused(photos: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (photos / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        ImageTable(root=str(photos), file=name).classes()


def test_a_table_is_read_again_when_it_changed(photos: Path) -> None:
    data = at(photos, listed(40))
    assert sum(map(len, names(data).values())) == 40
    at(photos, listed(60))
    assert sum(map(len, names(data).values())) == 60
