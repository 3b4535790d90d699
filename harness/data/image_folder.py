"""Folders of photographs, one folder a class."""

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

BOUNDS: dict[SplitName, float] = {"train": 0.70, "val": 0.85, "test": 1.0}  # of a content's place between 0 and 1


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageFiles):
    """Either the folders of train, validation and test, which hold class folders, or class folders alone.

    The latter are split about 70 / 15 / 15, each photograph by its content alone: it stays in its split whatever it is
    called, and whatever is added. So a class of few photographs may have none to validate or to test on. `names` is an
    optional JSON file, in `root` unless absolute, that maps a class folder's name to the name shown to people, as the
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
                raise InputError(f"{path} names no class {missing[0]!r}; add it, or drop the file.")
            shown = tuple(names[folder] for folder in folders)
        check_names(shown, folders, where)
        return shown

    def samples(self, split: SplitName) -> list[tuple[Path, int]]:
        """Raises InputError for a class without images in the split, and for what is in a class and no image."""
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
        """What is left out, and nothing else says so."""
        layout = self._layout()
        said = [f"{folder} is left out, for it is the folder of no split." for folder in layout.beside]
        for place in (layout.root, *layout.splits.values()):
            if pictures := sorted(each for each in place.iterdir() if _is_picture(each)):
                are, lie = ("pictures are", "they lie") if len(pictures) > 1 else ("picture is", "it lies")
                said.append(f"{len(pictures)} {are} left out, such as {pictures[0]}, for {lie} in no class folder.")
        return said

    def _layout(self) -> Layout:
        return read_layout(Path(self.root), Path(self.cache))

    def _shared(self, layout: Layout) -> dict[SplitName, list[tuple[Path, int]]]:
        """The photographs of class folders that stand alone, each in the split that its content decides."""
        folders = layout.folders["train"]
        labels = {file: label for label, name in enumerate(layout.classes) for file in _images(folders[name])}
        kept = hashlib.sha256(os.path.realpath(self.root).encode(errors="surrogatepass")).hexdigest()[:32]
        hashes = content_hashes({file: self.stamp(file) for file in labels}, Path(self.cache) / f"{kept}.hashes")
        parts: dict[SplitName, list[tuple[Path, int]]] = {split: [] for split in BOUNDS}
        for file in sorted(labels, key=lambda file: (labels[file], hashes[file], file.name)):
            parts[_split_of(hashes[file])].append((file, labels[file]))
        counts, trained = Counter(labels.values()), {label for _, label in parts["train"]}
        for label, name in enumerate(layout.classes):
            if label not in trained:
                few = "none" if not counts[label] else f"only {counts[label]}, whose contents put them elsewhere"
                raise InputError(_no_images(name, "train", f"{folders[name]} holds {few}"))
        for split, part in parts.items():
            if not part:
                raise InputError(
                    f"Of the {len(labels)} pictures in {layout.root} none falls into the {split} split (70 / 15 / 15, "
                    "by their contents); add some, or sort them into train/, valid/ and test/ yourself."
                )
        return parts


def _split_of(digest: str) -> SplitName:
    """The split of a file's content: a threshold, not a rank, so that no other file has a say."""
    position = int(digest[:13], 16) / 16**13
    return next(split for split, bound in BOUNDS.items() if position < bound)


def _no_images(name: str, split: SplitName, why: str) -> str:
    return (
        f"Class {name!r} has no images in the {split} split ({why}); add some, or take the class's folder out of "
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
            raise InputError(
                f"{file} is not an image by its name, and a class folder holds images only; is --data-root right?"
            )
        if not file.is_file():
            raise InputError(f"{file} is no regular file, and a class folder holds images only; take it out.")
    return files


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not made_by_system(file.name) and file.is_file()


def _inner_folder(inner: Path, beside_pictures: bool) -> str:
    folder = inner.parent
    if beside_pictures:
        return (
            f"{inner} is a folder inside of a class, and its pictures would be left out; "
            f"move them up into {folder}, or take the folder out."
        )
    return (
        f"{folder} is taken for a class and holds folders, such as {inner.name!r}, but no pictures; a split's folder "
        "is called train, valid or test, a class's holds its pictures itself, and --data-root names the folder above."
    )
