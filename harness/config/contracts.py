"""What a data set and a backbone must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn


SplitName = Literal["train", "val", "test"]


class Dataset(Protocol):
    """What a data set must offer. See `harness.data.image_folder` for one; a new one is a file beside it.

    It may offer `remarks() -> list[str]`, sentences that are said once, when a study starts on it.
    """

    @property
    def image_size(self) -> int: ...  # side of the square the model sees, pixels
    @property
    def stored_size(self) -> int: ...  # side of the cached training images; the margin is for crops
    @property
    def limit(self) -> int | None: ...  # at most that many images per split
    @property
    def cache(self) -> str: ...  # folder of the decoded images
    def __hash__(self) -> int: ...  # frozen dataclasses have it; loaded splits are kept by it
    def classes(self) -> tuple[str, ...]: ...
    def samples(self, split: SplitName) -> Sequence[tuple[Any, int]]:
        """(item, label) of every image of a split; an item is whatever `open` takes."""
        ...

    def stamp(self, item: Any) -> str:
        """A cheap mark that changes when the item does (path, bytes, time)."""
        ...

    def content(self, item: Any) -> bytes:
        """The bytes that decide the item's pixels."""
        ...

    def open(self, item: Any) -> Image.Image:
        """The decoded image; raises InputError naming the file if it is none."""
        ...


class Backbone(Protocol):
    """What a model family must offer. See `harness.models.maxvit`."""

    def check(self, image_size: int) -> None:
        """Raise InputError when the model cannot take images of this side, or its weights cannot be had."""
        ...

    def build(self, classes: int, image_size: int) -> nn.Module:
        """The model with a new head for `classes` classes."""
        ...

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        """Prefixes of parameter names from the first block to the head, one a depth; the longest that fits counts."""
        ...

    def weights(self) -> str:
        """A fingerprint of the pretrained weights, or "none": a study is not continued with others."""
        ...
