"""Image cache: the images of a split as one uint8 array on disk, memory-mapped by every trial and process.

An array is named by a hash of its images and their size, written to a temporary file and renamed when complete.
Its record holds its checksum and the file's attributes (size, times, inode) when the checksum was last verified: while
they are unchanged, opening reads nothing. A third, tiny file maps image files (path, bytes, time) to their content,
so that opening does not read the images again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.base.environment import cores
from harness.base.errors import Halt, InputError
from harness.base.files import file_sha256, replace_file, replacing
from harness.config.contracts import Dataset, Square
from harness.config.train import DataConfig, location
from harness.data.decoding import check_proportions, open_image, revision

SHA256 = re.compile("[0-9a-f]{64}")
KEY = re.compile("[0-9a-f]{32}")  # from `_digest`
FORMAT = "1"  # increment when the same images give other arrays
WORKERS = cores()  # Pillow releases the GIL while it decodes and resizes


def content_keys(dataset: Dataset, items: Sequence[Any], sizes: Sequence[Square]) -> dict[Square, str]:
    """Return the cache key of these images at each size; decodes missing ones, once for all sizes."""
    return {size: key for size, (key, _) in keyed(dataset, items, sizes).items()}


def keyed(
    dataset: Dataset, items: Sequence[Any], sizes: Sequence[Square]
) -> dict[Square, tuple[str, NDArray[np.uint8]]]:
    """Return keys, and memory-mapped arrays [len(items), side, side, 3], decoded at the first call only.

    Raises InputError naming the file if it is not a readable image, or too narrow.
    """
    folder = Path(dataset.cache)
    # A file name may contain invalid UTF-8, which Python reads as lone surrogates.
    stamps = [dataset.stamp(item).encode(errors="surrogatepass") for item in items]
    remembered = {size: folder / f"{_digest(size, stamps)}.key" for size in sizes}
    before = {size: _remembered(file) for size, file in remembered.items()}
    found = {size: (key, images) for size, key in before.items() if key and (images := _open(folder, key)) is not None}
    missing = [size for size in sizes if size not in found]
    if missing:
        with ThreadPoolExecutor(WORKERS) as pool:
            contents = list(pool.map(lambda item: hashlib.sha256(dataset.content(item)).digest(), items))
            keys = {size: _digest(size, contents) for size in missing}
            # The same key again: its array is damaged.
            unmade = {size: key for size, key in keys.items() if key == before[size] or _open(folder, key) is None}
            if unmade:
                # Each image is decoded once, whatever the number of sizes.
                squares = pool.map(lambda item: _squares(dataset, item, list(unmade)), items)
                _write(folder, unmade, len(items), squares)
        for size, key in keys.items():
            if (images := _open(folder, key)) is None:
                text = f"The image cache {folder / key}.npy was written but cannot be read back; check the disk."
                raise OSError(text)
            found[size] = key, images
            with contextlib.suppress(Halt):  # in a read-only folder, the images are hashed every time
                replace_file(remembered[size], key.encode())
    return found


def _remembered(file: Path) -> str:
    """Return the key in a file; empty if the file is missing or invalid."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    return text if KEY.fullmatch(text) else ""


def _squares(dataset: Dataset, item: Any, sizes: Sequence[Square]) -> list[bytes]:
    image = dataset.open(item)
    check_proportions(item, *image.size, max(size.short_side for size in sizes))
    return [square(image, size).tobytes() for size in sizes]


def square(image: Image.Image, size: Square) -> NDArray[np.uint8]:
    """Resize the short side, antialiased, and return the centre square [side, side, 3].

    This is the evaluation preset of pretrained weights (torchvision's ImageClassification), rounding included.
    """
    width, height = image.size
    side, short_side, interpolation = size
    if (width, height) != (side, side) or short_side != side:
        short = min(width, height)
        width, height = short_side * width // short, short_side * height // short
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image, dtype=np.uint8)


