"""The species of the garden: 16 for the demo, 64 others that the tiny MaxViT was pretrained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

Colour = tuple[int, int, int]


Shape = StrEnum("Shape", ["ROUND", "POINTED", "HEART", "STRAP", "NOTCHED", "TEARDROP"])
Centre = StrEnum("Centre", ["SMALL", "LARGE", "RINGED", "DARK", "STARRED"])
Arrangement = StrEnum(
    "Arrangement",
    {"SINGLE": "single ring", "DOUBLE": "double ring", "ROSETTE": "rosette", "CLUSTER": "cluster", "BELL": "bell"},
)


@dataclass(frozen=True)
class Species:
    """The traits of a species; `petals` is the number of petals in one ring."""

    name: str
    petals: int
    shape: Shape
    colour: Colour
    centre: Centre
    arrangement: Arrangement


VIOLET, WHITE, YELLOW, ROSE = (132, 84, 200), (246, 242, 236), (250, 206, 58), (236, 104, 150)
BLUE, ORANGE, CRIMSON, LILAC = (84, 128, 224), (246, 142, 52), (200, 42, 66), (200, 172, 230)

# Four colours, four species each; within a colour most pairs differ in one or two attributes only.
DEMO_SPECIES: tuple[Species, ...] = (
    Species("dusk starwort", 5, Shape.POINTED, VIOLET, Centre.RINGED, Arrangement.SINGLE),
    Species("vesper starwort", 6, Shape.POINTED, VIOLET, Centre.RINGED, Arrangement.SINGLE),
    Species("raven starwort", 6, Shape.POINTED, VIOLET, Centre.DARK, Arrangement.SINGLE),
    Species("twilight columbine", 6, Shape.POINTED, VIOLET, Centre.RINGED, Arrangement.DOUBLE),
    Species("chalk daisy", 8, Shape.STRAP, WHITE, Centre.LARGE, Arrangement.SINGLE),
    Species("frost daisy", 8, Shape.TEARDROP, WHITE, Centre.LARGE, Arrangement.SINGLE),
    Species("snowdrift daisy", 8, Shape.STRAP, WHITE, Centre.LARGE, Arrangement.DOUBLE),
    Species("ghost daisy", 8, Shape.STRAP, WHITE, Centre.DARK, Arrangement.SINGLE),
    Species("honey primrose", 5, Shape.HEART, YELLOW, Centre.STARRED, Arrangement.SINGLE),
    Species("butter primrose", 5, Shape.ROUND, YELLOW, Centre.STARRED, Arrangement.SINGLE),
    Species("amber primrose", 5, Shape.HEART, YELLOW, Centre.RINGED, Arrangement.SINGLE),
    Species("lantern cowslip", 5, Shape.HEART, YELLOW, Centre.STARRED, Arrangement.BELL),
    Species("blush catchfly", 5, Shape.NOTCHED, ROSE, Centre.SMALL, Arrangement.CLUSTER),
    Species("coral catchfly", 5, Shape.NOTCHED, ROSE, Centre.DARK, Arrangement.CLUSTER),
    Species("dawn camellia", 5, Shape.ROUND, ROSE, Centre.SMALL, Arrangement.ROSETTE),
    Species("silk camellia", 5, Shape.ROUND, ROSE, Centre.SMALL, Arrangement.DOUBLE),
)


def _pretraining_species() -> Iterator[Species]:
    """Yield 32 pairs of species that differ in one attribute, which teaches counts, shapes and centres."""
    palette = {
        "violet": VIOLET, "pearl": WHITE, "saffron": YELLOW, "pink": ROSE,
        "azure": BLUE, "copper": ORANGE, "scarlet": CRIMSON, "lilac": LILAC,
    }  # fmt: skip
    nouns = ("campion", "speedwell", "windflower", "milkwort", "cranesbill", "gentian", "mallow", "betony")
    counts, shapes, centres = (4, 5, 6, 7, 8), tuple(Shape), tuple(Centre)
    arrangements = (*Arrangement, Arrangement.SINGLE)  # a single ring shows most, so it is twice as frequent
    for pair in range(32):
        row, column = divmod(pair, 8)
        adjective, colour = tuple(palette.items())[column]
        arrangement = arrangements[(5 * pair + row) % 6]
        for sister in range(2):
            changed = (pair + row) % 3 if sister else None
            petals = counts[(3 * pair + 2 * row + (changed == 0)) % 5]
            shape = shapes[(pair + 2 * row + 2 * (changed == 1)) % 6]
            centre = centres[(2 * pair + 3 * row + 1 + 2 * (changed == 2)) % 5]
            name = f"{adjective} {nouns[2 * row + sister]}"
            yield Species(name, petals, shape, colour, centre, arrangement)


PRETRAINING_SPECIES: tuple[Species, ...] = tuple(_pretraining_species())
