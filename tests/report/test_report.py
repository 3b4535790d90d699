"""What the storage says, as one object, as a table and as a page that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial
from PIL import Image

from harness.base.words import percent
from harness.config.events import Completed, Diverged, Pruned
from harness.config.final_result import FinalResult
from harness.config.space import Choice, Float, Int
from harness.config.study import Study
from harness.final.predictions import pictured, thumbnails
from harness.final.pruning_cost import Course, audit_sentences, drawing_order, record
from harness.final.sentences import final_sentence, verdict
from harness.final.test_set import summary
from harness.report.figures import whole_numbers
from harness.report.overview import frame, overview
from harness.report.search_figures import search_plots
from harness.report.write import _strip, write_report
from harness.search.pruners import asha, no_pruning
from harness.search.samplers import grid
from harness.store.store import Store, TrialRecord
from tests.analytic import NOT_COMPARED, epoch_result, fail_trial, memory_store, run_analytic
from tests.conftest import make_study
from tests.final.test_predictions import record_of

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
    per_seed = [
        {"seed": n, "correct": 90 + n, "total": 100, "accuracy": (90 + n) / 100, "weights": "0"} for n in range(seeds)
    ]
    return summary(per_seed) | {"trial": 0, "fit_on": "train+val", "test_openings": 1} | NOT_COMPARED


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
    text = final_sentence(FinalResult.of(final_result()))
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
    one = final_sentence(FinalResult.of(final_result(seeds=1)))
    assert "1 seed on 100 test images" in one
    assert "deviation" not in one
    again = final_sentence(FinalResult.of(final_result() | {"test_openings": 2}))
    assert "opened 2 times, so selection may have biased this number" in again


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


def test_searched_epochs_do_not_hide_how_many_were_trained(study: Study) -> None:
    study = dataclasses.replace(study, space={**study.space, "epochs": Int(2, 9)})
    store = memory_store(study)
    run_analytic(study, store, 6, epochs=2)
    table = frame(store)
    assert list(table["epochs"]) == [len(trial.curve) for trial in store.trials()]
    assert list(table["epochs (searched)"]) == [trial.params["epochs"] for trial in store.trials()]


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
    for title in ("Learning curves", "Optimisation history", "Importances", "All trials"):
        assert title in page.words
    assert page.tags.count("h1") == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_report_can_be_written_again_over_the_old_one(study: Study, store: Store, tmp_path: Path) -> None:
    first = write_report("tiny", store, MLFLOW, tmp_path / "deep" / "folder")
    complete(study, store, 0.5)
    assert write_report("tiny", store, MLFLOW, tmp_path / "deep" / "folder") == first
    assert "50.00 %" in first.read_text(encoding="utf-8")


# -- what a page shows of a study that is unlike the others --------------------------------------------------------


def test_a_study_whose_configurations_are_all_the_same_leads_with_that(store: Store, tmp_path: Path) -> None:
    study = make_study("cache", space={"epochs": Choice((2,))}, pruner=no_pruning())
    for value in (0.5, 0.75):
        complete(study, store, value)
    _, page = page_of(store, tmp_path)
    lead = page.words.index("No configuration is better than another: all 2 trials have the same one.")
    assert lead < page.words.index("75.00 %")


def test_a_grid_is_shown_as_a_table(tmp_path: Path) -> None:
    rates, multipliers = Choice((1e-3, 3e-4)), Choice((0.3, 0.5))
    space = {"optim.base_lr": rates, "optim.depth_lr_mult": multipliers}
    study = make_study("cache", space=space, sampler=grid(), pruner=no_pruning(), trials=4)
    store = memory_store(study)
    store.set_attribute("definition", study.definition())
    for value in (0.5, 0.6, 0.7, 0.8):
        complete(study, store, value)
    text, page = page_of(store, tmp_path)
    assert "The mean of the complete trials in each cell." in page.words
    assert all(f"{value} %" in text for value in ("50.00", "60.00", "70.00", "80.00"))


def test_trials_on_a_line_have_dots_and_no_contour(tmp_path: Path) -> None:
    study = make_study("cache", space={"optim.base_lr": Float(1e-4, 1e-2, log=True)}, pruner=no_pruning())
    plots = {plot.title: plot for plot in search_plots(*with_params(study, [(1e-3, 0.5), (2e-3, 0.5), (4e-3, 0.5)]))}
    figure = plots["Base learning rate against depth-LR multiplier"].figure
    assert figure is not None
    assert [trace.type for trace in figure.data] == ["scatter", "scatter"]


def test_equal_accuracies_have_colours_and_marks_between_none_and_all() -> None:
    study = make_study("cache", pruner=no_pruning())
    store = memory_store(study)
    for _ in range(2):
        complete(study, store, 0.9)
    plots = {plot.title: plot.figure for plot in search_plots(store, store.trials())}
    dots, parallel = plots["Base learning rate against depth-LR multiplier"], plots["Parallel coordinates"]
    assert dots is not None
    assert parallel is not None
    assert (dots.data[-1].marker.cmin, dots.data[-1].marker.cmax) == (0, 1)
    texts = [each.text for each in parallel.layout.annotations]
    assert [text for text in texts if text.endswith(" %")] == ["90.0 %"]


@pytest.mark.parametrize(
    ("first", "last", "step"), [(0, 0, 1), (1, 1, 1), (1, 10, 1), (0, 10, 2), (0, 49, 5), (0, 99, 10), (0, 250, 50)]
)
def test_an_axis_of_whole_numbers_has_ten_marks_at_most(first: int, last: int, step: int) -> None:
    axis = whole_numbers(first, last, room=0.6)
    assert (axis["dtick"], axis["range"]) == (step, [first - 0.6, last + 0.6])


def with_params(study: Study, pairs: list[tuple[float, float]]) -> tuple[Store, list[TrialRecord]]:
    store = memory_store(study)
    space = {"optim.base_lr": FloatDistribution(1e-4, 1e-2, log=True), "optim.depth_lr_mult": FloatDistribution(0, 1)}
    for number, pair in enumerate(pairs):
        params = dict(zip(space, pair, strict=True))
        store.optuna_study.add_trial(create_trial(params=params, distributions=space, value=0.5 + number / 100))
    return store, store.trials()


def test_the_ladder_gives_every_depth_its_rate_and_names_the_frozen_ones() -> None:
    study = make_study("cache", pruner=no_pruning())
    for multiplier, rates, frozen in ((0.5, [2.5e-4, 5e-4, 1e-3], ""), (0.0, [1e-3], "Frozen: stem, blocks.0.")):
        store, trials = with_params(study, [(1e-3, multiplier)])
        store.set_attribute("definition", study.definition())
        store.set_attribute("depths", {"block": ["stem.", "blocks.0.", "classifier."]})
        plot = {plot.title: plot for plot in search_plots(store, trials)}["Learning rate over depth"]
        assert plot.figure is not None
        assert list(plot.figure.data[0].x) == pytest.approx(rates)
        assert frozen in plot.caption


def test_what_is_not_recorded_is_said(study: Study, tmp_path: Path) -> None:
    study = dataclasses.replace(study, pruner=no_pruning())
    store = memory_store(study)
    run_analytic(study, store, 3)
    store.set_attribute("final", final_result())
    _, page = page_of(store, tmp_path)
    for words in (
        "The predictions of this study are not recorded.",
        "The selection bias of the best validation score is not recorded.",
        "The depths of the backbone are not recorded.",
        "not recorded",
    ):
        assert words in page.words


def with_accuracy(share: float) -> dict[str, Any]:
    seed = {"seed": 0, "correct": round(100 * share), "total": 100, "accuracy": share, "weights": "0"}
    return summary([seed]) | {"trial": 0}


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"interval": [0.7, 0.95]}, ("70 %", "100 %")),
        ({"interval": [0.91, 0.912], "base": with_accuracy(0.38)}, ("30 %", "100 %")),
        (with_accuracy(1.0) | {"interval": [1.0, 1.0]}, ("90 %", "100 %")),
        (with_accuracy(0.0) | {"interval": [0.0, 0.0]}, ("0 %", "10 %")),
    ],
)
def test_the_line_of_the_number_ends_at_whole_tens(changes: dict[str, Any], ends: tuple[str, str]) -> None:
    found = _strip(FinalResult.of(final_result() | {"base": None} | changes))
    assert found["ends"] == ends
    assert all(0 <= place <= 100 for place in (found["low"], found["mean"], found["low"] + found["width"]))


def test_the_colours_of_the_contour_come_to_the_outermost_trials() -> None:
    study = make_study("cache", pruner=no_pruning())
    corners = [(1e-4, 0.0), (1e-4, 1.0), (1e-2, 0.0), (1e-2, 1.0), (1e-3, 0.5), (2e-3, 0.4)]
    plots = {plot.title: plot.figure for plot in search_plots(*with_params(study, corners))}
    figure = plots["Base learning rate against depth-LR multiplier"]
    assert figure is not None
    contour = next(trace for trace in figure.data if trace.type == "contour")
    known = np.array([[value is not None for value in row] for row in contour.z])
    assert known.mean() > 0.98
    assert min(known.shape) >= 150, "one step is less than a dot"


def test_the_page_shows_classes_mistakes_and_calibration(study: Study, store: Store, tmp_path: Path) -> None:
    run_analytic(study, store, 3)
    store.set_attribute("final", final_result())
    record = record_of([0, 0, 1], [[0, 1, 1]], [[0.9, 0.8, 0.7]], ["<i>rose", "tulip"])
    store.set_attribute("predictions", record)
    pixels = torch.from_numpy(np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3))
    store.set_attribute("thumbnails", thumbnails(pixels, [1]))
    text, page = page_of(store, tmp_path)
    assert "<i>" not in text
    assert "<i>rose predicted as tulip" in page.words
    assert "1 of 2" in page.words
    assert text.count("data:image/jpeg;base64,") == 2  # among the confusions, and among the mistakes
    assert page.words.count("no picture") == 1
    for title in ("Accuracy of each class", "Confusion matrix", "Calibration"):
        assert title in page.words


@pytest.mark.slow
def test_a_hundred_classes_stay_light(study: Study, store: Store, tmp_path: Path) -> None:
    run_analytic(study, store, 3)
    store.set_attribute("final", final_result())
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(102, size=6149), generator.integers(102, size=(3, 6149))
    record = record_of(labels, predicted, generator.random((3, 6149)), [f"species {number}" for number in range(102)])
    store.set_attribute("predictions", record)
    images = torch.from_numpy(generator.integers(256, size=(6149, 8, 8, 3)).astype(np.uint8))
    store.set_attribute("thumbnails", thumbnails(images, pictured(record)))
    text, _ = page_of(store, tmp_path)
    assert len(text.encode()) < 8_000_000


def test_a_thumbnail_is_a_small_jpeg_of_the_image() -> None:
    grey = torch.full((2, 224, 224, 3), 128, dtype=torch.uint8)
    found = thumbnails(grey, [1])
    assert list(found) == ["1"]
    with Image.open(io.BytesIO(base64.b64decode(found["1"]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (96, 96))
        assert abs(picture.getpixel((40, 40))[0] - 128) <= 2


def test_failures_are_shown_with_their_tracebacks(study: Study, store: Store, tmp_path: Path) -> None:
    fail_trial(study, store, "ValueError: <script>alert(1)</script>")
    text, page = page_of(store, tmp_path)
    assert "<script>alert" not in text
    assert "Trial 0 failed: ValueError: <script>alert(1)</script>" in page.words
    assert "Traceback" in page.words


@pytest.mark.slow
def test_the_page_shows_the_second_look_the_ledger_and_the_duplicates(
    study: Study, store: Store, tmp_path: Path
) -> None:
    for value in (0.5, 0.6):
        complete(study, store, value)
    results = {
        "1": [{"seed": 0, "accuracy": 0.55}, {"seed": 1, "accuracy": 0.65}],
        "0": [{"seed": 0, "accuracy": 0.45}],
    }
    store.set_attribute("rerank", {"candidates": [1, 0], "results": results, "chosen": 1})
    opening = {"event": "opened", "trial": 1, "configuration": "0", "reason": "a <b>bolder</b> choice"}
    store.add_to_ledger({"time": "2026-11-22T10:00:00+00:00", "commit": "0123456789", **opening})
    store.set_attribute("duplicates", {"images": 1200, "exact": [["val/a.jpg", "test/b.jpg"]], "near": []})
    text, page = page_of(store, tmp_path / "whole")
    assert "<b>bolder" not in text
    for words in ("60.00 %", "55.00 %, 65.00 %", "a <b>bolder</b> choice", "2026-11-22 10:00", "val/a.jpg"):
        assert words in page.words
    assert "among 1,200 images: 1 with the same bytes, 0 that look nearly the same" in page.words
    assert "Do not trust this" not in page.words
    assert 'class="untrusted"' not in text
    lines = store.attributes().get("ledger")
    store.set_attribute("ledger", [lines[0] | {"reason": "another"}])
    text, page = page_of(store, tmp_path)
    assert "Do not trust this: line 1 of the test ledger was changed." in page.words
    assert text.index("Do not trust this") < text.index('<h1 class="untrusted">')


def test_an_audit_says_what_pruning_saved_in_place_of_the_estimate(study: Study, store: Store, tmp_path: Path) -> None:
    run_analytic(study, store, 12)
    store.set_attribute("definition", study.definition() | {"epochs": 6})
    assert "Pruning ended" in page_of(store, tmp_path)[1].words
    courses = [
        Course(
            number=each.number,
            state=each.state,
            epochs=6,
            curve=tuple(each.curve.values()),
            seconds=each.seconds or 0.0,
            epoch_seconds=0.5,
        )
        for each in store.trials()
    ]
    first = drawing_order([each.number for each in courses if each.state == "pruned"], 0)[0]
    audited = record(courses, {str(first): {"curve": [0.1] * 6, "same": True}}, asked=1, seed=0)
    store.set_attribute("audit", audited)
    _, page = page_of(store, tmp_path)
    assert "Pruning ended" not in page.words
    assert all(sentence in page.words for sentence in audit_sentences(audited, "accuracy"))


def test_the_page_is_about_the_trial_that_was_tested(study: Study, store: Store, tmp_path: Path) -> None:
    complete(study, store, 0.5)
    store.set_attribute("final", final_result())
    complete(study, store, 0.75)
    _, page = page_of(store, tmp_path)
    assert "python -m harness reproduce tiny 0" in page.words
    assert store.why_closed() in page.words
    assert "When the test set was opened: " in page.words


def test_the_same_numbers_are_in_the_overview(study: Study, store: Store) -> None:
    run_analytic(study, store, 3)
    store.set_attribute("predictions", record_of([0, 1], [[0, 0]], [[0.9, 0.8]], ["rose", "tulip"]))
    assert overview("tiny", store, MLFLOW)["test"] is None  # no test result is shown before the final one is recorded
    store.set_attribute("final", final_result())
    assert overview("tiny", store, MLFLOW)["test"]["per_class"][0]["accuracy"] == 0
