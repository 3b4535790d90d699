"""The layout of a folder of photographs: which folders are splits, which are classes, and which neither."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from harness.base.errors import InputError, is_utf8, shown
from harness.config.contracts import SplitName

LONGEST = 255  # characters of a class name; no folder's name is longer
# Names of split folders, in any case, also as "training_set" or "test-images".
SPLIT_NAMES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}
PURPOSES: dict[SplitName, str] = {"train": "training", "val": "validation", "test": "testing"}
ENDING = "(?:[-_ ]?(?:set|data|images?))?"
# Files and folders that systems and programs create; hidden ones count, too.
SYSTEM_FILES = {
    *("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The class folders of a root, by their names in Unicode's composed form (NFC)."""

    root: Path
    splits: Mapping[SplitName, Path]  # empty if the root holds class folders itself
    classes: tuple[str, ...]  # in text order, as the notebook and torchvision number them: 1, 10, 100, 101, 2, ...
    folders: Mapping[SplitName, Mapping[str, Path]]
    beside: tuple[Path, ...]  # folders beside those of the splits


def read_layout(root: Path, cache: Path) -> Layout:
    """Read a layout. Raises InputError if `root` has no classes or its splits do not match."""
    if not root.is_dir():
        raise InputError(f"There is no folder {root}; give the one that holds the images with --data-root.")
    inside = _folders_in(root, cache)
    splits = _splits(root, inside) if _is_split(inside) else {}
    every = {split: _classes(folder, _folders_in(folder, cache), split) for split, folder in splits.items()}
    every = every or dict.fromkeys(SPLIT_NAMES, _classes(root, inside))
    for split, folder in splits.items():
        if extra := sorted(every[split].keys() - every["train"].keys()):
            raise InputError(_extra_class(folder, extra[0], every["train"]))
    beside = tuple(each for each in inside if splits and each not in splits.values())
    return Layout(root=root, splits=splits, classes=tuple(sorted(every["train"])), folders=every, beside=beside)


def split_of(folder: str) -> SplitName | None:
    """Return the split that a folder's name stands for, if any."""
    for split, names in SPLIT_NAMES.items():
        if re.fullmatch(f"(?:{'|'.join(names)}){ENDING}", folder.strip().casefold()):
            return split
    return None


def made_by_system(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or created by the system."""
    return name.startswith(".") or name.casefold() in SYSTEM_FILES


def check_link(path: Path) -> None:
    """Raise InputError for a broken link: its target would be silently missing."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to {path.readlink()}, which is missing; fix or remove the link.")


def _folders_in(folder: Path, cache: Path | None = None) -> list[Path]:
    """Return the folders in a folder, except the system's and our own cache."""
    inside = [each for each in sorted(folder.iterdir()) if not made_by_system(each.name)]
    for each in inside:
        check_link(each)
    return [each for each in inside if each.is_dir() and (cache is None or each.resolve() != cache.resolve())]


def _is_split(folders: Iterable[Path]) -> bool:
    """Return whether sibling folders are splits, and not classes of which one is called `train`."""
    named = {folder: split_of(folder.name) for folder in folders}
    found = {split for split in named.values() if split is not None}
    if len(found) > 1 or (named and None not in named.values()):
        return True
    # A split holds folders, a class holds pictures.
    return any(split == "train" and _folders_in(folder) for folder, split in named.items())


def _splits(root: Path, inside: list[Path]) -> dict[SplitName, Path]:
    """Return each split's folder. Raises InputError if one has none, or two."""
    splits: dict[SplitName, Path] = {}
    for folder in inside:
        split = split_of(folder.name)
        if split is not None and (other := splits.setdefault(split, folder)) != folder:
            raise InputError(
                f"{root} has two folders for {PURPOSES[split]}, {other.name!r} and {folder.name!r}; merge them, or "
                "remove one."
            )
    _check_apart(splits.values(), "both would be a split")
    if missing := [split for split in SPLIT_NAMES if split not in splits]:
        raise InputError(_incomplete(root, splits, missing, [each for each in inside if each not in splits.values()]))
    return {split: splits[split] for split in SPLIT_NAMES}


def _incomplete(root: Path, splits: Mapping[SplitName, Path], missing: list[SplitName], others: list[Path]) -> str:
    held = _listed(splits[split] for split in SPLIT_NAMES if split in splits)
    names = {split: ", ".join(f"{name}/" for name in SPLIT_NAMES[split]) for split in missing}
    wanted = " nor ".join(f"for {PURPOSES[split]} ({names[split]})" for split in missing)
    text = f"{root} has {held}, read as {'splits' if len(splits) > 1 else 'a split'}, but no folder {wanted}"
    text += f", only {_listed(others)}; rename {held} if it is not a split, or" if others else ";"
    text += f" add {'it' if len(missing) == 1 else 'them'}"
    if "train" in splits and _folders_in(splits["train"]):
        text += f", or give {splits['train']} alone with --data-root: it is split 70 / 15 / 15 by the pictures' content"
    return f"{text}."


