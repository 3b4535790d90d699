"""What a search took, and what pruning saved of it, counted by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import harness
from harness.base.errors import InputError
from harness.base.words import duration, money, rate
from harness.config.events import Completed, Pruned
from harness.final.test_set import summary as final_of
from harness.report.overview import cost, cost_sentences, digest, overview, price, price_sentence, summary
from harness.report.write import write_report
from harness.store.store import TrialRecord
from tests.analytic import NOT_COMPARED, epoch_result, memory_store
from tests.conftest import make_study
from tests.small import small_study


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


# -- money -------------------------------------------------------------------------------------------------------------


def test_what_is_spent_counts_every_training(tmp_path: Path) -> None:
    study = make_study("cache")
    store = memory_store(study)
    store.tell(store.ask(study), Completed(value=0.6), [epoch_result(1, 0.6)], seconds=5400.0)
    store.tell(store.ask(study), Pruned(epoch=1), [epoch_result(1, 0.3)], seconds=4320.0)
    assert price(store) is None
    assert "cost" not in summary("tiny", store, "sqlite:///mlflow.db")
    before = digest(store), store.facts().definition
    store.set_attribute("price", 2.4)
    assert (digest(store), store.facts().definition) == before
    assert price_sentence(price(store)) == "Spent 2.7 h in all, 6.48 at 2.40 per hour."
    epochs = [dataclasses.replace(epoch_result(n, 0.5), seconds=180.0).to_dict() for n in (1, 2)]
    seeds = [{"seed": 0, "correct": 5, "total": 8, "accuracy": 0.625, "weights": "", "epochs": epochs}]
    base = final_of(seeds) | {"trial": 0}
    final = {"trial": 0, "fit_on": "train", "test_openings": 1} | NOT_COMPARED | {"base": base}
    store.set_attribute("final", final_of(seeds) | final)
    store.set_attribute("rerank", {"candidates": [0], "results": {"0": [seeds[0], seeds[0]]}, "chosen": 0})
    found = overview("tiny", store, "sqlite:///mlflow.db")["price"]
    assert found == {"per_hour": 2.4, "device_hours": pytest.approx(3.1), "spent": pytest.approx(7.44)}
    sentence = "Spent 3.1 h in all, 7.44 at 2.40 per hour."
    assert f"cost      {sentence}" in summary("tiny", store, "sqlite:///mlflow.db").splitlines()
    text = write_report("tiny", store, "sqlite:///mlflow.db", tmp_path).read_text(encoding="utf-8")
    assert sentence in text
    assert "<dt>spent</dt><dd>7.44</dd>" in text


@pytest.mark.parametrize(("amount", "words"), [(0.0, "0.00"), (0.00421, "0.0042"), (0.5, "0.50"), (1234.5, "1,234.50")])
def test_money_is_said_with_cents_or_what_there_is_of_them(amount: float, words: str) -> None:
    assert money(amount) == words


@pytest.mark.parametrize(("price", "words"), [(2.4, "2.40"), (0.526, "0.526"), (1200.0, "1,200.00")])
def test_a_price_is_said_as_it_was_given(price: float, words: str) -> None:
    assert rate(price) == words


@pytest.mark.usefixtures("mlruns")
def test_the_price_is_remembered_and_changes_no_result(image_cache: Path, tmp_path: Path) -> None:
    study = dataclasses.replace(small_study(image_cache), trials=2)
    result = harness.run(study, home=tmp_path, progress=False, price=3600.0)
    with result.store() as store:
        facts, trials = store.facts(), store.trials()
    assert not [name for name in facts.definition or {} if "price" in name]
    found = result.overview()["price"]
    assert facts.final is not None
    epochs = sum(each["seconds"] for each in facts.final.per_seed[0].epochs)
    assert found["spent"] >= (sum(trial.seconds or 0.0 for trial in trials) + epochs) * 0.999999
    assert found["spent"] == 3600 * found["device_hours"]
    digest, resumed = result.digest(), harness.run(study, home=tmp_path, progress=False)
    assert (resumed.overview()["price"], resumed.digest()) == (found, digest)
    cheaper = harness.run(study, home=tmp_path, progress=False, price=1)
    assert "at 1.00 per hour" in cheaper.summary()
    for wrong in (0, -1.0, float("nan"), float("inf"), "2.40", True):
        with pytest.raises(InputError, match="price must be a number"):
            harness.run(study, home=tmp_path, progress=False, price=wrong)
    assert "at 1.00 per hour" in cheaper.summary()
