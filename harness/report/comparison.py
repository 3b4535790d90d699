"""The test results of several studies: compared by pairs on the images of both, and the openings added up.

Everything comes from storages; no test set is opened.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

from harness.base.errors import Told, masked
from harness.base.files import sqlite_file, sqlite_url
from harness.config.find import find_home
from harness.final.predictions import Predictions, from_record
from harness.final.statistics import ALPHA, compare, holm
from harness.store import ledger
from harness.store.opening import names_in, read_store
from harness.store.store import Store

SIZES = ("data.image_size", "data.stored_size", "data.limit")  # fields that leave a data set the same


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The accuracy of `first` minus that of `second`, as shares, with a 95 % interval and a two-sided p.

    `corrected` is p by Holm's method over all pairs. Without a test, `why` is a sentence.
    """

    first: str
    second: str
    images: int = 0  # that both were tested on
    seeds: tuple[int, int] | None = None  # of each
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None
    why: str | None = None

    @property
    def is_clear(self) -> bool:
        """Whether one is shown to be better."""
        return self.corrected is not None and self.corrected < ALPHA


def pairs(tested: Mapping[str, Predictions | str]) -> list[Pair]:
    """Compare every two studies; in place of predictions, a sentence says why there are none."""
    found = [_pair(*two, tested) for two in combinations(tested, 2)]
    corrected = iter(holm([each.p for each in found if each.p is not None]))
    return [each if each.p is None else replace(each, corrected=next(corrected)) for each in found]


def _pair(first: str, second: str, tested: Mapping[str, Predictions | str]) -> Pair:
    one, other = tested[first], tested[second]
    untested = partial(Pair, first=first, second=second)
    if isinstance(one, str) or isinstance(other, str):
        return untested(why=" ".join(each for each in (one, other) if isinstance(each, str)))
    if set(one.classes) != set(other.classes):
        return untested(why=f"{first} and {second} have different classes, so their accuracies are not comparable.")
    places, others = _places(one), _places(other)
    shared = [image for image in places if image in others]
    if not shared:
        unknown = [name for name, each in ((first, one), (second, other)) if each.images is None]
        recorded = f"Which test images {' and '.join(unknown)} had is not recorded."
        return untested(why=recorded if unknown else f"{first} and {second} share no test image.")
    hits = one.hits[:, [places[image] for image in shared]], other.hits[:, [others[image] for image in shared]]
    found, why = compare(*hits), None
    if found.p is None:
        few = "one seed" if found.seeds < 2 else "one image" if found.images < 2 else "one difference on all images"
        why = f"There is no test of {first} and {second}: with {few}, the spread is unknown."
        why += " Set final.seeds to 2 or more." if found.seeds < 2 else ""
    seeds = len(hits[0]), len(hits[1])
    return Pair(first=first, second=second, **asdict(found) | {"seeds": seeds, "why": why})


def _places(found: Predictions) -> dict[tuple[int, str], int]:
    """Return the place of each test image, by its content and class; empty if the contents are not recorded."""
    if found.images is None:
        return {}
    classes = [found.classes[label] for label in found.labels]
    return {image: place for place, image in enumerate(zip(found.images.tolist(), classes, strict=True))}


def conclusion(found: Sequence[Pair]) -> str:
    """State which studies are shown to be better than others."""
    if all(each.difference is None for each in found):
        return "The test results cannot be compared." if len(found) > 1 else f"{found[0].why}"
    clear = [(each.first, each.second)[:: 1 if (each.difference or 0) > 0 else -1] for each in found if each.is_clear]
    if not clear:
        return "No study is shown to be better than another on the test images."
    return ", and ".join(f"{better} is better than {worse}" for better, worse in clear) + " on the test images."


def sentence(pair: Pair) -> str:
    """Describe a pair in one line."""
    if pair.difference is None or pair.seeds is None:
        return pair.why or ""
    said = f"The test accuracy of {pair.first} minus that of {pair.second} is {100 * pair.difference:+.2f} points"
    if pair.low is not None and pair.high is not None:
        corrected = "" if pair.corrected == pair.p else f", corrected {pair.corrected:.2g}"
        said += f" (95 % interval {100 * pair.low:+.2f} to {100 * pair.high:+.2f}, p = {pair.p:.2g}{corrected})"
    one, other = pair.seeds
    seeds = f"{one} seed{'s' * (one > 1)} of each" if one == other else f"{one} and {other} seeds"
    said += f", over {seeds} and {pair.images:,} test image{'s' * (pair.images > 1)} of both."
    return said if pair.why is None else f"{said} {pair.why}"


def in_reach(urls: Sequence[str]) -> list[str]:
    """Return the databases of these studies, those beside them, and those in studies/ of the working folder."""
    folders = [file.parent for url in urls if (file := sqlite_file(url)) is not None]
    files = [file for folder in dict.fromkeys([*folders, find_home() / "studies"]) for file in folder.glob("*.db")]
    return list(dict.fromkeys([*urls, *(sqlite_url(file.resolve()) for file in sorted(files))]))


def openings(
    reach: Sequence[str], definitions: Sequence[Mapping[str, Any]], tested: Sequence[Predictions | str]
) -> dict[str, Any]:
    """Add up how often studies in reach opened the test images of the compared ones; a copied line counts once.

    Such a study shares `shared` images with them; where that is not recorded, its data set has the same fields.
    """
    known = [each.images.tolist() for each in tested if isinstance(each, Predictions) and each.images is not None]
    images, data = {mark for each in known for mark in each}, [_data(each) for each in definitions]
    found: list[dict[str, Any]] = []
    unread: list[str] = []
    counted: set[str] = set()  # hashes of lines
    for url in reach:
        try:
            for name in names_in(url):
                with read_store(name, url) as store:
                    shared, facts = _shared(store, images), store.facts()
                    lines = [each for each in ledger.openings(store.ledger_lines()) if each["hash"] not in counted]
                    if lines and (shared or (shared is None and _data(facts.definition or {}) in data)):
                        counted |= {each["hash"] for each in lines}
                        last = {"shared": shared, "openings": len(lines), "last": lines[-1]["time"]}
                        found.append({"study": name, "storage": masked(url)} | last)
        except Told as error:
            unread.append(str(error))
    opened = {"openings": sum(each["openings"] for each in found), "studies": found, "unread": unread}
    return opened | {"sentence": _openings_sentence(opened)}


def _data(definition: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in definition.items() if path.startswith("data.") and path not in SIZES}


def _shared(store: Store, images: Collection[int]) -> int | None:
    """Return how many of `images` a study was tested on; None if that is not recorded."""
    record = store.facts().predictions
    own = None if record is None else from_record(record).images
    return None if own is None or not images else len(set(own.tolist()).intersection(images))


def _openings_sentence(found: Mapping[str, Any]) -> str:
    times, studies = found["openings"], found["studies"]
    if not times:
        return "No study in reach has opened these test images."
    by = f"{len(studies):,} studies" if len(studies) > 1 else "one study"
    said = f"Test images of these studies were opened {'once' if times == 1 else f'{times:,} times'}, by {by} in reach."
    if unsure := sum(each["openings"] for each in studies if each["shared"] is None):
        said += f" Counted by the fields of their data, as the test images are not recorded: {unsure:,}."
    return said
