"""Writing files so that there is a whole one or none, and noticing one that is not what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from harness.base import processes
from harness.base.errors import Halt, InputError, no_room

METADATA = "harness"  # our entry in the header of a file of tensors
# What torch calls the types of safetensors.
TORCH_TYPES = {
    "BOOL": "bool",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
}


class Damaged(Exception):
    """A file is not what was written: its checksum is wrong, or it is of another kind."""


def sqlite_url(file: Path) -> str:
    """The URL of a SQLite file. In one, an escape is decoded and a question mark ends the name: folders have both."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def sqlite_path(url: str) -> Path | None:
    """The file that a SQLite URL names, None for other URLs."""
    scheme, found, place = url.partition(":///")
    return Path(unquote(place.partition("?")[0])) if found and scheme.partition("+")[0] == "sqlite" else None


def as_meant(url: str) -> str:
    """The URL, escaped if it was typed as a path is written: where only so there is its folder."""
    file, place = sqlite_path(url), url.partition(":///")[2]
    found = file is None or (file.parent.is_dir() and "/" not in place.partition("?")[2])
    return url if found or not Path(place).parent.is_dir() else sqlite_url(Path(place))


@contextmanager
def replacing(path: Path, check: Callable[[], object] | None = None) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` at the end: written under another name, synchronised, renamed.

    Several may write it at the same time, each under a name of its own; what writers left that are dead is removed.
    `check` is called before the renaming, and leaves `path` as it is by raising. Raises Halt when it cannot be written.
    Plain writes: a full disk would kill a writer through a memory map.
    """
    partial = path.with_name(path.name + processes.mark())
    try:
        with _opened(partial) as file:
            remove_abandoned(path)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        partial.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        remedy = "make room" if no_room(error) else "make it writable"
        remedy = "leave its folder where it is" if isinstance(error, FileNotFoundError) else remedy
        raise Halt(f"{path} cannot be written ({error.strerror or error}); {remedy}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _opened(partial: Path) -> BinaryIO:
    for _ in range(10):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has just removed the empty folder
            return partial.open("wb")
    return partial.open("wb")


def replace_file(path: Path, content: bytes, check: Callable[[], object] | None = None) -> None:
    """Write `content` to `path`, whole or not at all, as `replacing` does. Raises Halt when it cannot be written."""
    with replacing(path, check) as file:
        file.write(content)


def remove_abandoned(path: Path) -> None:
    """Remove what dead writers of a file left beside it."""
    for each in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if processes.is_partial(each.name, path.name) and processes.is_abandoned(each):
            each.unlink(missing_ok=True)


def check_tensors(path: Path) -> None:
    """Raise Damaged unless a file of tensors is what `harness.training.checkpoint.write_tensors` wrote.

    Says the same as `read_tensors` without torch, whose import takes seconds: the file's bytes go into the checksum.
    """
    from safetensors import SafetensorError, deserialize

    try:
        content = path.read_bytes()
        tensors = dict(deserialize(content))  # refuses a header that does not fit its file
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"][METADATA])
        digest = hashlib.sha256(metadata["record"].encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"\n{name} torch.{TORCH_TYPES[tensor['dtype']]} {list(tensor['shape'])}\n".encode())
            digest.update(tensor["data"])
        if digest.hexdigest() != metadata["sha256"]:
            raise Damaged(f"{path} is damaged (its checksum is wrong)")
        json.loads(metadata["record"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error


def check_place(path: Path, option: str, suffix: str, kept: Iterable[Path]) -> None:
    """Raise InputError unless a file can be written at `path`, which `option` named; folders are not made for it.

    It may replace an older file of its kind, by the `suffix`, but nothing of another kind, and none of the files and
    folders in `kept`, nor what lies in them.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is there and no file; give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; make it, or give another.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: nothing can be written in {path.parent}; give another folder.")
    place = path.resolve()
    if not {each.resolve() for each in kept}.isdisjoint([place, *place.parents]):
        raise InputError(f"{option} {path} is a place of the study's own files or of the input; give another file.")
    if path.exists() and path.suffix.lower() != suffix:
        raise InputError(f"{option} {path} is there, and no *{suffix}; give a name that ends in {suffix}.")


def _synchronise(folder: Path) -> None:
    """Make a renaming in this folder last through a power cut."""
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL, None for other databases. Raises InputError when `url` is no database URL."""
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parsed = sqlalchemy.engine.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            parsed.get_dialect()  # for sqlite+NAME:// a driver of that name
    except (SQLAlchemyError, ValueError) as error:  # a ValueError for a port that is no number
        raise InputError(f"--storage {url!r} is no database URL; write sqlite:///FILE or postgresql://...") from error
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise InputError(f"--storage {url!r} lives in memory and could not be resumed; write sqlite:///FILE.")
    if parsed.database.startswith("file:"):
        raise InputError(f"--storage {url!r} names its file in SQLite's own way; write sqlite:///FILE.")
    return Path(parsed.database)
