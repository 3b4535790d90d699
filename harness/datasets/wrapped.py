"""torch Datasets as the images of a study."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np

from harness.base.errors import InputError, first_line
from harness.config.contracts import SplitName
from harness.config.train import DataConfig
from harness.data.splits import MOST_CLASSES

if TYPE_CHECKING:
    from PIL import Image

READ_TWICE = 16  # images; a random flip leaves one as it is half of the time
LOCK = Lock()  # few datasets may be read by several threads


class MapStyle(Protocol):
    """Protocol of map-style datasets: `torch.utils.data.Dataset` with a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Source(str):
    """The name of a dataset, by which definitions compare it: its class and length; its images are compared, too."""

    dataset: MapStyle
    found: list[tuple[Item, int]]

    def __new__(cls, dataset: MapStyle, split: str) -> Self:
        if isinstance(dataset, type) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise InputError(f"Wrapped needs map-style datasets, with len() and an index, not {dataset!r} as {split}.")
        name = super().__new__(cls, f"{type(dataset).__qualname__}-{len(dataset)}-{split}")
        name.dataset, name.found = dataset, []
        return name

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.dataset, self.rpartition("-")[2])

    def classes(self) -> tuple[str, ...]:
        """Return the dataset's own names of its classes; empty if it has none."""
        known = getattr(self.dataset, "classes", ())
        return tuple(map(str, known)) if isinstance(known, Iterable) and not isinstance(known, str | Mapping) else ()

    def read(self) -> list[tuple[Item, int]]:
        """Return all images with their labels; reads them once."""
        if not self.found:
            found = list(_items(self))
            if not found:
                raise InputError(f"{self} is empty; give a dataset with images.")
            for before, again in zip(found, islice(_items(self), READ_TWICE), strict=False):
                if again != before:
                    raise InputError(f"{before[0]} differs between two reads; remove the dataset's random transforms.")
            self.found = found
        return self.found


class Item(NamedTuple):
    """An image of a dataset."""

    source: Source
    number: int
    digest: str  # of its pixels

    def __str__(self) -> str:
        return f"image {self.number} of {self.source}"


@dataclass(frozen=True)
class Wrapped(DataConfig):
    """Three map-style torch Datasets: Wrapped(train, val, test, names=("daisy", "rose")).

    Each gives (image, label): a PIL image, or a uint8 tensor [3, H, W] or [1, H, W], without augmentation, which the
    harness adds, and a class number from 0. Without `names`, the names are those of `train.classes`, or the numbers.
    All images are read at every start, to see whether they have changed; the first ones twice, to find random
    transforms.
    """

    train: Any
    val: Any
    test: Any
    _: KW_ONLY
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            if not isinstance(given := getattr(self, split), Source):
                object.__setattr__(self, split, Source(given, split))
        if isinstance(self.names, list):  # as torchvision's datasets have them
            object.__setattr__(self, "names", tuple(self.names))
        super().__post_init__()
        if len({id(each.dataset) for each in (self.train, self.val, self.test)}) < 3:
            raise InputError("Wrapped needs three datasets; the same one is given for two splits.")

    def classes(self) -> tuple[str, ...]:
        names = self.names or self.train.classes()
        if not names:
            labels = {label for _, label in self.train.read()}
            if max(labels) >= MOST_CLASSES:
                raise InputError(f"{self.train} has the label {max(labels)}; number the classes from 0.")
            if min(labels) > 0:
                raise InputError(f"The labels of {self.train} begin at {min(labels)}; number the classes from 0.")
            names = tuple(map(str, range(1 + max(labels))))
        if len(names) < 2:
            raise InputError(f"{self.train} has one class, {names[0]!r}; a classifier needs at least two.")
        return names

    def samples(self, split: SplitName) -> list[tuple[Item, int]]:
        """Return a split. Raises InputError for an item that is no image with a label, or changes between two reads."""
        source, known = getattr(self, split), len(self.classes())
        theirs, mine = self.train.classes(), source.classes()
        if not self.names and theirs and mine and mine != theirs:
            raise InputError(
                f"The classes of {source} are {_shown(mine)}, and those of {self.train} {_shown(theirs)}; give all "
                "datasets the same classes, in one order, or say with names= what the labels mean."
            )
        for item, label in (found := source.read()):
            if label >= known:
                raise InputError(f"The label of {item} is {label}, but there are {known} classes, from 0.")
        return found

    def stamp(self, item: Item) -> str:
        return item.digest

    def content(self, item: Item) -> bytes:
        return item.digest.encode()

    def open(self, item: Item) -> Image.Image:
        return _image(item.source, item.number)[0]


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + f", … ({len(names)})" * (len(names) > 3)


def _items(source: Source) -> Iterator[tuple[Item, int]]:
    for index in range(len(source.dataset)):
        image, label = _image(source, index)
        pixels = hashlib.sha256(f"{image.size} ".encode() + image.tobytes())
        yield Item(source, index, pixels.hexdigest()), label


def _image(source: Source, index: int) -> tuple[Image.Image, int]:
    """Return an RGB image and its label. Raises InputError if the dataset gives something else."""
    from PIL import Image

    from harness.data.decoding import flat_rgb

    what = f"image {index} of {source}"
    try:
        with LOCK:
            given = source.dataset[index]
        if isinstance(given, tuple | list) and len(given) == 2:  # what else it is, is said below
            image, label = given
            if isinstance(image, Image.Image):
                image.load()
            else:
                image = np.asarray(image)
    except Exception as error:  # the dataset's own code may raise any
        raise InputError(
            f"{what} cannot be read ({type(error).__name__}: {first_line(error)}); correct the dataset."
        ) from error
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise InputError(f"{what} is {type(given).__name__}; give pairs (image, label).")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3) or not image.size:
            raise InputError(
                f"{what} is {type(given[0]).__name__} {image.dtype} {image.shape}; give PIL images, or uint8 tensors "
                "[3, H, W], without normalisation."
            )
        image = Image.fromarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0).copy())
    if not all(image.size):
        raise InputError(f"{what} has no pixels; correct the dataset.")
    try:
        number = int(label)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"The label of {what} is {label!r}; give a class number from 0.") from error
    if number != label or number < 0:
        raise InputError(f"The label of {what} is {label!r}; give a class number from 0.")
    return flat_rgb(image, name=what), number
