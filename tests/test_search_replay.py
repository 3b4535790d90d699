"""Tables of recorded curves as tasks to search on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import curves
from benchmarks.replay_tasks import Task, draw, own, recorded
from benchmarks.search_replay import Policy, Search, regrets
from harness.config.events import EpochResult
from harness.config.space import Choice, Dimension, Float
from harness.search.pruners import asha, no_pruning
from harness.search.samplers import Sampler, gp, tpe
from tests.small import small_study

SPACE: dict[str, Dimension] = {"lr": Float(1e-4, 1e-2, log=True), "width": Choice(((8,), (16, 8)))}
DRAWN = [{"lr": lr, "width": width} for lr in (1e-4, 1e-3, 1e-2) for width in ("8", "16-8")]
CURVES = np.array([[0.1, 0.2], [0.1, 0.3], [0.2, 0.5], [0.2, 0.4], [0.1, np.nan], [0.3, 0.1]])


@pytest.fixture
def task() -> Task:
    return recorded("six", SPACE, DRAWN, CURVES, full=3)


def test_a_suggestion_becomes_the_nearest_configuration_that_was_not_tried(task: Task) -> None:
    used: set[int] = set()
    found = [task.curve({"lr": 1.2e-3, "width": "8"}, used)[0] for _ in DRAWN]
    assert found[0] == DRAWN[2]
    assert sorted(found, key=str) == sorted(DRAWN, key=str)
    assert used == set(range(6))


def test_learning_rates_are_near_by_their_ratio_and_what_diverged_is_as_bad_as_the_worst(task: Task) -> None:
    assert task.curve({"lr": 4e-4, "width": "8"}, set())[0]["lr"] == 1e-3  # 2.5 times, not four times
    assert [value for _, value in task.random] == [0.2, 0.3, 0.5, 0.4, 0.1, 0.1]
    assert (task.best, task.median, task.epochs) == (0.5, 0.25, 2)


def test_a_search_spends_its_budget_and_no_more(task: Task) -> None:
    search = Search(task, Policy(tpe(), asha(min_epochs=1)), 0, 6, DRAWN[0])
    ended = list(search.run())
    assert search.spent == sum(len(trial.intermediate_values) for trial in search.trials) <= 6
    assert ended == [trial.value for trial in search.trials if trial.value is not None]
    assert search.trials[0].params == DRAWN[0]


def test_random_configurations_lie_in_the_space() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = draw(SPACE, rng)
        assert 1e-4 <= drawn["lr"] <= 1e-2
        assert drawn["width"] in {"8", "16-8"}


recorded_here = pytest.mark.skipif(not curves.is_complete(), reason="our own curves are not all recorded yet")


@pytest.mark.slow
@recorded_here
def test_on_our_own_curves_the_gaussian_process_leaves_less_than_chance() -> None:
    """Mean regret over the budget and some seeds, so that no luck decides."""
    policies = Policy(gp(), asha(first=0.08)), Policy(Sampler("RandomSampler"), no_pruning())
    left = [np.mean([regrets(own(), policy, seed)[0] for seed in range(4)]) for policy in policies]
    assert left[0] < left[1]


def test_a_training_that_was_stopped_is_recorded_as_one_that_was_not(tmp_path: Path, image_cache: Path) -> None:
    config, file = small_study(image_cache).train, tmp_path / "0-0.safetensors"

    def recorded() -> dict[str, Any]:
        return {key: value for key, value in curves.record(config, 0, file).items() if key != "seconds"}

    expected = recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "takewhile", _stopped_after_an_epoch)
        with pytest.raises(KeyboardInterrupt):
            recorded()
    assert file.exists()
    assert recorded() == expected
    assert [each["val_correct"] is not None for each in expected["epochs"]] == [True] * config.epochs


def _stopped_after_an_epoch(_: Any, results: Iterator[EpochResult]) -> Iterator[EpochResult]:
    yield next(results)
    raise KeyboardInterrupt


@pytest.mark.skipif(not curves.TABLE.exists(), reason="our own curves are not recorded yet")
def test_every_recorded_training_is_whole() -> None:
    """All its epochs, unless it diverged, and its test accuracy."""
    table = curves.read_table()
    assert set(table.seed) <= {0, 1, 2}
    for (number, _), rows in table.groupby(["configuration", "seed"]):
        assert list(rows.epoch) == list(range(1, len(rows) + 1))
        assert len(rows) == curves.EPOCHS or rows.val_correct.isna().iloc[-1]
        assert rows[list(curves.SPACE)].drop_duplicates().shape[0] == 1
        assert 0 <= number <= curves.COUNT
        assert (rows.test_total == 6149).all()
