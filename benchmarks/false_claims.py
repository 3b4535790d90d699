"""How often is one configuration called better than an equal one? `python -m benchmarks.false_claims --studies 10000`

Studies are simulated from the hits of their final run alone. An image has a difficulty that all trainings share, so
that what one finds hard the other does, too: a training gets it right when the sum of the image's part, one that the
configuration has of its own, one that nobody shares, and the training's level is above 0 (a probit model). The level is
that of the training's true accuracy, which is drawn around the configuration's: its standard deviation is the spread.
`same` are two trainings of one configuration, `other` those of two that are equally good and find other images hard.

Printed are the shares of studies, in percent, with a claim at 5 % (two-sided), by each of these rules:

- McNemar's exact test on the first seed of each
- the two-level bootstrap, images and seeds resampled in pairs, claims by the percentiles of the difference
- the two-level variance with the seeds in pairs, and Student's t
- `harness.evidence.compare`: the same with the images in pairs, the seeds not
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtr

from harness.evidence import ALPHA, compare
from harness.seeds import derive_seed

ACCURACY, IMAGES, SEEDS = 0.975, 6149, 3  # what the real study is expected to reach, on its test images
SPREADS = (0.0, 0.15, 0.25, 0.35, 0.5)  # points
DIFFERENCES = (0.5, 1.0)  # points
SHARED = 0.85  # of the variance between images is the image's; the rest differs from training to training
OWN = 0.15  # of that, for `other`, is each configuration's own
RESAMPLES = 100
Hits = NDArray[np.bool_]


def study(
    draw: np.random.Generator, seeds: int, images: int, spread: float, difference: float, own: float
) -> list[Hits]:
    """The hits [seeds, images] of two configurations; `spread` and `difference` are shares."""
    shared = normal(draw, SHARED * (1 - own), images)
    found = []
    for side in (0.5, -0.5):
        level = np.clip(ACCURACY + side * difference + spread * draw.standard_normal(seeds), 0.001, 0.9999)
        border = np.array([[-NormalDist().inv_cdf(each)] for each in level], dtype=np.float32)
        found.append(shared + normal(draw, SHARED * own, images) + normal(draw, 1 - SHARED, seeds, images) > border)
    return found


def normal(draw: np.random.Generator, variance: float, *shape: int) -> NDArray[np.float32]:
    return draw.standard_normal(shape, dtype=np.float32) * np.float32(math.sqrt(variance))


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


RULES: dict[str, Callable[[Hits, Hits, np.random.Generator], bool]] = {
    "McNemar, one seed": mcnemar,
    "bootstrap, seeds paired": bootstrap,
    "t, seeds paired": paired,
    "t, as the report": ours,
}


def claims(studies: int, *setting: Any) -> list[float]:
    """The share of studies with a claim by each rule, in percent."""
    draw = np.random.default_rng(derive_seed("false claims", *map(str, setting)))
    found = np.zeros(len(RULES))
    for _ in range(studies):
        hits = study(draw, *setting)
        found += [rule(*hits, draw) for rule in RULES.values()]
    return [float(each) for each in 100 * found / studies]


def table(settings: list[tuple[int, int, float]], sides: list[tuple[float, float]], studies: int) -> None:
    """A row a setting (seeds, images, spread in points); a cell holds the share for each difference and `own`."""
    head = ["seeds", "images", "spread", *RULES]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for seeds, images, spread in settings:
        shares = [claims(studies, seeds, images, spread / 100, points / 100, own) for points, own in sides]
        cells = [" / ".join(f"{each:.1f}" for each in cell) for cell in zip(*shares, strict=True)]
        print(f"| {' | '.join([str(seeds), f'{images:,}', f'{spread:g}', *cells])} |", flush=True)


def main() -> None:
    from benchmarks.machine import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="per setting (default: %(default)s)")
    studies = parser.parse_args().studies
    first, second = study(np.random.default_rng(0), 2, 1_000_000, 0.0, 0.0, 0.0)[0]
    error = 100 * math.sqrt(ALPHA * (1 - ALPHA) / studies)
    print(
        f"{describe()}\n{studies:,} studies a setting (standard error {error:.2f} at 5 %), accuracy {ACCURACY:.1%}; "
        f"two trainings of one configuration differ on {(first != second).mean():.1%} of the images\n\n"
        "False claims, same / other, percent of the studies:\n"
    )
    settings = [(seeds, IMAGES, spread) for seeds in (SEEDS, 5, 2) for spread in SPREADS]
    few = [(SEEDS, 1020, spread) for spread in SPREADS]
    table(settings + few, [(0.0, 0.0), (0.0, OWN)], studies)
    points = " / ".join(f"{each:g}" for each in DIFFERENCES)
    print(f"\nPower at a true difference of {points} points (other), percent of the studies:\n")
    table(settings, [(difference, OWN) for difference in DIFFERENCES], studies)


if __name__ == "__main__":
    main()
