"""The species of the garden: 16 for the demo, 64 others that the tiny MaxViT was pretrained on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

Colour = tuple[int, int, int]


class Shape(StrEnum):
    ROUND = "round"
    POINTED = "pointed"
    HEART = "heart"
    STRAP = "strap"
    NOTCHED = "notched"
    TEARDROP = "teardrop"


class Centre(StrEnum):
    SMALL = "small"
    LARGE = "large"
    RINGED = "ringed"
    DARK = "dark"
    STARRED = "starred"


class Arrangement(StrEnum):
    SINGLE = "single ring"
    DOUBLE = "double ring"
    ROSETTE = "rosette"
    CLUSTER = "cluster"
    BELL = "bell"


@dataclass(frozen=True, kw_only=True)
class Species:
    """What all plants of one kind share; `petals` counts the petals of one ring."""

    name: str
    petals: int
    shape: Shape
    colour: Colour
    centre: Centre
    arrangement: Arrangement


def _species(name: str, petals: int, shape: Shape, colour: Colour, centre: Centre, arrangement: Arrangement) -> Species:
    return Species(name=name, petals=petals, shape=shape, colour=colour, centre=centre, arrangement=arrangement)


VIOLET, WHITE, YELLOW, ROSE = (132, 84, 200), (246, 242, 236), (250, 206, 58), (236, 104, 150)
BLUE, ORANGE, CRIMSON, LILAC = (84, 128, 224), (246, 142, 52), (200, 42, 66), (200, 172, 230)
GOLD, RUST, CREAM, PLUM = (246, 196, 60), (176, 104, 30), (255, 248, 214), (120, 24, 60)
BROWN, SOOT, LIME, GREEN = (66, 40, 30), (46, 28, 21), (150, 176, 70), (84, 124, 60)

# Four colours, four species each; within a colour most pairs differ in one or two attributes only.
DEMO_SPECIES: tuple[Species, ...] = (
    _species("dusk starwort", 5, Shape.POINTED, VIOLET, Centre.RINGED, Arrangement.SINGLE),
    _species("vesper starwort", 6, Shape.POINTED, VIOLET, Centre.RINGED, Arrangement.SINGLE),
    _species("raven starwort", 6, Shape.POINTED, VIOLET, Centre.DARK, Arrangement.SINGLE),
    _species("twilight columbine", 6, Shape.POINTED, VIOLET, Centre.RINGED, Arrangement.DOUBLE),
    _species("chalk daisy", 8, Shape.STRAP, WHITE, Centre.LARGE, Arrangement.SINGLE),
    _species("frost daisy", 8, Shape.TEARDROP, WHITE, Centre.LARGE, Arrangement.SINGLE),
    _species("snowdrift daisy", 8, Shape.STRAP, WHITE, Centre.LARGE, Arrangement.DOUBLE),
    _species("ghost daisy", 8, Shape.STRAP, WHITE, Centre.DARK, Arrangement.SINGLE),
    _species("honey primrose", 5, Shape.HEART, YELLOW, Centre.STARRED, Arrangement.SINGLE),
    _species("butter primrose", 5, Shape.ROUND, YELLOW, Centre.STARRED, Arrangement.SINGLE),
    _species("amber primrose", 5, Shape.HEART, YELLOW, Centre.RINGED, Arrangement.SINGLE),
    _species("lantern cowslip", 5, Shape.HEART, YELLOW, Centre.STARRED, Arrangement.BELL),
    _species("blush catchfly", 5, Shape.NOTCHED, ROSE, Centre.SMALL, Arrangement.CLUSTER),
    _species("coral catchfly", 5, Shape.NOTCHED, ROSE, Centre.DARK, Arrangement.CLUSTER),
    _species("dawn camellia", 5, Shape.ROUND, ROSE, Centre.SMALL, Arrangement.ROSETTE),
    _species("silk camellia", 5, Shape.ROUND, ROSE, Centre.SMALL, Arrangement.DOUBLE),
)


def _pretraining_species() -> Iterator[Species]:
    """32 pairs of sisters that differ in one attribute, so that telling them apart teaches counts, shapes, centres."""
    palette = {
        "violet": VIOLET, "pearl": WHITE, "saffron": YELLOW, "pink": ROSE,
        "azure": BLUE, "copper": ORANGE, "scarlet": CRIMSON, "lilac": LILAC,
    }  # fmt: skip
    nouns = ("campion", "speedwell", "windflower", "milkwort", "cranesbill", "gentian", "mallow", "betony")
    counts, shapes, centres = (4, 5, 6, 7, 8), tuple(Shape), tuple(Centre)
    arrangements = (*Arrangement, Arrangement.SINGLE)  # the single ring shows most, so it comes twice as often
    taken = {replace(species, name="") for species in DEMO_SPECIES}
    for pair in range(32):
        row, column = divmod(pair, 8)
        adjective, colour = tuple(palette.items())[column]
        arrangement = arrangements[(5 * pair + row) % 6]
        for sister in range(2):
            changed = (pair + row) % 3 if sister else None
            petals = counts[(3 * pair + 2 * row + (changed == 0)) % 5]
            shape = shapes[(pair + 2 * row + 2 * (changed == 1)) % 6]
            centre = centres[(2 * pair + 3 * row + 1 + 2 * (changed == 2)) % 5]
            species = _species("", petals, shape, colour, centre, arrangement)
            assert species not in taken, "pretraining must share no species with the demo"
            taken.add(species)
            yield replace(species, name=f"{adjective} {nouns[2 * row + sister]}")


PRETRAINING_SPECIES: tuple[Species, ...] = tuple(_pretraining_species())
