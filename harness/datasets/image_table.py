"""Photographs listed in a table: CSV, JSON lines, Parquet, or a pandas DataFrame."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from unicodedata import normalize

from harness.base.errors import InputError, first_line
from harness.config.contracts import SplitName
from harness.data.cache import ImageFiles, content_hashes
from harness.data.layout import SPLIT_NAMES, check_names, split_of
from harness.datasets.image_folder import by_content

if TYPE_CHECKING:
    import pandas

# Names of a column, the first one first; file_name is that of Hugging Face's image folders.
COLUMNS = {
    "path": ("path", "file_name", "filename", "file", "image"),
    "label": ("label", "class"),
    "split": ("split",),
    "group": ("group",),
}
SHOWN = 10  # names of columns in a message
FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "labels.csv")  # looked for in a folder


class Row(NamedTuple):
    """A photograph of the table; `split` and `group` are None where the table has no such column."""

    number: int  # as an editor counts the lines of a CSV
    path: Path
    label: str
    split: SplitName | None
    group: str | None


class Frame(str):
    """The name of a DataFrame, with a digest of its content, by which definitions compare it."""

    frame: pandas.DataFrame

    def __new__(cls, frame: pandas.DataFrame) -> Self:
        content = frame.to_csv(index=False).encode(errors="surrogatepass")
        name = super().__new__(cls, f"DataFrame-{hashlib.sha256(content).hexdigest()[:16]}")
        name.frame = frame.copy()  # which the caller may change
        return name

    def __getnewargs__(self) -> tuple[Any]:
        return (self.frame,)


@dataclass(frozen=True, kw_only=True)
class ImageTable(ImageFiles):
    """A table with the columns path and label, and perhaps split and group.

    `file` is a CSV, JSON lines (.jsonl) or Parquet file, in `root` unless absolute, or a pandas DataFrame. Paths are
    relative to the file's folder, those of a DataFrame to `root`. Hugging Face's metadata.csv and metadata.jsonl fit,
    also one in each of the folders train, validation and test of `root`.

    Photographs of one group (a plant, a patient, a burst) are never in two splits. Without a column split, groups are
    split about 70 / 15 / 15 by their names, photographs without a group by their content: each stays in its split if
    rows are added.
    """

    file: str = "labels.csv"

    def __post_init__(self) -> None:
        if hasattr(self.file, "to_csv"):
            object.__setattr__(self, "file", Frame(self.file))
        super().__post_init__()

    def classes(self) -> tuple[str, ...]:
        found = tuple(sorted({row.label for row in self._rows()}))
        if len(found) < 2:
            raise InputError(f"{self.file} has one label, {found[0]!r}; a classifier needs at least two.")
        check_names(found, found, f"in {self.file}")
        return found

    def samples(self, split: SplitName) -> list[tuple[Path, int]]:
        """Return a split. Raises InputError for a class that the table's own split leaves without images in it."""
        labels = {name: label for label, name in enumerate(self.classes())}
        given = any(row.split for row in self._rows())
        hashes = {} if given else self._hashes()
        chosen = [row for row in self._rows() if (row.split or _split(row, hashes)) == split]
        counts = Counter(row.label for row in chosen)
        if not chosen:
            why = "leave the column out" if given else "name each row's split yourself"  # 70 / 15 / 15 by content
            raise InputError(
                f"None of the {len(self._rows())} rows of {self.file} is in the {split} split; add some, or {why}."
            )
        if absent := [name for name in labels if not counts[name] and (given or split == "train")]:
            raise InputError(
                f"Class {absent[0]!r} has no images in the {split} split of {self.file}; add some, or remove the class."
            )
        return [(row.path, labels[row.label]) for row in chosen]

    def remarks(self) -> list[str]:
        """Say that split folders of the photographs are not read as splits."""
        paths = [Path(os.path.abspath(row.path)) for row in self._rows()]
        beyond = len(Path(os.path.commonpath(paths)).parts)
        found = {next(filter(None, map(split_of, path.parts[beyond:-1])), None) for path in paths}
        if any(row.split for row in self._rows()) or None in found or len(found) < 2:
            return []
        return [
            f"The photographs of {self.file} lie in folders of splits, but it has no column 'split': they are split by "
            "their content. Add the column to keep them there."
        ]

    def _hashes(self) -> dict[Path, str]:
        """Return the content hashes of the photographs without a group."""
        stamps = {row.path: self.stamp(row.path) for row in self._rows() if not row.group}
        kept = hashlib.sha256(f"{Path(self.root).resolve()}/{self.file}".encode(errors="surrogatepass")).hexdigest()
        return content_hashes(stamps, Path(self.cache) / f"{kept[:32]}.hashes")

    def _rows(self) -> list[Row]:
        if isinstance(self.file, Frame):
            return _of_frame(self.file, self.root)
        path = Path(self.root) / self.file
        if not path.exists() and (tables := _split_tables(Path(self.root), self.file)):
            return _joined(Path(self.root), tables)
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(
                f"There is no table {path} ({error.strerror}); correct data.file, or give its folder with --data-root."
            ) from error
        return _read(path, stat.st_mtime_ns, stat.st_size)


