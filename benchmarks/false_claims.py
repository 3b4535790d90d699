"""Measure how often equal configurations are called different: `python -m benchmarks.false_claims --studies 10000`

Simulates the hits of a study's final run. All trainings share each image's difficulty, so they tend to fail on the same
images. A training gets an image right if the sum of four parts is above 0 (a probit model): one of the image, one of
the configuration on this image, a random one, and the training's level. The level sets the training's true accuracy,
which is drawn around the configuration's; its standard deviation is the spread. `same` are two trainings of one
configuration, `other` those of two configurations that are equally good and fail on other images.

Prints the percentage of studies with a claim at 5 % (two-sided), by each of these rules:

- McNemar's exact test on the first seed of each
- the two-level bootstrap, images and seeds resampled in pairs, claims by the percentiles of the difference
- the two-level variance with the seeds in pairs, and Student's t
- `harness.final.statistics.compare`: the same with the images in pairs, the seeds not
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri, stdtr

from harness.base.seeds import derive_seed
from harness.final.statistics import ALPHA, compare

ACCURACY = 0.975  # what the real study is expected to reach
SIZES = ((3, 6149), (5, 6149), (2, 6149), (3, 1020))  # seeds, and test images: as many as the real study has, or fewer
SPREADS = (0.0, 0.15, 0.25, 0.35, 0.5)  # points
DIFFERENCES = (0.5, 1.0)  # points
SHARED = 0.85  # of the variance between images is the image's; the rest differs from training to training
OWN = 0.15  # of that, for `other`, is each configuration's own
RESAMPLES = 100
Hits = NDArray[np.bool_]


def latent(draw: np.random.Generator, seeds: int, images: int, own: float) -> list[NDArray[np.float32]]:
    """All but the levels, for each of two configurations [seeds, images]; of variance 1."""

    def normal(variance: float, *shape: int) -> NDArray[np.float32]:
        return draw.standard_normal(shape, dtype=np.float32) * np.float32(math.sqrt(variance))

    shared = normal(SHARED * (1 - own), images)
    return [shared + normal(SHARED * own, images) + normal(1 - SHARED, seeds, images) for _ in range(2)]


def hits(parts: list[NDArray[np.float32]], chance: NDArray[Any], spread: float, difference: float) -> tuple[Hits, Hits]:
    """Which images are right [seeds, images]; `chance` [2, seeds] moves the accuracies by so many spreads (points)."""
    accuracy = ACCURACY + (spread * chance + difference * np.array([[0.5], [-0.5]])) / 100
    border = -ndtri(np.clip(accuracy, 0.001, 0.9999)).astype(np.float32)[:, :, None]
    return parts[0] > border[0], parts[1] > border[1]


def mcnemar(first: Hits, second: Hits, draw: np.random.Generator) -> bool:
    gained, lost = int((first[0] & ~second[0]).sum()), int((second[0] & ~first[0]).sum())
    return bool(2 * bdtr(min(gained, lost), gained + lost, 0.5) < ALPHA)


def bootstrap(first: Hits, second: Hits, draw: np.random.Generator) -> bool:
    seeds, images = first.shape
    # Images with the same differences over the seeds are alike, so they are counted before they are resampled.
    codes = 3 ** np.arange(seeds) @ (1 + first.astype(int) - second)
    kinds, counts = np.unique(codes, return_counts=True)
    differences = kinds[:, None] // 3 ** np.arange(seeds) % 3 - 1
    by_seed = draw.multinomial(images, counts / images, size=RESAMPLES) @ differences / images
    weights = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    low, high = np.quantile((by_seed * weights).sum(axis=1), [ALPHA / 2, 1 - ALPHA / 2])
    return bool(low > 0 or high < 0)


def paired(first: Hits, second: Hits, draw: np.random.Generator) -> bool:
    seeds, images = first.shape
    differences = first.astype(np.int8) - second
    parts = [(differences.mean(axis=1).var(ddof=1) / seeds, seeds - 1)]
    parts.append((differences.mean(axis=0).var(ddof=1) / images, images - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return bool(2 * stdtr(freedom, -abs(differences.mean()) / math.sqrt(variance)) < ALPHA)


def ours(first: Hits, second: Hits, draw: np.random.Generator) -> bool:
    p = compare(first, second).p
    return p is not None and p < ALPHA


Rule = Callable[[Hits, Hits, np.random.Generator], bool]
RULES: dict[str, tuple[Rule, int]] = {  # and the number of studies that a slow one is applied to
    "McNemar, one seed": (mcnemar, 10**9),
    "bootstrap, seeds paired": (bootstrap, 1000),
    "t, seeds paired": (paired, 10**9),
    "t, as the report": (ours, 10**9),
}
Shares = dict[tuple[float, float, float], list[float]]  # of each rule, by spread, difference and `own`


def claims(studies: int, seeds: int, images: int, settings: list[tuple[float, float, float]]) -> Shares:
    """The share of studies with a claim by each rule, in percent; the settings share what is drawn."""
    draw = np.random.default_rng(derive_seed("false claims", seeds, images))
    found = {setting: [0] * len(RULES) for setting in settings}
    for number in range(studies):
        parts = {own: latent(draw, seeds, images, own) for own in (0.0, OWN)}
        chance = draw.standard_normal((2, seeds))
        for (spread, difference, own), counts in found.items():
            pair = hits(parts[own], chance, spread, difference)
            for place, (rule, most) in enumerate(RULES.values()):
                counts[place] += number < most and rule(*pair, draw)
    of = [min(studies, most) for _, most in RULES.values()]
    return {setting: [100 * n / m for n, m in zip(counts, of, strict=True)] for setting, counts in found.items()}


def rows(seeds: int, images: int, found: Shares, sides: list[tuple[float, float]]) -> Iterator[str]:
    """A row a spread; a cell holds the shares of all (difference, own) in `sides`."""
    for spread in SPREADS:
        columns = zip(*(found[spread, difference, own] for difference, own in sides), strict=True)
        cells = [" / ".join(f"{each:.1f}" for each in column) for column in columns]
        yield f"| {' | '.join([str(seeds), f'{images:,}', f'{spread:g}', *cells])} |"


def main() -> None:
    from benchmarks.machine import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="studies per setting (default: %(default)s)")
    studies = parser.parse_args().studies
    first, second = hits(latent(np.random.default_rng(0), 1, 1_000_000, 0.0), np.zeros((2, 1)), 0.0, 0.0)
    error = 100 * math.sqrt(ALPHA * (1 - ALPHA) / studies)
    print(
        f"{describe()}\n{studies:,} studies per setting (standard error {error:.2f} at 5 %; for the bootstrap at most "
        f"{RULES['bootstrap, seeds paired'][1]:,}), accuracy {ACCURACY:.1%}; two trainings of one configuration differ "
        f"on {(first != second).mean():.1%} of the images\n"
    )
    none, power = [(0.0, 0.0), (0.0, OWN)], [(difference, OWN) for difference in DIFFERENCES]
    settings = [(spread, *side) for spread in SPREADS for side in (*none, *power)]
    found = {}
    for size in SIZES:
        found[size] = claims(studies, *size, settings)
        print(f"{size[0]} seeds on {size[1]:,} images done", file=sys.stderr, flush=True)
    points = " / ".join(f"{each:g}" for each in DIFFERENCES)
    for title, sides in (("False claims (same / other)", none), (f"Power at {points} points (other)", power)):
        print(f"{title}, percent of the studies:\n\n| seeds | images | spread | {' | '.join(RULES)} |")
        print(f"|{'---|' * (3 + len(RULES))}")
        print("\n".join(row for size, shares in found.items() for row in rows(*size, shares, sides)), end="\n\n")


if __name__ == "__main__":
    main()
