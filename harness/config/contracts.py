"""Protocols of data sets and backbones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from harness.base.errors import InputError
from harness.config.space import check_types

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn


SplitName = Literal["train", "val", "test"]


class Dataset(Protocol):
    """Protocol of data sets. See `harness.datasets.image_folder` for an example; add new ones beside it.

    It may define `remarks() -> list[str]`, sentences that are printed once, when a study starts.
    """

    @property
    def image_size(self) -> int: ...  # side of the model's input, pixels
    @property
    def stored_size(self) -> int: ...  # side of the cached training images; the margin is for crops
    @property
    def limit(self) -> int | None: ...  # maximum images per split
    @property
    def cache(self) -> str: ...  # folder of the decoded images
    def __hash__(self) -> int: ...  # frozen dataclasses have it; key of cached splits
    def classes(self) -> tuple[str, ...]: ...
    def samples(self, split: SplitName) -> Sequence[tuple[Any, int]]:
        """Return (item, label) of every image of a split; `open` takes an item."""
        ...

    def stamp(self, item: Any) -> str:
        """Return a cheap stamp that changes with the item (path, bytes, time)."""
        ...

    def content(self, item: Any) -> bytes:
        """Return the bytes that decide the pixels."""
        ...

    def open(self, item: Any) -> Image.Image:
        """Decode the image. Raises InputError naming the file if it is invalid."""
        ...


class Square(NamedTuple):
    """How an image becomes a square: the short side resized, then the centre cut out; in pixels."""

    side: int
    short_side: int
    interpolation: str = "bicubic"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a model's weights expect images: the evaluation preset of their training.

    The short side is resized to `resize` pixels and the centre `crop` x `crop` cut out; another image size keeps the
    proportion. Then come `mean` and `std` of the channels, for values from 0 to 1.
    """

    resize: int = 224
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_types(self, "preprocessing.")
        for name, value in (("resize", self.resize), ("crop", self.crop), ("std", min(self.std))):
            if not value > 0:
                raise InputError(f"preprocessing.{name} must be positive, not {value}.")

    def evaluation(self, image_size: int) -> Square:
        """Return how images are evaluated at this size."""
        return Square(image_size, max(image_size, self.resize * image_size // self.crop), self.interpolation)

    def training(self, stored_size: int) -> Square:
        """Return how training images are stored, with a margin for random crops."""
        return Square(stored_size, stored_size, self.interpolation)


class Backbone(Protocol):
    """Protocol of model families. See `harness.models.maxvit`. A class of your own may inherit from it."""

    def check(self, image_size: int) -> None:
        """Raise InputError if the model does not accept this image size or its weights are missing."""
        ...

    def build(self, classes: int, image_size: int) -> nn.Module:
        """The model with a new head for `classes` classes."""
        ...

    def depths(self, by: Literal["block", "layer"]) -> Sequence[str | tuple[str, ...]]:
        """Return parameter name prefixes from the first block to the head, one or several per depth.

        The longest match counts. The last depth is the module of the head.
        """
        ...

    def preprocessing(self) -> Preprocessing:
        """Return how the pretrained weights expect images."""
        return Preprocessing()

    def no_decay(self) -> frozenset[str]:
        """Return names of parameters without weight decay, besides biases, norms, embeddings, tokens and scales."""
        return frozenset()

    def fingerprint(self) -> str:
        """Return a fingerprint of the pretrained weights, or "none"; resuming with others is an error."""
        ...

    def origin(self) -> str:
        """Return where the pretrained weights come from, and their licence, for the model card."""
        return self.fingerprint()


def prefixes(depth: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return a depth's prefixes."""
    return (depth,) if isinstance(depth, str) else depth


def name_of(depth: str | tuple[str, ...]) -> str:
    """Return a depth's name: its first prefix, without the dot."""
    return prefixes(depth)[0].rstrip(".")
