"""What a search took, and what pruning saved of it, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.base.words import duration
from harness.report.overview import cost, cost_sentences
from harness.store.store import TrialRecord
from tests.analytic import epoch_result


def trial(number: int, state: str, ran: int, seconds: float | None, **params: Any) -> TrialRecord:
    ended = tuple(epoch_result(epoch, 0.5) for epoch in range(1, ran + 1))  # half a second each
    curve = {epoch.epoch: 0.5 for epoch in ended}
    return TrialRecord(
        number=number, state=state, value=None, params=params, epochs=ended, curve=curve, reason=None, seconds=seconds
    )


def test_pruning_saves_the_epochs_that_were_not_run_at_the_time_of_those_that_were() -> None:
    trials = [trial(0, "complete", 8, 4.0), trial(1, "pruned", 2, 1.0), trial(2, "failed", 1, 0.5)]
    found = cost(trials, {"epochs": 8})
    assert found == {
        "seconds": 5.5,
        "epochs": 11,
        "pruned": 1,
        "epochs_not_run": 6,
        "saved_seconds": 3.0,
        "saved_share": pytest.approx(3.0 / 8.5),
    }
    assert cost_sentences(found)[1] == (
        "Pruning ended 1 of them early and saved 6 epochs, about 3.0 s: 35 % of the search's time without it."
    )


def test_a_searched_number_of_epochs_counts_and_an_unknown_one_does_not() -> None:
    assert cost([trial(0, "pruned", 2, 1.0, epochs=4)], {"epochs": 8})["epochs_not_run"] == 2
    assert cost([trial(0, "pruned", 2, 1.0)], {})["epochs_not_run"] == 0


def test_a_search_that_has_not_begun_costs_nothing() -> None:
    found = cost([], {"epochs": 8})
    assert (found["seconds"], found["saved_share"]) == (0.0, 0.0)
    assert len(cost_sentences(found)) == 1
    assert cost([trial(0, "running", 0, None)], {"epochs": 8})["seconds"] == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.0 s"),
        (8.34, "8.3 s"),
        (59.0, "59.0 s"),
        (60.0, "1 min 0 s"),
        (250.0, "4 min 10 s"),
        (3599.0, "59 min 59 s"),
        (3600.0, "1 h 0 min"),
        (12_000.0, "3 h 20 min"),
        (86_400.0, "1.0 days"),
        (216_000.0, "2.5 days"),
    ],
)
def test_durations_are_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@given(st.floats(0, 1e7))
@example(59.97)
@example(119.97)
@example(3599.97)
@example(86_399.0)
def test_no_duration_counts_sixty_seconds_or_minutes(seconds: float) -> None:
    words = duration(seconds).split()
    assert not {("60.0", "s"), ("60", "s"), ("60", "min"), ("24", "h")} & set(zip(words[::2], words[1::2], strict=True))
