"""Measure images/s from the cache to augmented batches, against DataLoader: `python -m benchmarks.input_path`

    python -m benchmarks.input_path --data-root ../shared      the photographs of Flowers-102 (else drawn flowers)
    python -m benchmarks.input_path --device cuda              on another device

The peer is torch's DataLoader with Pillow and torchvision's transforms v2 doing the same: a random resized crop of the
same areas and ratios, flip, rotation, brightness and hue, normalisation. Its workers persist between epochs. It reads
the photographs at their own size (short side 256 px), the harness the cached arrays at 256 px.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Samples
from torchvision.transforms import v2

from benchmarks.flower_files import flower_folder
from benchmarks.measure import ROOT_HELP, alternate, ratios, script
from harness.config.contracts import Dataset
from harness.config.train import AugmentConfig
from harness.data.augment import IMAGENET, augment
from harness.data.splits import ImageSet, load_splits
from harness.datasets.flowers102 import Flowers102
from harness.datasets.image_folder import ImageFolder

BATCH, CONFIG = 32, AugmentConfig()


class Photographs(Samples[Any]):
    """What a competent person writes: open the file, transform Pillow's image, make a tensor of it."""

    def __init__(self, samples: list[tuple[Path, int]], size: int) -> None:
        self.samples = samples
        self.transform = v2.Compose(
            [
                v2.RandomRotation(CONFIG.rotation_degrees, v2.InterpolationMode.BILINEAR),
                v2.RandomResizedCrop(size, CONFIG.crop_scale, CONFIG.crop_ratio),
                v2.RandomHorizontalFlip(CONFIG.flip),
                v2.ColorJitter(brightness=CONFIG.brightness, hue=CONFIG.hue),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET.mean, IMAGENET.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return self.transform(Image.open(path).convert("RGB")), label


def loader(data: Dataset, workers: int) -> DataLoader[Any]:
    torch.manual_seed(0)
    photographs = Photographs(list(data.samples("train")), data.image_size)
    more: dict[str, Any] = {"persistent_workers": True} if workers else {}
    return DataLoader(
        photographs, BATCH, shuffle=True, num_workers=workers, pin_memory=torch.cuda.is_available(), **more
    )


def ours(train: ImageSet, size: int, device: torch.device) -> float:
    """Images a second over one epoch."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for batch in torch.randperm(len(train), generator=generator).split(BATCH):
        images = train.stored(batch, device)
        augment(images, CONFIG, size, generator)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return len(train) / (time.perf_counter() - start)


def theirs(batches: DataLoader[Any], device: torch.device) -> float:
    """Images a second over one epoch; its workers run already."""
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        images.to(device, non_blocking=True)
        count += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


@contextmanager
def contestants(root: str | None, device: torch.device, limit: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Ours and DataLoader with 0 and with 2 workers, on the photographs under `root` or on drawn flowers."""
    with tempfile.TemporaryDirectory() as place:
        data: Dataset
        if root is None:
            data = ImageFolder(root=str(flower_folder(Path(place) / "flowers", limit)), cache=f"{place}/cache")
        else:
            data = Flowers102(root=root, cache=f"{place}/cache")
        train = load_splits(data, IMAGENET).train.on(device)
        ahead = {workers: loader(data, workers) for workers in (0, 2)}
        runs: dict[str, Callable[[], float]] = {"ours": lambda: ours(train, data.image_size, device)}
        for workers, batches in ahead.items():
            theirs(batches, device)  # starts the workers, and has the files in the page cache
            runs[f"DataLoader, {workers} workers"] = functools.partial(theirs, batches, device)
        runs["ours"]()
        yield runs


def full(data_root: str | None, device: str, rounds: int) -> None:
    with contestants(data_root, torch.device(device), 512) as runs:
        figures = alternate(runs, rounds)
    print(f"{'photographs' if data_root else 'drawn flowers'}, 224 px, batches of {BATCH}, {device}")
    for name, each in figures.items():
        print(f"{name:<24} {each.text('images/s', 0)}")
        if name != "ours":
            print(f"{'':<24} ours is {ratios(figures['ours'], each).text('times as fast', 2)}")


def quick() -> dict[str, float]:
    with contestants(None, torch.device("cpu"), 64) as runs:
        figures = alternate(runs, 3)
    return {
        f"against_{name.split()[1]}_workers": ratios(figures["ours"], each).median
        for name, each in figures.items()
        if name != "ours"
    }


if __name__ == "__main__":
    options = {"--data-root": {"help": ROOT_HELP}, "--device": {"default": "cpu"}}
    script(full, quick, {**options, "--rounds": {"type": int, "default": 5}})
