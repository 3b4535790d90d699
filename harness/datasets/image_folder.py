"""Folders of photographs, one per class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness.base.errors import InputError
from harness.config.contracts import SplitName
from harness.data.cache import ImageFiles, content_hashes
from harness.data.decoding import SUFFIXES
from harness.data.layout import Layout, check_link, check_names, made_by_system, read_layout, read_names

BOUNDS: dict[SplitName, float] = {"train": 0.70, "val": 0.85, "test": 1.0}  # of a content hash scaled to 0..1


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageFiles):
    """Either train, validation and test folders that hold class folders, or class folders alone.

    The latter are split about 70 / 15 / 15, each photograph by its content alone: it stays in its split if it is
    renamed or others are added. So a class of few photographs may have none for validation or testing. `names` is an
    optional JSON file, in `root` unless absolute, that maps class folders to display names, as the
    original notebook's cat_to_name.json does.
    """

    names: str | None = None

    def classes(self) -> tuple[str, ...]:
        shown = folders = self._layout().classes
        where = f"in {self.root}"
        if self.names is not None:
            path = Path(self.root) / self.names
            names, where = read_names(path), f"by {path}"
            if missing := [folder for folder in folders if folder not in names]:
                raise InputError(f"{path} lacks the class {missing[0]!r}; add it, or drop the file.")
            shown = tuple(names[folder] for folder in folders)
        check_names(shown, folders, where)
        return shown

    def samples(self, split: SplitName) -> list[tuple[Path, int]]:
        """Return a split. Raises InputError for a class without images in it, and for non-images in a class."""
        layout = self._layout()
        if not layout.splits:
            return self._shared(layout)[split]
        found = []
        for label, name in enumerate(layout.classes):
            folder = layout.folders[split].get(name, layout.splits[split] / name)
            files = _images(folder)
            if not files:
                raise InputError(_no_images(name, split, f"{folder} holds none"))
            found += [(file, label) for file in files]
        return found

    def remarks(self) -> list[str]:
        """List what is ignored without an error."""
        layout = self._layout()
        said = [f"{folder} is ignored: it belongs to no split." for folder in layout.beside]
        for place in (layout.root, *layout.splits.values()):
            if pictures := sorted(each for each in place.iterdir() if _is_picture(each)):
                are, lie = ("pictures are", "they are") if len(pictures) > 1 else ("picture is", "it is")
                said.append(f"{len(pictures)} {are} ignored, such as {pictures[0]}: {lie} in no class folder.")
        return said

    def _layout(self) -> Layout:
        return read_layout(Path(self.root), Path(self.cache))

    def _shared(self, layout: Layout) -> dict[SplitName, list[tuple[Path, int]]]:
        """Split the photographs of class folders by their content."""
        folders = layout.folders["train"]
        labels = {file: label for label, name in enumerate(layout.classes) for file in _images(folders[name])}
        kept = hashlib.sha256(os.path.realpath(self.root).encode(errors="surrogatepass")).hexdigest()[:32]
        hashes = content_hashes({file: self.stamp(file) for file in labels}, Path(self.cache) / f"{kept}.hashes")
        parts: dict[SplitName, list[tuple[Path, int]]] = {split: [] for split in BOUNDS}
        for file in sorted(labels, key=lambda file: (labels[file], hashes[file], file.name)):
            parts[by_content(hashes[file])].append((file, labels[file]))
        counts, trained = Counter(labels.values()), {label for _, label in parts["train"]}
        for label, name in enumerate(layout.classes):
            if label not in trained:
                few = "none" if not counts[label] else f"only {counts[label]}, all in other splits by content"
                raise InputError(_no_images(name, "train", f"{folders[name]} holds {few}"))
        for split, part in parts.items():
            if not part:
                raise InputError(
                    f"None of the {len(labels)} pictures in {layout.root} falls into the {split} split (70 / 15 / 15 "
                    "by content); add some, or sort them into train/, valid/ and test/ yourself."
                )
        return parts


def by_content(digest: str) -> SplitName:
    """Return the split of a content hash: a threshold, not a rank, independent of other files."""
    position = int(digest[:13], 16) / 16**13
    return next(split for split, bound in BOUNDS.items() if position < bound)


def _no_images(name: str, split: SplitName, why: str) -> str:
    return (
        f"Class {name!r} has no images in the {split} split ({why}); add some, or remove the class's folder from "
        "all splits."
    )


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(each for each in folder.iterdir() if not made_by_system(each.name))
    for file in files:
        check_link(file)
        if file.is_dir():
            raise InputError(_inner_folder(file, any(_is_picture(each) for each in files)))
        if file.suffix.lower() not in SUFFIXES:
            raise InputError(f"{file} has no image suffix, and a class folder holds images only; is --data-root right?")
        if not file.is_file():
            raise InputError(f"{file} is not a regular file, and a class folder holds images only; remove it.")
    return files


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not made_by_system(file.name) and file.is_file()


def _inner_folder(inner: Path, beside_pictures: bool) -> str:
    folder = inner.parent
    if beside_pictures:
        return (
            f"{inner} is a folder inside a class, and its pictures would be ignored; "
            f"move them up into {folder}, or remove the folder."
        )
    return (
        f"{folder} looks like a class but holds folders, such as {inner.name!r}, and no pictures; split folders are "
        "called train, valid or test, class folders hold pictures, and --data-root is the folder above."
    )
