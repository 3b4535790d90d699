"""Find images in more than one split: the same bytes, or nearly the same picture.

A model may have memorised a test image that it was trained on. Nothing is removed, as others report on the official
split; the pairs are counted and named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.base.errors import Halt
from harness.base.files import replace_file
from harness.config.contracts import Dataset, SplitName
from harness.data.cache import WORKERS, read_record
from harness.data.layout import split_of
from harness.data.splits import item_name

if TYPE_CHECKING:
    import torch

FORMAT = 3  # increment when the same images give other pairs
SIDE = 32  # pixels of the grey square that is hashed
LOW = 8  # low frequencies per side in the hash
# Differing bits of 64, and correlation of the grey squares. Checked by eye on Oxford Flowers-102: pairs just inside
# show one flower twice, pairs just outside two flowers of a species.
NEAR_BITS, NEAR_CORRELATION = 12, 0.92
MOST = 10_000  # pairs of a kind (also in report.html): frames of one fixed camera are all nearly equal
ROWS = 512  # hashes compared with all others at once

Pair = tuple[int, int]


def find(dataset: Dataset, images: dict[SplitName, tuple[Sequence[Any], torch.Tensor]], cache: Path) -> dict[str, Any]:
    """Find the pairs across splits, given each split's items and images, uint8 [N, side, side, 3].

    `exact` pairs have the same bytes. `near` ones have perceptual hashes (pHash: the signs of the low cosine
    frequencies of a small grey image; Zauner, 2010) at most 12 of 64 bits apart, and grey images with a correlation of
    at least 0.92: one photograph in two sizes, or two of one flower a moment apart. There are MOST of each at most. The
    result is cached in the folder `cache`.
    """
    names = [_name(dataset, split, item) for split, (items, _) in images.items() for item in items]
    place = [split for split, (items, _) in images.items() for _ in items]
    contents = contents_of(dataset, [item for items, _ in images.values() for item in items])
    described = json.dumps([FORMAT, NEAR_BITS, NEAR_CORRELATION, place, names, contents]).encode(errors="surrogatepass")
    kept = cache / "duplicates" / f"{hashlib.sha256(described).hexdigest()[:32]}.json"
    if (before := read_record(kept)).keys() >= {"images", "exact", "near"}:
        return before
    across = sorted(islice((pair for pair in _equal(contents) if place[pair[0]] != place[pair[1]]), MOST))
    squares = np.concatenate([grey(pixels) for _, pixels in images.values()])
    seen = islice((pair for pair in near_pairs(squares) if place[pair[0]] != place[pair[1]]), MOST + len(across))
    near = sorted(set(seen) - set(across))[:MOST]
    found: dict[str, Any] = {"images": len(names)} | {
        kind: [[names[first], names[second]] for first, second in pairs]
        for kind, pairs in (("exact", across), ("near", near))
    }
    with contextlib.suppress(Halt):  # in a read-only folder, the images are compared every time
        replace_file(kept, json.dumps(found, indent=1).encode())
    return found


def contents_of(dataset: Dataset, items: Sequence[Any]) -> list[str]:
    """Return the sha256 of each item's content."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda item: hashlib.sha256(dataset.content(item)).hexdigest(), items))


def _name(dataset: Dataset, split: SplitName, item: Any) -> str:
    """Return an item's name; with the split, unless the path has it."""
    text = item_name(dataset, item)
    return text if split_of(text.split("/")[0]) == split else f"{text} ({split})"


def _equal(contents: Sequence[str]) -> Iterator[Pair]:
    places = defaultdict(list)
    for place, content in enumerate(contents):
        places[content].append(place)
    return (pair for same in places.values() for pair in combinations(same, 2))


def grey(images: torch.Tensor) -> NDArray[np.float32]:
    """Small grey squares, float32 [N, 32, 32], of images uint8 [N, side, side, 3]: each pixel the mean of an area."""

    def small(image: torch.Tensor) -> NDArray[np.float32]:
        whole = Image.fromarray(image.numpy()).convert("L")
        return np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)

    with ThreadPoolExecutor(WORKERS) as pool:
        return np.stack(list(pool.map(small, images)))


def hashes(squares: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The perceptual hash, uint64 [N], of grey squares [N, 32, 32]: which low frequencies are above their median."""
    from scipy.fft import dctn

    low = dctn(squares, axes=(1, 2), norm="ortho")[:, :LOW, :LOW].reshape(len(squares), -1)
    above = low > np.median(low[:, 1:], axis=1, keepdims=True)  # the first is the brightness
    return np.packbits(above, axis=1).view(np.uint64)[:, 0]


def near_pairs(squares: NDArray[np.float32]) -> Iterator[Pair]:
    """Yield pairs of nearly equal grey squares [N, 32, 32]."""
    marks = hashes(squares)
    flat = squares.reshape(len(squares), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    for start in range(0, len(marks), ROWS):
        differing = np.bitwise_count(marks[start : start + ROWS, None] ^ marks[None, :])
        for row, column in np.argwhere(differing <= NEAR_BITS):
            first, second = start + int(row), int(column)
            if first < second and float(unit[first] @ unit[second]) >= NEAR_CORRELATION:
                yield first, second
