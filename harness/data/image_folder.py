"""Folders of photographs, one folder a class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.config import SplitName, location
from harness.data.cache import ImageFiles
from harness.data.decoding import SUFFIXES
from harness.data.garden import check_sizes
from harness.errors import InputError
from harness.space import check_types

SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
SHARES: dict[SplitName, float] = {"train": 0.70, "val": 0.15, "test": 0.15}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageFiles):
    """Either `train/`, `valid/` (or `val/`) and `test/` folders of class folders, or class folders alone.

    The latter are split 70 / 15 / 15 within each class, in the order of the files' content hashes: the same images
    give the same split whatever they are called. `names` is an optional JSON file, in `root` unless absolute, that
    maps a class folder's name to the name shown to people, as the original notebook's cat_to_name.json does.
    """

    root: str = location("data")
    names: str | None = None
    image_size: int = 224
    stored_size: int = 256
    limit: int | None = None  # at most that many images per split, spread over the classes
    cache: str = location("data/cache")

    def __post_init__(self) -> None:
        check_types(self, "data.")
        check_sizes(self.image_size, self.stored_size, self.limit)

    def classes(self) -> tuple[str, ...]:
        folders = self._class_folders()
        if self.names is None:
            return folders
        names = _read_names(Path(self.root) / self.names)
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise InputError(f"{Path(self.root) / self.names} names no class {missing[0]!r}; add it, or drop the file.")
        return tuple(names[folder] for folder in folders)

    def samples(self, split: SplitName) -> list[tuple[Path, int]]:
        """Raises InputError for a class without images in the split, and for what is in a class and no image."""
        root, found = Path(self.root), []
        for label, name in enumerate(self._class_folders()):
            folder = self._split_folder(split)
            images = _images((folder or root) / name)
            files = images if folder else _share(images, split)
            if not files:
                few = f"only {len(images)}, too few to split 70 / 15 / 15" if images else "none"
                place = f"Class {name!r} has no images in the {split} split"
                raise InputError(f"{place} ({(folder or root) / name} holds {few}); add some or drop the class.")
            found += [(file, label) for file in files]
        return found

    def _class_folders(self) -> tuple[str, ...]:
        folder = self._split_folder("train") or Path(self.root)
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}; give the one that holds the images with --data-root.")
        # In text order, as the notebook and torchvision number their classes: 1, 10, 100, 101, 102, 11, ...
        names = tuple(sorted(self._folders(folder)))
        if not names:
            raise InputError(f"{folder} holds no class folders; give the folder that does with --data-root.")
        if len(names) < 2:
            raise InputError(f"{folder} holds one class folder, {names[0]!r}; a classifier needs at least two.")
        for split in SPLIT_FOLDERS:
            self._check_same_classes(split, names)
        return names

    def _check_same_classes(self, split: SplitName, names: tuple[str, ...]) -> None:
        folder = self._split_folder(split)
        if folder is None:
            return
        if extra := sorted(self._folders(folder) - set(names)):
            raise InputError(f"{folder} has a class {extra[0]!r} that the train folder lacks; the labels must match.")

    def _folders(self, folder: Path) -> set[str]:
        """Names of the folders in a folder, without hidden ones and our own cache."""
        inside = [each for each in sorted(folder.iterdir()) if not each.name.startswith((".", "__"))]
        for each in inside:
            _check_link(each)
        inside = [each for each in inside if each.is_dir()]
        return {each.name for each in inside if each.resolve() != Path(self.cache).resolve()}

    def _split_folder(self, split: SplitName) -> Path | None:
        """The folder of a split, or None when the root holds class folders itself."""
        root = Path(self.root)
        if not (root / "train").is_dir():
            return None
        for name in SPLIT_FOLDERS[split]:
            if (root / name).is_dir():
                return root / name
        wanted = " or ".join(f"{name}/" for name in SPLIT_FOLDERS[split])
        raise InputError(f"{root} has train/ but no {wanted}; add it, or give a folder of class folders.")


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    for file in files:
        _check_link(file)
        if file.is_dir():
            raise InputError(
                f"{file} is a folder inside of a class, and its pictures would be left out; "
                f"move them up into {folder}, or take the folder out."
            )
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            raise InputError(
                f"{file} is not an image by its name, and a class folder holds images only; is --data-root right?"
            )
    return files


def _check_link(path: Path) -> None:
    """Raise InputError for a link to nothing: what it stood for would be missing without a word."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to {path.readlink()}, which is not there; mend or remove the link.")


def _share(files: list[Path], split: SplitName) -> list[Path]:
    ordered = sorted(files, key=lambda file: (_content_hash(file, file.stat().st_mtime_ns), file.name))
    bounds, start = {}, 0.0
    for name, share in SHARES.items():
        bounds[name] = (round(start * len(files)), round((start + share) * len(files)))
        start += share
    first, last = bounds[split]
    return ordered[first:last]


@cache
def _content_hash(file: Path, changed_ns: int) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _read_names(path: Path) -> Mapping[str, str]:
    try:
        names: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a JSON map of class names ({error}).") from error
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise InputError(f"{path} must be a JSON object that maps folder names to class names.")
    return names