def _digest(size: Square, parts: Sequence[bytes]) -> str:
    # MaxViT's preprocessing was the only one at first; its keys have not changed.
    described = size.side if size == (size.side, size.side, "bicubic") else "\x1f".join(map(str, size))
    digest = hashlib.sha256(f"{FORMAT}\x1f{described}".encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def _open(folder: Path, key: str) -> NDArray[np.uint8] | None:
    """Return the array if it exists and is intact, else None; reports a damaged one on stderr.

    Verifies the checksum if the file's size, times or inode have changed. Bit rot that leaves these unchanged is found
    by `damaged`, which reads everything.
    """
    array, record = folder / f"{key}.npy", folder / f"{key}.json"
    if not (array.exists() and record.exists()):
        return None
    known = read_record(record)
    if known.get("file") != (file := _state(array)):
        if file_sha256(array) != known.get("sha256"):
            print(f"The image cache {array} is damaged (its checksum is wrong); rebuilding it.", file=sys.stderr)
            return None
        with contextlib.suppress(Halt):  # in a read-only folder, the checksum is verified every time
            replace_file(record, json.dumps(known | {"file": file}).encode())
    try:
        # Not `np.load`, which also opens zip archives and, if asked to, pickles.
        return np.lib.format.open_memmap(array, mode="r")
    except ValueError:
        print(f"The image cache {array} is not an image array; rebuilding it.", file=sys.stderr)
        return None


def damaged(folder: Path) -> Iterator[Path]:
    """Yield the arrays in a cache folder whose checksum is wrong; reads all of them."""
    for array in sorted(folder.glob("*.npy")):
        record = array.with_suffix(".json")
        if record.exists() and file_sha256(array) != read_record(record).get("sha256"):
            yield array


def _state(array: Path) -> list[int]:
    """Return attributes that writing, replacing or copying changes."""
    stat = array.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_record(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if the file is missing or invalid."""
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(folder: Path, keys: Mapping[Square, str], count: int, rows: Iterator[list[bytes]]) -> None:
    """Write an array and its record per size, each atomically; a row is an image in every size.

    Raises Halt if the disk is full.
    """
    shapes = [(count, size.side, size.side, 3) for size in keys]
    arrays = [folder / f"{key}.npy" for key in keys.values()]
    checksums = [hashlib.sha256() for _ in keys]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(replacing(array)) for array in arrays]
        for row in chain([[_header(shape) for shape in shapes]], rows):
            for file, checksum, part in zip(files, checksums, row, strict=True):
                file.write(part)
                checksum.update(part)
    for array, shape, checksum in zip(arrays, shapes, checksums, strict=True):
        record = {"shape": shape, "sha256": checksum.hexdigest(), "file": _state(array)}
        replace_file(array.with_suffix(".json"), json.dumps(record).encode())


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a NumPy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


@dataclass(frozen=True, kw_only=True)
class ImageFiles(DataConfig):
    """Base of data sets of image files: an item is the file's path."""

    root: str = location("data")

    def stamp(self, item: Path) -> str:
        try:
            stat = os.stat(item)
        except OSError as error:
            raise InputError(f"{item} cannot be read ({error.strerror}); correct it, or remove it.") from error
        place = _real(os.path.dirname(item))
        # Increment the last number when `revision` covers more files.
        return f"{place}/{item.name}\x1f{stat.st_size}\x1f{stat.st_mtime_ns}\x1f{stat.st_ino}\x1f2"

    def content(self, item: Path) -> bytes:
        content = item.read_bytes()
        return content + revision(content)

    def open(self, item: Path) -> Image.Image:
        return open_image(item)


@lru_cache(maxsize=1024)
def _real(folder: str) -> str:
    """Return a folder's real path; cached, since it is slow for thousands of files."""
    return os.path.realpath(folder)


def content_hashes(stamps: Mapping[Path, str], kept: Path) -> dict[Path, str]:
    """Return every file's sha256, given a stamp that changes with the file; reads files with stamps not in `kept`."""
    known = {stamp: digest for stamp, digest in read_record(kept).items() if SHA256.fullmatch(str(digest))}
    unread = [file for file, stamp in stamps.items() if stamp not in known]
    with ThreadPoolExecutor(WORKERS) as pool:
        known |= zip((stamps[file] for file in unread), pool.map(file_sha256, unread), strict=True)
    if unread:
        content = json.dumps({stamp: known[stamp] for stamp in stamps.values()}).encode()
        with contextlib.suppress(Halt):  # in a read-only folder, the files are read every time
            replace_file(kept, content)
    return {file: known[stamp] for file, stamp in stamps.items()}
