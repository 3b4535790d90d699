"""What the storage says, as one object, as a table and as a page that needs no network."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest

from harness.config import Study
from harness.final import summary
from harness.report import final_sentence, frame, overview, percent, verdict, write_report
from harness.results import Completed, Diverged, Pruned
from harness.search import asha, no_pruning
from harness.storage import Store
from tests.analytic import epoch_result, fail_trial, memory_store, run_analytic
from tests.conftest import make_study

MLFLOW = "sqlite:////somewhere/mlflow.db"


@pytest.fixture
def study() -> Study:
    return make_study("cache", pruner=asha(min_epochs=2), trials=20)


@pytest.fixture
def store(study: Study) -> Store:
    return memory_store(study)


def complete(study: Study, store: Store, value: float) -> None:
    asked = store.ask(study)
    store.report(asked, 1, value)
    store.tell(asked, Completed(value=value), [epoch_result(1, value)], seconds=1.0)


def every_state(study: Study, store: Store) -> None:
    run_analytic(study, store, 6)
    fail_trial(study, store, "RuntimeError: <b>out of memory</b>")
    asked = store.ask(study)
    store.report(asked, 1, 0.4)
    store.tell(asked, Diverged(epoch=2), [epoch_result(1, 0.4)], seconds=1.0)
    asked = store.ask(study)
    store.report(asked, 1, 0.3)
    store.tell(asked, Pruned(epoch=1), [epoch_result(1, 0.3)], seconds=1.0)
    store.report(store.ask(study), 1, 0.2)


def final_result(seeds: int = 3) -> dict[str, Any]:
    per_seed = [{"seed": n, "correct": 90 + n, "total": 100, "accuracy": (90 + n) / 100} for n in range(seeds)]
    return summary(per_seed) | {"trial": 0, "fit_on": "train+val", "test_openings": 1}


# -- one object ----------------------------------------------------------------------------------------------------

KEYS = {"study", "trials", "best", "final", "storage", "tracking"}


def test_the_overview_of_a_study_without_trials(store: Store) -> None:
    seen = overview("tiny", store, MLFLOW)
    assert set(seen) >= KEYS
    assert seen["study"] == "tiny"
    assert seen["trials"] == {"complete": 0, "pruned": 0, "failed": 0, "running": 0, "interrupted": 0}
    assert seen["best"] is None
    assert seen["final"] is None
    assert seen["storage"] == store.url
    assert seen["tracking"] == MLFLOW


def test_the_overview_of_a_finished_study(study: Study, store: Store) -> None:
    every_state(study, store)
    store.set_attribute("final", final_result())
    seen = overview("tiny", store, MLFLOW)
    assert set(seen) >= KEYS
    assert set(seen["trials"]) == {"complete", "pruned", "failed", "running", "interrupted"}
    assert sum(seen["trials"].values()) == 10
    assert seen["trials"]["failed"] >= 2
    assert (seen["trials"]["running"], seen["trials"]["interrupted"]) == (0, 1)  # nobody holds a study in memory
    best = store.best()
    assert best is not None
    assert seen["best"] == {"number": best.number, "value": best.value, "params": best.params}
    assert set(seen["final"]) >= {"accuracy", "correct", "total", "per_seed", "interval"}
    assert seen["final"]["accuracy"] == seen["final"]["correct"] / seen["final"]["total"]
    assert json.loads(json.dumps(seen)) == seen


# -- sentences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], ["No trial is complete yet."]),
        ([0.5], ["trial 0", "50.00 %", "no trial beats the base configuration"]),
        ([0.5, 0.4], ["trial 0", "no trial beats the base configuration"]),
        ([0.5, 0.5], ["trial 0", "no trial beats the base configuration"]),
        ([0.5, 0.75], ["trial 1", "75.00 %", "25.00 points above the base configuration"]),
        ([None, 0.75], ["trial 1", "75.00 %", "the base configuration, trial 0, did not complete"]),
        ([None, None], ["No trial is complete yet."]),
    ],
)
def test_the_verdict_compares_the_best_trial_with_the_base(
    store: Store, values: list[float | None], words: list[str]
) -> None:
    study = make_study("cache", pruner=no_pruning())
    for value in values:
        if value is None:
            fail_trial(study, store)
        else:
            complete(study, store, value)
    for each in words:
        assert each in verdict(store)


def test_the_final_sentence_names_counts_interval_seeds_and_openings() -> None:
    assert final_sentence(None) == "The test set has not been opened."
    text = final_sentence(final_result())
    for words in (
        "91.00 %",
        "273 correct of 300",
        "3 seeds on 100 test images",
        "95 % interval",
        "1.00 points",
        "train+val",
    ):
        assert words in text
    assert text.endswith("The test set was opened once.")
    one = final_sentence(final_result(seeds=1))
    assert "1 seed on 100 test images" in one
    assert "deviation" not in one
    again = final_sentence(final_result() | {"test_openings": 2})
    assert "opened 2 times, so this number is no longer untouched" in again


def test_percent_shows_nothing_for_nothing() -> None:
    assert percent(None) == "–"
    assert percent(0.5) == "50.00 %"


# -- the final result ----------------------------------------------------------------------------------------------


def seeds_of(*corrects: int, total: int = 6149) -> list[dict[str, Any]]:
    return [
        {"seed": number, "correct": correct, "total": total, "accuracy": correct / total}
        for number, correct in enumerate(corrects)
    ]


def wilson(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson (1927), written out."""
    share, squared = correct / total, z * z / total
    centre = share + squared / 2
    half = z * math.sqrt(share * (1 - share) / total + squared / (4 * total))
    return (centre - half) / (1 + squared), (centre + half) / (1 + squared)