def table_in(folder: Path) -> Path | None:
    """Return a folder's table, or the path that stands for those of its split folders; None if there is none."""
    found = (folder / each for each in FILES if (folder / each).is_file() or len(_split_tables(folder, each)) > 1)
    return next(found, None)


def _split_tables(root: Path, file: str) -> dict[Path, SplitName]:
    """Return the tables of this name in the split folders of `root`, as Hugging Face's image folders have them."""
    splits = {each / file: split_of(each.name) for each in sorted(root.iterdir())} if root.is_dir() else {}
    return {path: split for path, split in splits.items() if split is not None and path.is_file()}


def _joined(root: Path, tables: Mapping[Path, SplitName]) -> list[Row]:
    """Return the rows of a table for each split. Raises InputError if they contradict each other."""
    if missing := [split for split in SPLIT_NAMES if split not in tables.values()]:
        listed = " and ".join(map(str, tables))
        raise InputError(f"{root} has {listed}, but no table for the {missing[0]} split; add one, or make one of all.")
    if len(tables) > len(SPLIT_NAMES):
        twice = next(split for split in SPLIT_NAMES if list(tables.values()).count(split) > 1)
        raise InputError(f"{root} has two folders with a table for the {twice} split; merge them.")
    rows: list[Row] = []
    seen: dict[Path, Path] = {}
    groups: dict[str, SplitName] = {}
    for path, split in tables.items():
        stat = path.stat()
        for row in _read(path, stat.st_mtime_ns, stat.st_size):
            if row.split not in (None, split):
                raise InputError(f"Row {row.number} of {path} has the split {row.split}; write {split}, as its folder.")
            if row.group and (other := groups.setdefault(row.group, split)) != split:
                raise InputError(
                    f"Group {row.group!r} of {path} is in the {other} split, too; put all its photographs into one."
                )
            if (other_table := seen.setdefault(row.path, path)) != path:
                raise InputError(f"{other_table} and {path} both list {row.path}; remove it from one of them.")
            rows.append(row._replace(split=split))
    return rows


def _split(row: Row, hashes: Mapping[Path, str]) -> SplitName:
    """Return the split of a row without one."""
    if row.group:
        return by_content(hashlib.sha256(row.group.encode(errors="surrogatepass")).hexdigest())
    return by_content(hashes[row.path])


@lru_cache(maxsize=4)
def _of_frame(name: Frame, root: str) -> list[Row]:
    return _checked(name.frame, name, Path(root), range(len(name.frame)))


@lru_cache(maxsize=4)
def _read(path: Path, _time: int, _size: int) -> list[Row]:
    import pandas

    readers: dict[str, Any] = {
        ".csv": lambda: _csv(path),
        ".jsonl": lambda: _json_lines(path),
        ".parquet": lambda: pandas.read_parquet(path),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path} is no table; give a file that ends with {', '.join(readers)}.")
    try:
        frame = readers[path.suffix.lower()]()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8.") from error
    except (ValueError, TypeError, OSError, ImportError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({first_line(error)}); correct it.") from error
    is_csv = path.suffix.lower() == ".csv"
    return _checked(frame, str(path), path.parent, list(frame.index) if is_csv else range(1, 1 + len(frame)))


def _json_lines(path: Path) -> pandas.DataFrame:
    import pandas

    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        raise ValueError("it is one JSON list; write one object per line")
    return pandas.read_json(StringIO(text), lines=True, dtype=False)


def _csv(path: Path) -> pandas.DataFrame:
    """Read all cells as text, indexed by their lines; pandas would rename the second of two equal columns."""
    import pandas

    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)  # else a quote without an end hides the rows after it
        lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    if not lines:
        raise ValueError("it is empty")
    (_, header), *rows = lines
    for number, cells in rows:
        if len(cells) > len(header):
            raise ValueError(f"line {number} has {len(cells)} cells, its header {len(header)}")
    table = [[*cells, *[""] * (len(header) - len(cells))] for _, cells in rows]
    return pandas.DataFrame(table, columns=header, index=[number for number, _ in rows], dtype=str)


