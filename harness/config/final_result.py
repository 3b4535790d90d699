"""The final result: what the chosen configuration, and the base, reach on the test set. Accuracies are shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from harness.base.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One trained model on the test images; a result that was mended from the ledger lacks what has a default."""

    seed: int
    correct: int
    total: int
    accuracy: float
    weights: str  # their sha256
    balanced_accuracy: float | None = None
    loss: float | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)  # `EpochResult.to_dict` of each
    environments: list[dict[str, str]] = field(default_factory=list)  # it was trained in, one after the other


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """A trial's configuration on the test images: over its seeds, and each one's.

    `accuracy` is `correct` / `total`, which add up the seeds. `interval` is Wilson's, 95 %, and counts an image once.
    `spread` is the standard deviation of the seeds' accuracies, None with one seed.
    """

    __test__ = False  # for pytest: none of its tests

    trial: int
    correct: int
    total: int
    accuracy: float
    balanced_accuracy: float | None
    interval: tuple[float, float]
    spread: float | None
    per_seed: tuple[SeedResult, ...]  # at least one

    def __post_init__(self) -> None:
        if not self.per_seed:
            raise ValueError("without seeds")

    @property
    def images(self) -> int:
        """The test images; `total` counts them once a seed."""
        return self.per_seed[0].total


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far one configuration's accuracy is above another's, as shares; with one seed each, only the difference.

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
    """What choosing the best of several scores on the same images adds to the chosen one's score, as shares.

    `excess` is the expected difference between the winner's score and its score on new images, given how far the
    candidates lie apart; `excess_if_equal` is what it would be if all were equally good; `p_equal` is how often equally
    good candidates would have put their best as far above their mean as it is.
    """

    candidates: int
    images: int
    excess: float
    excess_if_equal: float
    p_equal: float


@dataclass(frozen=True, kw_only=True)
class FinalResult(TestResult):
    """The chosen configuration's test result, and what is known beside it."""

    fit_on: Literal["train", "train+val"]
    test_openings: int
    base: TestResult | None
    comparison: Comparison | None  # of the chosen configuration with the base
    selection: Selection | None
    ledger: str | None = None  # the hash of its line

    @staticmethod
    def of(stored: Mapping[str, Any]) -> FinalResult:
        """Of what the storage keeps. Raises InputError naming the fields that are missing or no such values."""
        from pydantic import ValidationError

        try:  # by JSON, in which a list may be a tuple, and strictly, so that a text is no number
            return _reader().validate_json(json.dumps(stored), strict=True)
        except ValidationError as error:
            lacking = {str(each["loc"][0]) if each["loc"] else "per_seed": None for each in error.errors()}
            raise InputError(f"the study's 'final' does not say its {', '.join(lacking)}") from error


@cache
def _reader() -> TypeAdapter[FinalResult]:
    from pydantic import TypeAdapter  # a tenth of a second, which a start and a worker do without

    return TypeAdapter(FinalResult)
