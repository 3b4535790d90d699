"""The report in a real browser: it needs no network, says what `show --json` says, and fits on a phone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.base.words import percent
from harness.final.predictions import calibration_sentence
from harness.report.overview import overview
from harness.report.write import write_report
from harness.store.opening import read_store
from tests.browser import page
from tests.faulty import complete, small_study

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Request

pytestmark = pytest.mark.slow
MLFLOW = "sqlite:////somewhere/mlflow.db"


@pytest.fixture(scope="module")
def finished(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The report of a study that really ran, and what `show --json` says of it."""
    folder = tmp_path_factory.mktemp("finished")
    complete(small_study(image_cache), folder)
    with read_store("tiny", f"sqlite:///{folder}/tiny.db") as store:
        seen: dict[str, Any] = json.loads(json.dumps(overview("tiny", store, MLFLOW)))
        return write_report("tiny", store, MLFLOW, folder), seen


@contextlib.contextmanager
def opened(report: Path, **options: Any) -> Iterator[Page]:
    """The report, drawn, with the network off; at the end nothing else was asked for and the console is silent."""
    asked: list[str] = []
    said: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    def hear(message: ConsoleMessage) -> None:
        said.append(f"{message.type}: {message.text}")

    with page(offline=True, **options) as tab:
        tab.on("request", note)
        tab.on("console", hear)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(report.as_uri())
        figures = tab.locator("figure script").count()
        assert figures == tab.locator(".canvas svg.main-svg:first-child").count()
        assert figures >= 6
        yield tab
        assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
        assert said == []


def test_the_page_says_what_show_json_says(finished: tuple[Path, dict[str, Any]]) -> None:
    report, seen = finished
    final, tested = seen["final"], seen["test"]
    assert report.stat().st_size < 8_000_000
    with opened(report) as tab:
        assert tab.locator("#headline").inner_text() == percent(final["accuracy"])
        words = tab.locator("body").inner_text()
        for share in (*final["interval"], final["balanced_accuracy"], seen["best"]["value"]):
            assert percent(share) in words
        assert seen["conclusion"] in words
        assert calibration_sentence(tested) in words
        assert f"{100 * tested['ece_saved']:.2f} points\nof the saved model, seed 0" in words
        assert f"python -m harness reproduce tiny {seen['chosen']}" in words
        assert seen["ledger"]["lines"][0]["hash"][:12] in words
        assert tab.locator(".gallery img").count() == len(tested["mistakes"]) > 0
        assert tab.locator(".pairs img").count() > 0
        loaded = "images => images.every(each => each.decode === undefined || each.src.startsWith('data:image/jpeg'))"
        assert tab.locator("img").evaluate_all(loaded)
        assert tab.locator("table.sortable tbody tr").count() == sum(seen["trials"].values())


def marks(tab: Page, title: str, axis: str) -> list[str]:
    """What stands along an axis of the figure with that title."""
    figure = tab.locator("figure", has=tab.get_by_role("heading", name=title, exact=True))
    return figure.locator(f".{axis}tick text").all_text_contents()


def test_epochs_and_trials_are_whole_and_accuracies_lie_between_none_and_all(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    with opened(finished[0]) as tab:
        assert marks(tab, "Learning curves", "x") == ["1", "2"]
        assert marks(tab, "Time of each trial", "x") == ["0", "1", "2"]
        assert marks(tab, "Optimisation history", "x") == [str(epoch) for epoch in range(7)]  # three trials of two
        for title in ("Learning curves", "Optimisation history", "Accuracy of each class", "Calibration"):
            shares = [float(each.removesuffix("%")) for each in marks(tab, title, "y")]
            assert len(shares) > 1
            assert min(shares) >= 0
            assert max(shares) <= 100


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(finished: tuple[Path, dict[str, Any]], dark: bool) -> None:
    with opened(finished[0], width=390, height=844, dark=dark) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.evaluate("[...document.querySelectorAll('.plot')].every(each => each.clientWidth <= 390)")


def test_what_is_wider_than_a_phone_says_so(finished: tuple[Path, dict[str, Any]]) -> None:
    """Commands stay on their line, for a browser breaks --set after its dashes; a shadow shows where there is more."""
    with opened(finished[0], width=375, height=844) as tab:
        for command in tab.locator(".command code").all():
            assert command.evaluate("each => getComputedStyle(each).whiteSpace") == "pre"
        for box in tab.locator(".scroll, .command code").all():
            assert box.evaluate("each => getComputedStyle(each).overflowX") == "auto"
            attached = box.evaluate("each => getComputedStyle(each).backgroundAttachment").split(", ")
            assert attached == ["local", "local", "scroll", "scroll"]


def test_the_calibration_counts_its_predictions_and_is_marked_to_the_end(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    report, seen = finished
    with opened(report) as tab:
        assert marks(tab, "Calibration", "x")[-1] == marks(tab, "Calibration", "y")[-1] == "100%"
        figure = tab.locator("figure", has=tab.get_by_role("heading", name="Calibration", exact=True))
        counted = figure.locator(".textpoint text").all_text_contents()
        assert counted == [str(each["count"]) for each in seen["test"]["calibration"]]


def test_the_figures_follow_the_colour_scheme(finished: tuple[Path, dict[str, Any]]) -> None:
    line = "document.querySelector('.js-line').style.stroke"
    with opened(finished[0]) as tab:
        light = tab.evaluate(line)
        tab.emulate_media(color_scheme="dark")
        tab.wait_for_function(f"{line} !== '{light}'")
        assert "var(" not in tab.locator(".canvas").first.inner_html()


def test_a_click_sorts_the_trials(finished: tuple[Path, dict[str, Any]]) -> None:
    with opened(finished[0]) as tab:
        head = tab.locator("table.sortable th", has_text="optim.base_lr")
        place = head.evaluate("each => each.cellIndex")

        def values() -> list[float]:
            rows = f"rows => rows.map(row => Number(row.cells[{place}].dataset.value))"
            found: list[float] = tab.locator("table.sortable tbody tr").evaluate_all(rows)
            return found

        head.locator("button").click()
        assert values() == sorted(values())
        head.locator("button").click()
        assert values() == sorted(values(), reverse=True)