def _checked(frame: pandas.DataFrame, name: str, folder: Path, numbers: Sequence[int]) -> list[Row]:
    """Return the rows. Raises InputError naming the first row that is wrong."""
    names = [str(column).strip().casefold() for column in frame.columns]
    found = dict(zip(names, frame.columns, strict=True))
    columns = {key: next((found[name] for name in names if name in found), None) for key, names in COLUMNS.items()}
    for key in ("path", "label"):
        if columns[key] is None:
            there = ", ".join(map(str, frame.columns[:SHOWN])) + ", …" * (len(frame.columns) > SHOWN) or "none"
            if len(frame.columns) == 1 and (signs := set(";\t|") & set(there)):
                raise InputError(f"{name} separates its columns by {signs.pop()!r}; save it with commas.")
            raise InputError(f"{name} has no column {key!r}, but {there}; add it, or rename one.")
    if not len(frame):
        raise InputError(f"{name} has no rows; list the photographs.")
    if twice := [each for each in columns.values() if names.count(str(each).strip().casefold()) > 1]:
        raise InputError(f"{name} has two columns {twice[0]!r}; rename one.")
    cells = {key: list(frame[column]) for key, column in columns.items() if column is not None}
    for key, column in cells.items():
        for place, value in enumerate(column):
            if isinstance(value, list | dict | tuple | set) or getattr(value, "ndim", 0) > 0:
                what = f"Row {numbers[place]} of {name} has as {key} a {type(value).__name__}"
                raise InputError(f"{what}; write one {'path' if key == 'path' else 'value'} per photograph.")
    texts = {key: list(map(_group if key == "group" else _text, column)) for key, column in cells.items()}
    rows: list[Row] = []
    seen: dict[Path, int] = {}
    groups: dict[str, Row] = {}
    for place in range(len(frame)):
        row = _row(name, numbers[place], folder, {key: column[place] for key, column in texts.items()})
        if (other := seen.setdefault(row.path, row.number)) != row.number:
            raise InputError(f"Rows {other} and {row.number} of {name} both list {row.path}; remove one of them.")
        if row.group and (other_row := groups.setdefault(row.group, row)).split != row.split:
            raise InputError(
                f"Group {row.group!r} of {name} is in the {other_row.split} split (row {other_row.number}) and in the "
                f"{row.split} split (row {row.number}); put all its photographs into one split."
            )
        rows.append(row)
    return rows


def _row(name: str, number: int, folder: Path, texts: dict[str, str]) -> Row:
    for key in ("path", "label", "split"):
        if texts.get(key) == "":
            raise InputError(f"Row {number} of {name} has no {key}; fill it in, or remove the row.")
    split = split_of(texts["split"]) if "split" in texts else None
    if "split" in texts and split is None:
        raise InputError(f"Row {number} of {name} has the split {texts['split']!r}; write train, val or test.")
    path = Path(os.path.normpath(folder / texts["path"]))
    if not os.path.isfile(path):  # unlike Path.is_file, for names of any length
        raise InputError(
            f"Row {number} of {name} lists {path}, which is no file; correct the path, which is relative to {folder}."
        )
    return Row(number, path, normalize("NFC", texts["label"]), split, texts.get("group"))


def _text(value: Any) -> str:
    """Return a cell's text; empty for None and NaN."""
    import pandas

    if pandas.isna(value):
        return ""
    return (str(value, errors="replace") if isinstance(value, bytes) else str(value)).strip()


def _group(value: Any) -> str:
    """Return a group's name. pandas makes 7 to 7.0 where a row has none, and names decide the split."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else _text(value)
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text
