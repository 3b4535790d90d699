"""Write files atomically, and detect damaged ones."""

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

METADATA = "harness"  # our key in the header of a safetensors file
# safetensors types and their names in torch.
TORCH_TYPES = {
    "BOOL": "bool",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
}


class Damaged(Exception):
    """A file has changed since it was written: its checksum or its format is wrong."""


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file. Escapes % and ?, which a folder's name may contain."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def sqlite_path(url: str) -> Path | None:
    """Return the file of a SQLite URL, None for other URLs."""
    scheme, found, place = url.partition(":///")
    return Path(unquote(place.partition("?")[0])) if found and scheme.partition("+")[0] == "sqlite" else None


def as_meant(url: str) -> str:
    """Return the URL, escaped if its folder exists only under the name as typed."""
    file, place = sqlite_path(url), url.partition(":///")[2]
    found = file is None or (file.parent.is_dir() and "/" not in place.partition("?")[2])
    return url if found or not Path(place).parent.is_dir() else sqlite_url(Path(place))


@contextmanager
def replacing(path: Path, check: Callable[[], object] | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` on exit: it is written, synchronised, renamed.

    Several processes may write at once, each to its own temporary file; files of dead writers are removed.
    `check` is called before the renaming; if it raises, `path` stays as it is. Raises Halt if `path` cannot be written.
    Uses plain writes: on a full disk, writing to a memory map would kill the process.
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
        remedy = "do not move its folder" if isinstance(error, FileNotFoundError) else remedy
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


@contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Create a folder, if it is missing; remove it again if it stays empty."""
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it has files
                path.rmdir()


def replace_file(path: Path, content: bytes, check: Callable[[], object] | None = None) -> None:
    """Write `content` to `path` atomically, as `replacing` does. Raises Halt if it cannot be written."""
    with replacing(path, check) as file:
        file.write(content)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files of dead writers of `path`."""
    for each in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if processes.is_partial(each.name, path.name) and processes.is_abandoned(each):
            each.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, read in parts."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensors(path: Path) -> None:
    """Raise Damaged unless a tensor file is as `harness.training.checkpoint.write_tensors` wrote it.

    Checks the same as `read_tensors`, but on the file's bytes, without torch, whose import takes seconds.
    """
    from safetensors import SafetensorError, deserialize

    try:
        content = path.read_bytes()
        tensors = dict(deserialize(content))  # raises if the header does not fit the file
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
    """Raise InputError unless a file can be written to `path`, the value of `option`, in an existing folder.

    It may replace a file with the same `suffix`, but no other file, and none of the files and folders in `kept` or
    files inside them.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} exists and is not a file; give a file name.")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: {path.parent} is not writable; give another folder.")
    place = path.resolve()
    if not {each.resolve() for each in kept}.isdisjoint([place, *place.parents]):
        raise InputError(f"{option} {path} would replace the study's own files or the input; give another file.")
    if path.exists() and path.suffix.lower() != suffix:
        raise InputError(f"{option} {path} exists and is not a *{suffix}; use a name that ends in {suffix}.")


def _synchronise(folder: Path) -> None:
    """Make a renaming in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL, None for other databases. Raises InputError for an invalid URL."""
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parsed = sqlalchemy.engine.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            parsed.get_dialect()  # raises if sqlite+NAME:// has no driver
    except (SQLAlchemyError, ValueError) as error:  # ValueError: the port is not a number
        raise InputError(f"--storage {url!r} is not a database URL; use sqlite:///FILE or postgresql://...") from error
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise InputError(f"--storage {url!r} is in memory and cannot be resumed; use sqlite:///FILE.")
    if parsed.database.startswith("file:"):
        raise InputError(f"--storage {url!r} has SQLite's file: syntax; use sqlite:///FILE.")
    return Path(parsed.database)
