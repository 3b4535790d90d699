"""Decode once: the images of a split as one uint8 array on disk, memory-mapped by every trial and process.

An array is named by the content of its images and their side, written under a temporary name and renamed when whole,
and opened only if its checksum is right. A second, tiny file remembers which files (path, bytes, time) had which
content, so that opening does not read the images again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.config import Dataset
from harness.errors import InputError
from harness.files import replace_file, replacing

FORMAT = "1"  # raise it whenever the same images would give other arrays
MAX_PIXELS = 100_000_000  # a small file can claim more than memory holds; the largest cameras take about this many
warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # Pillow's lower bound; above ours is refused
WORKERS = os.cpu_count() or 1  # Pillow releases the interpreter while it decodes and resizes


def decoded(dataset: Dataset, items: Sequence[Any], size: int) -> NDArray[np.uint8]:
    """The items' images as a memory-mapped array [len(items), size, size, 3], decoded at the first call only.

    Raises InputError naming the file when one is no readable image.
    """
    return keyed(dataset, items, size)[1]


def content_key(dataset: Dataset, items: Sequence[Any], size: int) -> str:
    """A name for the content of these images at this size; they are decoded if they are not yet."""
    return keyed(dataset, items, size)[0]


def keyed(dataset: Dataset, items: Sequence[Any], size: int) -> tuple[str, NDArray[np.uint8]]:
    """What `content_key` and `decoded` give, for the price of one of them."""
    folder = Path(dataset.cache)
    # A file name may hold bytes that are no UTF-8; Python shows them as lone surrogates.
    stamp = _digest([FORMAT, str(size)], (dataset.stamp(item).encode(errors="surrogatepass") for item in items))
    remembered = folder / f"{stamp}.key"
    key = before = remembered.read_text(errors="replace") if remembered.exists() else ""
    images = _open(folder, key) if key else None
    if images is not None:
        return key, images
    with ThreadPoolExecutor(WORKERS) as pool:
        key = _digest([FORMAT, str(size)], pool.map(lambda item: hashlib.sha256(dataset.content(item)).digest(), items))
        images = _open(folder, key) if key != before else None  # else it was found damaged just now
        if images is None:
            squares = pool.map(lambda item: square(dataset.open(item), size), items)
            _write(folder, key, (len(items), size, size, 3), squares)
            images = _open(folder, key)
    if images is None:
        raise OSError(f"The image cache {folder / key}.npy was written and cannot be read back; check the disk.")
    replace_file(remembered, key.encode(), _mark())
    return key, images


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre square [size, size, 3], after the short side was resized to `size` with antialiased bicubics.

    This is the evaluation preset of the pretrained weights (torchvision's ImageClassification), rounding included.
    """
    width, height = image.size
    if (width, height) != (size, size):
        short = min(width, height)
        width, height = size * width // short, size * height // short
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8)


def _digest(first: Sequence[str], rest: Iterator[bytes]) -> str:
    digest = hashlib.sha256("\x1f".join(first).encode())
    for part in rest:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def _open(folder: Path, key: str) -> NDArray[np.uint8] | None:
    """The array if it is there and whole, else None; a damaged one is named on stderr and will be made again."""
    array, record = folder / f"{key}.npy", folder / f"{key}.json"
    if not (array.exists() and record.exists()):
        return None
    with array.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _checksum(record):
            print(f"The image cache {array} is damaged (its checksum is wrong) and is made again.", file=sys.stderr)
            return None
    try:
        # Not `np.load`, which also opens zip archives and, if asked to, pickles.
        images: NDArray[np.uint8] = np.lib.format.open_memmap(array, mode="r")
    except ValueError:
        print(f"The image cache {array} is no array of images and is made again.", file=sys.stderr)
        return None
    return images


def _checksum(record: Path) -> str | None:
    try:
        return str(json.loads(record.read_bytes())["sha256"])
    except (ValueError, LookupError, TypeError):
        return None


def _write(folder: Path, key: str, shape: tuple[int, ...], squares: Iterator[NDArray[np.uint8]]) -> None:
    """Write array and record, each whole or not at all. Raises Halt when there is no room."""
    array = folder / f"{key}.npy"
    with replacing(array, _mark()) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        for image in squares:
            file.write(image.tobytes())
    with array.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    replace_file(folder / f"{key}.json", json.dumps({"shape": shape, "sha256": checksum}).encode(), _mark())


def _mark() -> str:
    """Several processes may make the same cache at the same time."""
    return f".{uuid.uuid4().hex}"


class ImageFiles:
    """The part of a data set that all of those made of image files share: an item is the file's path."""

    def stamp(self, item: Path) -> str:
        stat = item.stat()
        return f"{item.resolve()}\x1f{stat.st_size}\x1f{stat.st_mtime_ns}"

    def content(self, item: Path) -> bytes:
        return item.read_bytes()

    def open(self, item: Path) -> Image.Image:
        return open_image(item)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Not ImageOps.exif_transpose: that writes the whole EXIF anew and fails at a single wrong field."""
    turn = TURNS.get(image.getexif().get(0x0112, 1))
    if image.mode.startswith("I;16"):  # Pillow's own conversion would cut everything above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if turn is None else image.transpose(turn)


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB, upright as its EXIF orientation says.

    Raises InputError naming the file when it is truncated, no image, or too large to be decoded safely.
    """
    try:
        with Image.open(path) as image:  # reads the header only
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{path} says that it has {width} x {height} pixels, and more than {MAX_PIXELS:,} are not decoded; "
                    "replace it by a smaller one or take it out."
                )
            upright = _upright(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                backdrop = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(backdrop, upright.convert("RGBA"))
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); replace it or take it out.") from error
