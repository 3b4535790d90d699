"""Importances with the spread that so few trials leave."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution

from harness.report.parameters import importances
from tests.analytic import memory_study


def study_of(values: list[tuple[float, float, float]]) -> optuna.Study:
    """A study of two parameters in [0, 1] and a value a trial."""
    study = memory_study(optuna.pruners.NopPruner())
    space: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in ("matters", "idle")}
    for matters, idle, value in values:
        params = {"matters": matters, "idle": idle}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
    return study


def grid(side: int) -> list[tuple[float, float, float]]:
    places = [(row + 0.5) / side for row in range(side)]
    return [(matters, idle, matters) for matters in places for idle in places]


@pytest.mark.slow
def test_the_parameter_that_matters_comes_first_and_its_interval_lies_around_it() -> None:
    found = importances(study_of(grid(8)), ["idle", "matters"])
    assert [each.name for each in found] == ["matters", "idle"]
    assert sum(each.share for each in found) == pytest.approx(1)
    assert all(0 <= each.low <= each.share <= each.high <= 1 for each in found)
    assert found[0].low > found[1].high


@pytest.mark.slow
def test_fewer_trials_say_less() -> None:
    many, few = (importances(study_of(grid(side)), ["idle", "matters"])[0] for side in (10, 3))
    assert few.high - few.low > many.high - many.low


@pytest.mark.slow
def test_the_same_trials_give_the_same_numbers() -> None:
    assert importances(study_of(grid(4)), ["idle", "matters"]) == importances(study_of(grid(4)), ["idle", "matters"])


@pytest.mark.parametrize("values", [[], [(0.5, 0.5, 1.0)], [(0.1, 0.5, 1.0), (0.9, 0.5, 1.0)]])
def test_without_two_different_values_there_are_none(values: list[tuple[float, float, float]]) -> None:
    assert importances(study_of(values), ["idle", "matters"]) == []
