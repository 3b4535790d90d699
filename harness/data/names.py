"""What classes are called: names that can be written everywhere and told apart, and the file that gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from harness.errors import InputError, is_utf8, shown

LONGEST = 255  # characters; no folder's name is longer


def check_text(text: str, what: str) -> None:
    """Raise InputError unless `text`, which is `what`, can be written into every file and shown on one line."""
    if not is_utf8(text):
        raise InputError(f"{what} is no UTF-8 ({shown(text)}), and could not be written into results; rename it.")
    if any(category(each) in ("Cc", "Zl", "Zp") for each in text):
        raise InputError(f"{what} has a line break or another control character ({shown(text)}); rename it.")
    if len(text) > LONGEST:
        raise InputError(f"{what} has {len(text):,} characters ({shown(text[:20])} …); give one of at most {LONGEST}.")
    if not look(text):
        raise InputError(f"{what} is blank; give it a name that can be read.")


def check_names(names: Sequence[str], keys: Sequence[str], where: str) -> None:
    """Raise InputError unless every class has a name of its own. Their `keys` are what a user knows them by."""
    seen: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        check_text(name, f"The name of class {key!r} {where}")
        if (other := seen.setdefault(look(name), key)) != key:
            raise InputError(
                f"The classes {told_apart(other, key)} would both be shown as {name!r} {where}; give each a name of "
                "its own, or make them one class."
            )


def look(name: str) -> str:
    """What is seen of a name: composed, without signs that have no width, blanks as one space."""
    return " ".join("".join(each for each in normalize("NFC", name) if category(each) != "Cf").split())


def told_apart(one: str, other: str) -> str:
    """Both names, with escapes where only the form of Unicode differs; quotes show the other differences."""
    quoted = ascii if normalize("NFC", one) == normalize("NFC", other) else repr
    return f"{quoted(one)} and {quoted(other)}"


def read_names(path: Path) -> dict[str, str]:
    """The names that a JSON file gives to class folders, both in NFC. Raises InputError when it is none, or unclear."""
    try:
        names: Any = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a JSON map of class names ({error}).") from error
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise InputError(f"{path} must be a JSON object that maps folder names to class names.")
    return {key: normalize("NFC", name) for key, name in names.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with its keys in NFC; `json` alone takes the last of two values of one key."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        composed = normalize("NFC", key)
        if found.setdefault(composed, value) != value:
            raise ValueError(f"it names {composed!r} twice")
    return found
