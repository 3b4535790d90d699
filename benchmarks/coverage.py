"""Measure how often the bootstrap intervals of test results hold the truth: `python -m benchmarks.coverage`

Draws test sets from a known population: images of a class are right with the class's own probability, else mostly
taken for one other class; losses are exponential, larger where the prediction is wrong. Prints, for each objective, the
share of test sets whose 95 % interval, as the report gives it, holds the population's value, the share of intervals
that are below it, and their median width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import script
from harness.base.seeds import derive_seed
from harness.config.events import Objective
from harness.final.statistics import bootstrap_interval
from harness.training.objective import contributions

OBJECTIVES: tuple[Objective, ...] = ("balanced_accuracy", "macro_f1", "loss")
SETTINGS = (  # images, classes, how many times more frequent the first class is than the last, mean accuracy
    (1020, 102, 1.0, 0.90),
    (1020, 102, 12.0, 0.90),
    (204, 102, 1.0, 0.80),
    (240, 6, 1.0, 0.80),
    (240, 6, 10.0, 0.80),
    (60, 6, 10.0, 0.90),
)
LOSS_RIGHT, LOSS_WRONG = 0.2, 2.5  # means
NEIGHBOUR = 0.7  # of the wrong predictions are the next class, the others any other one


@dataclass(frozen=True)
class Population:
    """Shares of the classes, and which class is predicted for which [labels, predictions]."""

    shares: NDArray[np.float64]
    predicted: NDArray[np.float64]

    @classmethod
    def of(cls, classes: int, ratio: float, accuracy: float) -> Population:
        shares = np.geomspace(ratio, 1, classes)
        spread = np.random.default_rng(derive_seed("coverage", classes)).beta(2, 2, classes)
        wrong = 2 * (1 - accuracy) * spread
        predicted = np.full((classes, classes), (1 - NEIGHBOUR) / (classes - 2)) * wrong[:, None]
        each = np.arange(classes)
        predicted[each, (each + 1) % classes] = NEIGHBOUR * wrong
        predicted[each, each] = 1 - wrong
        return cls(shares / shares.sum(), predicted)

    def value(self, objective: Objective) -> float:
        """Of infinitely many images."""
        right = np.diag(self.predicted)
        joint = self.shares[:, None] * self.predicted
        if objective == "balanced_accuracy":
            return float(right.mean())
        if objective == "macro_f1":
            return float((2 * np.diag(joint) / (joint.sum(axis=1) + joint.sum(axis=0))).mean())
        return float(np.exp(-(LOSS_RIGHT * self.shares @ right + LOSS_WRONG * self.shares @ (1 - right))))

    def sample(self, images: int, draw: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Labels, predicted classes and losses, [images] each."""
        labels = draw.choice(len(self.shares), images, p=self.shares)
        below = self.predicted.cumsum(axis=1)[labels] < draw.random((images, 1))
        predicted = below.sum(axis=1).clip(max=len(self.shares) - 1)
        losses = draw.exponential(np.where(predicted == labels, LOSS_RIGHT, LOSS_WRONG))
        return labels, predicted, losses


def covered(population: Population, objective: Objective, images: int, studies: int) -> tuple[float, float, float]:
    """The share of intervals that hold the truth, the share of those below it, and the median width."""
    truth, draw = population.value(objective), np.random.default_rng(derive_seed("coverage", objective, images))
    ends = []
    for number in range(studies):
        found = contributions(objective, *population.sample(images, draw))
        ends.append(bootstrap_interval(found, number))
    low, high = np.array(ends).T
    return float(((low <= truth) & (truth <= high)).mean()), float((high < truth).mean()), float(np.median(high - low))


def full(studies: int) -> None:
    """Print a row for each setting and objective."""
    print("| images | classes | largest / smallest | objective | value | coverage | too low | width, points |")
    print("|---|---|---|---|---|---|---|---|")
    for images, classes, ratio, accuracy in SETTINGS:
        population = Population.of(classes, ratio, accuracy)
        for objective in OBJECTIVES:
            inside, low, width = covered(population, objective, images, studies)
            value = population.value(objective)
            print(
                f"| {images:,} | {classes} | {ratio:.0f} | {objective} | {value:.3f} | {inside:.1%} | {low:.1%} | "
                f"{100 * width:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    script(full, dict, {"--studies": {"type": int, "default": 300}})
