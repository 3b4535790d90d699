"""Writing files so that there is a whole one or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from harness.errors import Halt, InputError


@contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` at the end: written under another name, synchronised, renamed.

    `mark` is part of the other name, for writers that may be at it at the same time. Raises Halt when it cannot be
    written. Plain writes: a full disk would kill a writer through a memory map.
    """
    partial = path.with_name(f"{path.name}{mark}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        raise Halt(f"{path} cannot be written ({error.strerror or error}); make room or make it writable.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes, mark: str = "") -> None:
    """Write `content` to `path`, whole or not at all. Raises Halt when it cannot be written."""
    with replacing(path, mark) as file:
        file.write(content)


def check_place(path: Path, option: str) -> None:
    """Raise InputError unless a file can be written at `path`, which `option` named; folders are not made for it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is there and no file; give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; make it, or give another.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: nothing can be written in {path.parent}; give another folder.")


def _synchronise(folder: Path) -> None:
    """Make a renaming in this folder last through a power cut; not every system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
