"""Write JPEG files of drawn flowers, sized like Flowers-102's photographs, for measurements without them."""

from __future__ import annotations

from pathlib import Path

from harness.garden.drawing import draw
from harness.garden.species import DEMO_SPECIES

WIDTH, HEIGHT = 340, 256  # pixels; most of the photographs have about this shape


def flower_folder(root: Path, train: int) -> Path:
    """Write `train` training images and the other splits beside them, a folder a species; returns the root."""
    counts = {"train": train, "valid": len(DEMO_SPECIES), "test": len(DEMO_SPECIES)}
    for split, count in counts.items():
        for number in range(count):
            species = DEMO_SPECIES[number % len(DEMO_SPECIES)]
            folder = root / split / species.name.replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            image = draw(species, number + 10_000 * len(split), WIDTH).crop((0, 0, WIDTH, HEIGHT))
            image.save(folder / f"{number}.jpg", quality=90)
    return root
