"""The final result: test accuracy of the chosen configuration and of the base. Accuracies are shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from harness.base.errors import InputError
from harness.base.words import metric_name

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def value_of(result: Mapping[str, Any]) -> float:
    """Return the objective's value of a stored validation result."""
    return float(result.get("score", result["accuracy"]))


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """Test result of one trained model; a result restored from the ledger lacks the fields with a default."""

    seed: int
    correct: int
    total: int
    accuracy: float
    weights: str  # their sha256
    balanced_accuracy: float | None = None
    loss: float | None = None
    objective: str = "accuracy"
    score: float | None = None  # the objective's value; None for accuracy
    flipped: float | None = None  # the objective's value, averaged over image and mirror image; None: not measured
    epochs: list[dict[str, Any]] = field(default_factory=list)  # `EpochResult.to_dict` of each
    environments: list[dict[str, str]] = field(default_factory=list)  # of the training, in order

    @property
    def value(self) -> float:
        """The objective's value, from 0 to 1."""
        return self.accuracy if self.score is None else self.score

    def metrics(self) -> dict[str, float]:
        """Return the metrics that MLflow shows."""
        others = {
            "test_loss": self.loss,
            f"test_{metric_name(self.objective)}": self.score,
            f"test_{metric_name(self.objective)}_flipped": self.flipped,
        }
        return {"test_accuracy": self.accuracy} | {name: each for name, each in others.items() if each is not None}


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """Test result of a trial's configuration, over all seeds and per seed.

    `accuracy` is `correct` / `total`, summed over seeds. `interval` is that of the objective's `value`: Wilson's, 95 %,
    for accuracy, else a bootstrap over the images; it counts each image once. `spread` is the standard deviation of the
    seeds' values, None with one seed.
    """

    __test__ = False  # not a test class for pytest

    trial: int
    correct: int
    total: int
    accuracy: float
    balanced_accuracy: float | None
    interval: tuple[float, float]
    spread: float | None
    per_seed: tuple[SeedResult, ...]  # at least one
    objective: str = "accuracy"
    score: float | None = None  # the mean of the seeds' scores; None for accuracy
    flipped: float | None = None  # the mean of the seeds'

    def __post_init__(self) -> None:
        if not self.per_seed:
            raise ValueError("no seeds")

    @property
    def value(self) -> float:
        """The objective's value, from 0 to 1."""
        return self.accuracy if self.score is None else self.score

    @property
    def images(self) -> int:
        """Number of test images; `total` counts them per seed."""
        return self.per_seed[0].total


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference between two configurations' accuracies, as shares; with one seed each, without interval and p.

    `low` and `high` are the ends of the 95 % interval, `p` is two-sided.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Selection bias: how much choosing the best of several scores on the same images inflates it, as shares.

    `excess` is the expected difference between the winner's score and its score on new images, given the candidates'
    spread; `excess_if_equal` is the same if all were equally good; `p_equal` is how often the best of equally
    good candidates would be as far above their mean as observed.
    """

    candidates: int
    images: int
    excess: float
    excess_if_equal: float
    p_equal: float


@dataclass(frozen=True, kw_only=True)
class FinalResult(TestResult):
    """Test result of the chosen configuration, compared with the base."""

    fit_on: Literal["train", "train+val"]
    test_openings: int
    base: TestResult | None
    comparison: Comparison | None  # of the chosen configuration with the base
    selection: Selection | None
    ledger: str | None = None  # hash of its line

    @staticmethod
    def of(stored: Mapping[str, Any]) -> FinalResult:
        """Parse the stored result. Raises InputError naming the fields that are missing or invalid."""
        from pydantic import ValidationError

        try:  # as JSON, where a list may be a tuple, and strictly: a string is not a number
            return _reader().validate_json(json.dumps(stored), strict=True)
        except ValidationError as error:
            lacking = {str(each["loc"][0]) if each["loc"] else "per_seed": None for each in error.errors()}
            raise InputError(f"the study's 'final' has no valid {', '.join(lacking)}") from error


@cache
def _reader() -> TypeAdapter[FinalResult]:
    from pydantic import TypeAdapter  # takes 0.1 s, which starts and workers avoid

    return TypeAdapter(FinalResult)
