"""Load a data set as tensors: the splits for the search, and, separately, the test split."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from harness.base.errors import InputError, no_room, shown
from harness.base.seeds import derive_seed
from harness.config.contracts import Dataset, Preprocessing, SplitName, Square
from harness.config.study import Study
from harness.config.train import TrainConfig
from harness.data.cache import content_keys, keyed
from harness.data.layout import check_names

if TYPE_CHECKING:
    import torch


SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
MOST_CLASSES = 2**16  # predictions are stored in 16 bits
SHARE_OF_DEVICE = 1 / 4  # of its free memory, for images
JOINED_BYTES = 2**30  # most that the final run joins in memory; more is mapped from a file of its own


class Runtime(Protocol):
    """Protocol of `harness.training.step.Runtime`: a device, and the memory format of a batch."""

    @property
    def device(self) -> torch.device: ...
    def move(self, images: torch.Tensor) -> torch.Tensor: ...


class Reader:
    """Reads a batch's images in another thread, beside the step before; into pinned memory for a CUDA device."""

    def __init__(self, images: torch.Tensor, device: torch.device) -> None:
        self._images, self._device = images, device
        self._thread = ThreadPoolExecutor(1)
        self._expected: tuple[torch.Tensor, Future[torch.Tensor]] | None = None

    def expect(self, chosen: torch.Tensor) -> None:
        """Begin to read the chosen images, int64 [B]."""
        self._expected = chosen, self._thread.submit(self._read, chosen)

    def read(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the chosen images, int64 [B], as stored, in host memory."""
        expected, self._expected = self._expected, None
        if expected is None or expected[0] is not chosen:  # an epoch's first batch, or after an interruption
            return self._read(chosen)
        return expected[1].result()

    def _read(self, chosen: torch.Tensor) -> torch.Tensor:
        import torch

        found = _chosen(self._images, chosen)
        if self._device.type != "cuda":
            return found
        with torch.cuda.device(self._device):  # a thread begins with the first one
            return found.pin_memory()  # then the copy to the device waits for nothing


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """`images` uint8 [N, side, side, 3], mapped from the cache and never written to; `labels` int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor
    preprocessing: Preprocessing
    key: str = ""  # cache key of the images; empty if they are of several splits
    reader: Reader | None = None  # for a CUDA device on which they have no room

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def stored(self, chosen: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the chosen images, int64 [B], as stored: uint8 [B, side, side, 3] on the device."""
        if self.reader:
            return self.reader.read(chosen).to(device, non_blocking=True)
        return _chosen(self.images, chosen).to(device)

    def expect(self, chosen: torch.Tensor) -> None:
        """Begin to read the next batch's images, if they are read in another thread."""
        if self.reader:
            self.reader.expect(chosen)

    def batch(
        self, chosen: torch.Tensor, config: TrainConfig, runtime: Runtime, generator: torch.Generator
    ) -> torch.Tensor:
        """Return the chosen images [B] for a training step: augmented anew, float32 [B, 3, H, W] on the device."""
        from harness.data.augment import augment

        stored = self.stored(chosen, runtime.device)
        size = config.augment.early_size or config.data.image_size
        return runtime.move(augment(stored, config.augment, size, generator, self.preprocessing))

    def parts(self, size: int, runtime: Runtime) -> Iterator[torch.Tensor]:
        """Yield all images for an evaluation, `size` at a time: float32 [size, 3, H, W] on the device."""
        from harness.data.augment import normalise

        for part in self.images.split(size):
            yield normalise(part.to(runtime.device), self.preprocessing)

    def on(self, device: torch.device) -> ImageSet:
        """Move these images to a CUDA device if they fit there comfortably; else read them beside the steps before.

        An epoch then sends only each batch's maps to the device. All trials of a process share the copy.
        """
        return self if device.type != "cuda" else _on_cuda(self, device)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The splits for the search; without test split on purpose, see `load_test`."""

    classes: tuple[str, ...]
    train: ImageSet  # at the stored size, with a margin for crops
    val: ImageSet  # at the model's input size


@lru_cache(maxsize=4)  # by identity, as no two sets have the same tensors
def _on_cuda(images: ImageSet, device: torch.device) -> ImageSet:
    if not fits(images.images.nbytes, free_bytes(device)):
        return replace(images, reader=Reader(images.images, device))
    return replace(images, images=images.images.to(device), labels=images.labels.to(device))


def _chosen(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    # index_select copies whole images; images[chosen] goes byte by byte, which takes four times as long.
    return images.index_select(0, chosen.to(images.device))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a CUDA device, with what this process has reserved and does not use."""
    import torch

    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved


def fits(size_bytes: int, free_bytes: int) -> bool:
    """Return whether data leave enough free device memory for training."""
    return size_bytes <= free_bytes * SHARE_OF_DEVICE


def content_of(study: Study) -> dict[str, str]:
    """Return fingerprints of the images and weights; the first call decodes the images."""
    weights = ", ".join(each.fingerprint() for each in study.backbones())
    return {"data": prepare(study.train.data, *study.preprocessings()), "weights": weights}


def prepare(dataset: Dataset, *preprocessings: Preprocessing) -> str:
    """Decode every image that a study needs, test images too, so that a bad file is reported before the start.

    Returns a fingerprint of all images and labels for each preprocessing. Raises InputError if the data are missing,
    a class is missing from a split, or a file is not an image.
    """
    for loaded in (classes_of, _load, load_train_and_val, _on_cuda):
        loaded.cache_clear()  # in a program's second study, files may have changed
    check_names(dataset.classes(), dataset.classes(), "in the data set")
    if len(dataset.classes()) > MOST_CLASSES:
        raise InputError(f"The data set has {len(dataset.classes()):,} classes; at most {MOST_CLASSES:,} are possible.")
    try:
        Path(dataset.cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if no_room(error):
            raise
        raise InputError(f"data.cache {dataset.cache} cannot be created ({error.strerror}); give a folder.") from error
    return ", ".join(_prepare(dataset, each) for each in dict.fromkeys(preprocessings))


def _prepare(dataset: Dataset, preprocessing: Preprocessing) -> str:
    digest = hashlib.sha256()
    evaluation, training = preprocessing.evaluation(dataset.image_size), preprocessing.training(dataset.stored_size)
    sizes: dict[SplitName, list[Square]] = {"train": [training], "val": [evaluation, training], "test": [evaluation]}
    for split, each in sizes.items():
        items, labels = _select(dataset, split)
        keys = content_keys(dataset, items, each)
        for size in each:
            digest.update(f"{keys[size]} {labels}".encode())
    return digest.hexdigest()[:16]


def remarks(dataset: Dataset) -> list[str]:
    """Return remarks about the data before a start: ignored files, and classes that are missing from a split."""
    said, classes = list(getattr(dataset, "remarks", list)()), dataset.classes()
    counts = {split: Counter(label for _, label in dataset.samples(split)) for split in SPLITS}
    every = sum(counts.values(), Counter())
    if dataset.limit is not None and (beyond := len(classes) - dataset.limit) > 0:
        said.append(f"data.limit={dataset.limit} leaves {beyond} of {len(classes)} classes without a training image.")
    for split in SPLITS:
        if absent := [label for label in range(len(classes)) if label not in counts[split]]:
            have, them = ("has", "it") if len(absent) == 1 else ("have", "them")
            said.append(
                f"{len(absent)} of {len(classes)} classes {have} no image in the {split} split, which does not measure "
                f"{them} ({classes[absent[0]]!r} has {every[absent[0]]} in total); add some."
            )
    return [shown(each) for each in said]


def count(dataset: Dataset) -> int:
    """Count the images of a study, of all splits."""
    return sum(len(_select(dataset, split)[0]) for split in SPLITS)


@lru_cache(maxsize=8)
def classes_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the classes; those of the start, as are the images, should the folders change while trials run."""
    return dataset.classes()


def load_splits(dataset: Dataset, preprocessing: Preprocessing) -> Splits:
    return Splits(
        classes=classes_of(dataset),
        train=load_split(dataset, preprocessing, "train", margin=True),
        val=load_split(dataset, preprocessing, "val"),
    )


def load_split(
    dataset: Dataset, preprocessing: Preprocessing, split: Literal["train", "val"], *, margin: bool = False
) -> ImageSet:
    """Load one split of the search, as for an evaluation or, with a `margin` for crops, to train on."""
    size = preprocessing.training(dataset.stored_size) if margin else preprocessing.evaluation(dataset.image_size)
    return _load(dataset, split, size, preprocessing)


def items_of(dataset: Dataset, split: SplitName) -> list[Any]:
    """Return the items of a split's images, in order."""
    return _select(dataset, split)[0]


def item_name(dataset: Dataset, item: Any) -> str:
    """Return a file's path in the data root, or another item's text."""
    root = getattr(dataset, "root", None)
    inside = root is not None and isinstance(item, Path) and item.is_relative_to(root)
    return shown(item.relative_to(root).as_posix() if inside else str(item))


@lru_cache(maxsize=1)  # all seeds of the final run share them, here and on a device
def load_train_and_val(dataset: Dataset, preprocessing: Preprocessing) -> ImageSet:
    """Load both as one training set, for the final run."""
    import torch

    train, val = (load_split(dataset, preprocessing, split, margin=True) for split in ("train", "val"))
    if train.images.nbytes + val.images.nbytes > JOINED_BYTES:
        items = [*items_of(dataset, "train"), *items_of(dataset, "val")]
        _, images = _mapped(dataset, items, preprocessing.training(dataset.stored_size))
    else:
        images = torch.cat([train.images, val.images])
    labels = torch.cat([train.labels, val.labels])
    return ImageSet(images=images, labels=labels, preprocessing=preprocessing)


def load_test(dataset: Dataset, preprocessing: Preprocessing) -> ImageSet:
    """Load the test split. Only `harness.final.test_set` calls it, once the search is over; a test checks it."""
    return _load(dataset, "test", preprocessing.evaluation(dataset.image_size), preprocessing)


@lru_cache(maxsize=8)  # the mapped arrays and their checksums serve every trial of this process
def _load(dataset: Dataset, split: SplitName, size: Square, preprocessing: Preprocessing) -> ImageSet:
    import torch

    items, labels = _select(dataset, split)
    key, images = _mapped(dataset, items, size)
    return ImageSet(images=images, labels=torch.tensor(labels, dtype=torch.int64), preprocessing=preprocessing, key=key)


def _mapped(dataset: Dataset, items: Sequence[Any], size: Square) -> tuple[str, torch.Tensor]:
    """Return the cache key of images, and the images, mapped from the cache."""
    import torch

    with warnings.catch_warnings():
        # torch warns that a read-only array gives a writable tensor; nothing here writes into one.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        key, array = keyed(dataset, items, [size])[size]
        return key, torch.from_numpy(array)


def _select(dataset: Dataset, split: SplitName) -> tuple[list[Any], list[int]]:
    """The items and labels of a split, `dataset.limit` of them at most, spread evenly over the classes."""
    samples = dataset.samples(split)
    present = {label for _, label in samples}
    # Every class needs training images; `remarks` names a class that is not measured.
    if not samples or (split == "train" and len(present) < len(dataset.classes())):
        absent = next(name for label, name in enumerate(dataset.classes()) if label not in present)
        raise InputError(
            f"Class {absent!r} has no images in the {split} split; add some, or remove the class from the data set."
        )
    if dataset.limit is not None and dataset.limit < len(samples):
        samples = _spread(samples, dataset.limit, derive_seed("limit", split))
    return [item for item, _ in samples], [label for _, label in samples]


def _spread(samples: Any, limit: int, seed: int) -> list[tuple[Any, int]]:
    """`limit` samples: the first of every class in a seeded order, then the second of every class, and so on."""
    order = np.random.default_rng(seed).permutation(len(samples))
    rank, ranked = Counter[int](), []
    for index in order.tolist():
        label = samples[index][1]
        ranked.append((rank[label], label, index))
        rank[label] += 1
    chosen = sorted(index for _, _, index in sorted(ranked)[:limit])
    return [samples[index] for index in chosen]
