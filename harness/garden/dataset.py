"""The garden: flowers drawn by `harness.garden.drawing`, so that the whole pipeline runs offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from harness.base.seeds import derive_seed
from harness.config.contracts import SplitName
from harness.config.train import DataConfig, require_count
from harness.garden.species import DEMO_SPECIES, PRETRAINING_SPECIES, Species

if TYPE_CHECKING:
    from PIL import Image


class Seedling(NamedTuple):
    """One image to be drawn."""

    species: Species
    seed: int
    size: int  # pixels

    def __str__(self) -> str:
        return f"{self.species.name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Garden(DataConfig):
    """Drawn flowers of `species`; an image depends only on its split, species and number."""

    licence: ClassVar[str] = "Drawn by this program; no third party has rights in them."
    species: Literal["demo", "pretraining"] = "demo"
    train_per_class: int = 15
    val_per_class: int = 15
    test_per_class: int = 40
    seed: int = 0
    image_size: int = 64
    stored_size: int = 72

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_per_class", "val_per_class", "test_per_class"):
            require_count(f"data.{name}", getattr(self, name), 100_000)

    def _all(self) -> tuple[Species, ...]:
        return DEMO_SPECIES if self.species == "demo" else PRETRAINING_SPECIES

    def classes(self) -> tuple[str, ...]:
        return tuple(species.name for species in self._all())

    def samples(self, split: SplitName) -> list[tuple[Seedling, int]]:
        count = getattr(self, f"{split}_per_class")
        return [
            (Seedling(species, derive_seed(self.seed, split, number), self.stored_size), label)
            for label, species in enumerate(self._all())
            for number in range(count)
        ]

    def stamp(self, item: Seedling) -> str:
        from harness.garden.drawing import DRAWING_VERSION

        return f"{DRAWING_VERSION} {item.species} {item.seed} {item.size}"

    def content(self, item: Seedling) -> bytes:
        return self.stamp(item).encode()

    def open(self, item: Seedling) -> Image.Image:
        from harness.garden.drawing import draw

        return draw(item.species, item.seed, item.size)
