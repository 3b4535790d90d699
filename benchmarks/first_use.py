"""Measure filling and reopening the image cache, against plain decoding: `python -m benchmarks.first_use`

    python -m benchmarks.first_use --data-root ../shared       the 8,189 photographs of Flowers-102 (else drawn flowers)

First use is `prepare` with an empty cache: train at 256 px, val at 224 and 256 px, test at 224 px, all written and
synchronised. Its bound is to decode every image and resize it to its first size, with one thread per core, and store
nothing. Its peer is one epoch of the DataLoader of benchmarks/input_path.py over all images with two workers.
Second use is `prepare` and `load_splits` in a new process, after its imports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.flower_files import flower_folder
from benchmarks.input_path import BATCH, Photographs
from benchmarks.measure import ROOT_HELP, alternate, ratios, script
from harness.config.contracts import Square
from harness.data.augment import IMAGENET
from harness.data.cache import square
from harness.data.decoding import open_image
from harness.data.splits import prepare
from harness.datasets.flowers102 import Flowers102
from harness.datasets.image_folder import ImageFolder

CACHE = "cache"
SECOND = """
import json, sys, time
import numpy, scipy.io, torch, torchvision
from harness.data import splits as tensors
from harness.datasets import flowers102, image_folder
from harness.data.augment import IMAGENET
kind, fields = json.loads(sys.argv[1])
data = {"Flowers102": flowers102.Flowers102, "ImageFolder": image_folder.ImageFolder}[kind](**fields)
start = time.perf_counter()
tensors.prepare(data, IMAGENET)
tensors.load_splits(data, IMAGENET)
print(time.perf_counter() - start)
"""


@contextmanager
def contestants(root: str | None, limit: int) -> Iterator[tuple[int, dict[str, Callable[[], float | None]]]]:
    """How many images there are, and what is run by turns."""
    with tempfile.TemporaryDirectory() as place:
        data: Any
        if root is None:
            data = ImageFolder(root=str(flower_folder(Path(place) / "flowers", limit)), cache=f"{place}/{CACHE}")
        else:
            data = Flowers102(root=root, cache=f"{place}/{CACHE}")
        sides = {"train": data.stored_size, "val": data.image_size, "test": data.image_size}
        samples = [sample for split in sides for sample in data.samples(split)]
        wanted = [(path, side) for split, side in sides.items() for path, _ in data.samples(split)]
        for path, _ in samples:
            path.read_bytes()  # into the page cache, for all of them

        def first() -> None:
            shutil.rmtree(data.cache, ignore_errors=True)
            prepare(data, IMAGENET)

        def second() -> float:
            command = [sys.executable, "-c", SECOND, json.dumps([type(data).__name__, dataclasses.asdict(data)])]
            return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

        def plain() -> None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(lambda each: square(open_image(each[0]), Square(each[1], each[1])).shape, wanted):
                    pass

        def epoch() -> None:
            torch.manual_seed(0)
            for _ in DataLoader(Photographs(samples, data.image_size), BATCH, shuffle=True, num_workers=2):
                pass

        # The second use comes before the next first one.
        runs = {"first use": first, "second use": second, "plain decoding": plain, "DataLoader, one epoch": epoch}
        first()
        yield len(samples), runs


def full(data_root: str | None, rounds: int) -> None:
    with contestants(data_root, 512) as (count, runs):
        figures = alternate(runs, rounds)
    print(f"{count:,} {'photographs' if data_root else 'drawn flowers'}")
    for name, each in figures.items():
        print(f"{name:<24} {each.text()}")
    for name in ("plain decoding", "DataLoader, one epoch"):
        print(f"{name} / first use: {ratios(figures[name], figures['first use']).text('', 2)}")


def quick() -> dict[str, float]:
    with contestants(None, 64) as (_, runs):
        figures = alternate({name: runs[name] for name in ("first use", "plain decoding")}, 5)
    return {"plain_decoding_to_first_use": ratios(figures["plain decoding"], figures["first use"]).median}


if __name__ == "__main__":
    script(full, quick, {"--data-root": {"help": ROOT_HELP}, "--rounds": {"type": int, "default": 3}})