@pytest.mark.parametrize("corrects", [(6000,), (6000, 6010, 6020), (0,), (6149,), (6149, 6149)])
def test_accuracy_is_correct_by_total_over_all_seeds(corrects: tuple[int, ...]) -> None:
    result = summary(seeds_of(*corrects))
    assert (result["correct"], result["total"]) == (sum(corrects), 6149 * len(corrects))
    assert result["accuracy"] == result["correct"] / result["total"]
    assert result["per_seed"] == seeds_of(*corrects)


@pytest.mark.parametrize(("correct", "total"), [(6000, 6149), (0, 10), (10, 10), (1, 3), (5, 10)])
def test_the_interval_of_one_seed_is_wilsons(correct: int, total: int) -> None:
    result = summary(seeds_of(correct, total=total))
    assert result["interval"] == pytest.approx(wilson(correct, total), abs=1e-9)
    assert 0 <= result["interval"][0] <= result["accuracy"] + 1e-12
    assert result["accuracy"] - 1e-12 <= result["interval"][1] <= 1


def test_several_seeds_on_the_same_images_do_not_narrow_the_interval() -> None:
    assert summary(seeds_of(6000, 6000, 6000))["interval"] == summary(seeds_of(6000))["interval"]
    assert summary(seeds_of(5990, 6000, 6010))["interval"] == pytest.approx(wilson(6000, 6149), abs=1e-9)


def test_one_seed_has_no_spread_and_several_have_a_standard_deviation() -> None:
    assert summary(seeds_of(6000))["spread"] is None
    assert summary(seeds_of(6000, 6000))["spread"] == 0
    assert summary(seeds_of(90, 91, 92, total=100))["spread"] == pytest.approx(0.01)


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_a_trial(study: Study, store: Store, tmp_path: Path) -> None:
    every_state(study, store)
    page = write_report("tiny", store, MLFLOW, tmp_path / "out")
    table = pandas.read_csv(page.with_name("trials.csv"))
    assert list(table["number"]) == list(range(10))
    assert list(table["state"])[6:] == ["failed", "diverged", "pruned", "interrupted"]
    assert set(study.space) <= set(table.columns)
    best = store.best()
    assert best is not None
    assert table["value"].max() == best.value
    assert table.loc[best.number, "optim.base_lr"] == pytest.approx(best.params["optim.base_lr"])
    assert table["epochs"][9] == 1


def test_the_table_of_no_trial_has_its_columns(store: Store, tmp_path: Path) -> None:
    page = write_report("tiny", store, MLFLOW, tmp_path)
    table = pandas.read_csv(page.with_name("trials.csv"))
    assert len(table) == 0
    assert {"number", "state", "value"} <= set(table.columns)


def test_the_table_is_the_same_in_memory(study: Study, store: Store) -> None:
    every_state(study, store)
    text = frame(store).to_csv(index=False)
    assert len(pandas.read_csv(io.StringIO(text))) == len(store.trials())


# -- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load, and the text between the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.words += data


def page_of(store: Store, folder: Path) -> tuple[str, Page]:
    text = write_report("tiny", store, MLFLOW, folder).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_of_a_study_without_trials(store: Store, tmp_path: Path) -> None:
    _, page = page_of(store, tmp_path)
    assert "No trial is complete yet." in page.words
    assert "The test set has not been opened." in page.words


def test_the_page_of_a_study_with_one_unfinished_trial(study: Study, store: Store, tmp_path: Path) -> None:
    asked = store.ask(study)
    page_of(store, tmp_path)  # before its first epoch
    store.report(asked, 1, 0.25)
    _, page = page_of(store, tmp_path)
    assert "interrupted" in page.words


def test_the_page_of_a_study_with_one_complete_trial(study: Study, store: Store, tmp_path: Path) -> None:
    complete(study, store, 0.5)
    _, page = page_of(store, tmp_path)
    assert "no trial beats the base configuration" in page.words


def test_the_page_of_a_study_whose_trials_all_failed(study: Study, store: Store, tmp_path: Path) -> None:
    for _ in range(3):
        fail_trial(study, store)
    _, page = page_of(store, tmp_path)
    assert "No trial is complete yet." in page.words
    assert "out of memory" in page.words


def test_the_page_of_a_study_whose_trials_are_all_equal(study: Study, store: Store, tmp_path: Path) -> None:
    for _ in range(3):
        complete(study, store, 0.5)
    assert "Importances need two complete trials with different results." in page_of(store, tmp_path)[0]


def test_the_page_of_a_finished_study_needs_no_network_and_is_light(study: Study, store: Store, tmp_path: Path) -> None:
    every_state(study, store)
    store.set_attribute("final", final_result())
    text, page = page_of(store, tmp_path)
    assert not [each for each in page.loads if each.startswith(("http", "//"))]
    assert "<b>out of memory</b>" not in text.replace("\\u003c", "<")
    assert text.count("* plotly.js v") == 1
    assert len(text.encode()) < 8_000_000
    assert "91.00 %" in page.words
    for title in ("Learning curves", "Optimisation history", "Importances", "Trials"):
        assert title in page.words
    assert page.tags.count("h1") == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_report_can_be_written_again_over_the_old_one(study: Study, store: Store, tmp_path: Path) -> None:
    first = write_report("tiny", store, MLFLOW, tmp_path / "deep" / "folder")
    complete(study, store, 0.5)
    assert write_report("tiny", store, MLFLOW, tmp_path / "deep" / "folder") == first
    assert "50.00 %" in first.read_text(encoding="utf-8")