def _listed(folders: Iterable[Path], most: int = 3) -> str:
    names = [f"{folder.name}/" for folder in folders]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _classes(place: Path, folders: list[Path], split: SplitName | None = None) -> dict[str, Path]:
    """Return class folders by their NFC names. Raises InputError if there are too few, or their names are ambiguous."""
    found: dict[str, Path] = {}
    for folder in folders:
        check_text(folder.name, f"The name of the folder {folder}")
        if (other := found.setdefault(normalize("NFC", folder.name), folder)) != folder:
            raise InputError(
                f"{place} has two folders with one name in two Unicode forms, {told_apart(other.name, folder.name)}; "
                "merge them."
            )
    _check_apart(folders, "every picture would be in two classes")
    if split is not None and not found:
        raise InputError(_no_classes(place, split))
    if split in (None, "train") and len(found) < 2:
        raise InputError(_too_few(place, folders))
    return found


def _check_apart(folders: Iterable[Path], why: str) -> None:
    """Raise InputError if two folders are one, by a link."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (other := seen.setdefault(folder.resolve(), folder)) != folder:
            raise InputError(f"{other} and {folder} are the same folder, by a link, and {why}; remove one of them.")


def _no_classes(place: Path, split: SplitName) -> str:
    text = f"{place} is read as the {PURPOSES[split]} split but holds no class folders"
    if split == "train":
        return f"{text}; put the pictures of each class into its own folder there, {place / 'NAME OF THE CLASS'}."
    return (
        f"{text}, so its pictures have no labels; put them into class folders like those for "
        f"training. If their classes are unknown, give the training folder alone with --data-root: it is split "
        "70 / 15 / 15 by the pictures' content."
    )


def _too_few(place: Path, folders: list[Path]) -> str:
    if not folders:
        return f"{place} holds no class folders; give the folder that does with --data-root."
    if _folders_in(folders[0]):
        return f"{place} holds one folder, {folders[0].name!r}, with folders in it; give {folders[0]} with --data-root."
    return f"{place} holds one class folder, {folders[0].name!r}; a classifier needs at least two."


def _extra_class(folder: Path, name: str, known: Mapping[str, Path]) -> str:
    text = f"{folder} has a class {name!r} that the train folder lacks; the labels must match"
    like = next((each for each in sorted(known) if look(each).casefold() == look(name).casefold()), None)
    return f"{text}." if like is None else f"{text}, and {told_apart(name, like)} do not: rename one of them."


def check_text(text: str, what: str) -> None:
    """Raise InputError unless `text`, described by `what`, can be stored anywhere and shown on one line."""
    if not is_utf8(text):
        raise InputError(f"{what} is not UTF-8 ({shown(text)}) and cannot be written into results; rename it.")
    if any(category(each) in ("Cc", "Zl", "Zp") for each in text):
        raise InputError(f"{what} has a line break or another control character ({shown(text)}); rename it.")
    if len(text) > LONGEST:
        raise InputError(f"{what} has {len(text):,} characters ({shown(text[:20])} …); give one of at most {LONGEST}.")
    if not look(text):
        raise InputError(f"{what} is blank; give it a readable name.")


def check_names(names: Sequence[str], keys: Sequence[str], where: str) -> None:
    """Raise InputError unless all class names differ. `keys` are the names that the user knows."""
    seen: dict[str, tuple[int, str]] = {}
    for place, (name, key) in enumerate(zip(names, keys, strict=True)):
        check_text(name, f"The name of class {key!r} {where}")
        before, other = seen.setdefault(look(name), (place, key))
        if before != place and other == key:
            raise InputError(
                f"The classes {before} and {place} {where} have the same name, {name!r}; give them different names."
            )
        if before != place:
            raise InputError(
                f"The classes {told_apart(other, key)} would both be shown as {name!r} {where}; give them different "
                "names, or merge them."
            )


def look(name: str) -> str:
    """Return what is visible of a name: composed, no zero-width characters, blanks as one space."""
    return " ".join("".join(each for each in normalize("NFC", name) if category(each) != "Cf").split())


def told_apart(one: str, other: str) -> str:
    """Quote both names; with escapes if only their Unicode forms differ."""
    quoted = ascii if normalize("NFC", one) == normalize("NFC", other) else repr
    return f"{quoted(one)} and {quoted(other)}"


def read_names(path: Path) -> dict[str, str]:
    """Read class folders' names from a JSON file, both in NFC. Raises InputError if it is invalid or ambiguous."""
    try:
        names: Any = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a JSON map of class names ({error}).") from error
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise InputError(f"{path} must be a JSON object that maps folder names to class names.")
    return {key: normalize("NFC", name) for key, name in names.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object with NFC keys; `json` alone keeps the last of two values of one key."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        composed = normalize("NFC", key)
        if found.setdefault(composed, value) != value:
            raise ValueError(f"it names {composed!r} twice")
    return found
