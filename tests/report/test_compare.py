"""Several studies side by side: what differs, what is tested on the same images, and who opened them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.base.packing import pack
from harness.cli.commands import main
from harness.config.find import find
from harness.config.study import Study
from harness.final.predictions import from_record
from harness.final.statistics import compare, holm
from harness.final.test_set import summary
from harness.report import comparison
from harness.report.compare import best_so_far, compared
from harness.store.opening import names_in, open_store, read_store
from harness.store.store import Store
from tests.analytic import NOT_COMPARED, Died, run_analytic
from tests.browser import page
from tests.final.test_predictions import record_of
from tests.refusal import assert_refused, tree

CLASSES = ["rose", "tulip"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with studies/, as the working directory."""
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(name: str, trials: int = 3, changes: str = "") -> Study:
    """Write a study's file into the working directory, and run analytic trials; `changes` are of its training."""
    file = Path("studies") / f"{name}.py"
    file.write_text(
        "import dataclasses\n\nfrom tests.conftest import make_study\n\n"
        f"STUDY = make_study('cache', name={name!r})\n"
        f"STUDY = dataclasses.replace(STUDY, train=dataclasses.replace(STUDY.train, {changes}))\n"
    )
    found = find(name)
    with open_store(found.study, found.storage_url) as store:
        run_analytic(found.study, store, trials)
    return found.study


def record(hits: Any, images: Sequence[int] | None, classes: list[str] = CLASSES) -> dict[str, Any]:
    """Predictions of images of the first class that are right where `hits` [seeds, images] are."""
    predicted = np.where(np.array(hits, dtype=bool), 0, 1)
    found = record_of([0] * predicted.shape[1], predicted, np.full(predicted.shape, 0.9), classes)
    return found | ({} if images is None else {"images": pack(np.array(images, dtype="uint64"))})


def test_on(study: Study, hits: Any, images: Sequence[int] | None) -> None:
    """Record a test result, as the final run does."""
    with open_store(study, find(study.name).storage_url) as store:
        opened(store)
        per_seed = [
            {"seed": n, "correct": sum(row), "total": len(row), "accuracy": sum(row) / len(row), "weights": "0"}
            for n, row in enumerate(hits)
        ]
        final = summary(per_seed) | {"trial": 0, "fit_on": "train", "test_openings": 1} | NOT_COMPARED
        store.set_attribute("final", final)
        store.set_attribute("predictions", record(hits, images))


test_on.__test__ = False  # type: ignore[attr-defined]


def opened(store: Store) -> None:
    line = {"time": "2026-01-02T03:04:05+00:00", "commit": "c", "event": "opened", "trial": 0, "reason": None}
    store.add_to_ledger(line)


def seen(capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *names, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- definitions and the best so far -------------------------------------------------------------------------------


def test_only_what_differs_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun("one")
    begun("two", changes="batch_size=8")
    begun("three")
    assert seen(capsys, "one", "two")["definitions"] == [{"path": "batch_size", "values": {"one": 16, "two": 8}}]
    assert seen(capsys, "one", "three")["definitions"] == []
    assert main(["compare", "one", "three"]) == 0
    assert "The studies have the same definition." in capsys.readouterr().out


def test_a_field_that_is_newer_than_a_study_has_its_default(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, _ = begun("one"), begun("two")
    with open_store(old, find("one").storage_url) as store:
        definition = store.facts().definition or {}
        del definition["augment.mixup"]
        store.set_attribute("definition", definition)
    assert seen(capsys, "one", "two")["definitions"] == []


def test_the_best_so_far_ends_at_the_best_and_at_what_it_cost(place: Path) -> None:
    study = begun("one", trials=8)
    with open_store(study, find("one").storage_url) as store, pytest.raises(Died):
        run_analytic(study, store, 9, stop_after=(8, 1, "report"))
    with read_store("one", find("one").storage_url) as store:
        trials, best = store.trials(), store.best()
    points = best_so_far(trials)
    assert best is not None
    assert [point["trials"] for point in points] == list(range(9 - len(points), 9))
    values = [point["value"] for point in points]
    assert values == sorted(values)
    assert values[-1] == best.value
    assert points[-1]["epochs"] == sum(len(trial.epochs) for trial in trials)
    assert points[-1]["seconds"] == sum(trial.seconds or 0.0 for trial in trials)
    assert best_so_far([]) == []


# -- test results --------------------------------------------------------------------------------------------------


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_two_studies_are_compared_on_the_images_of_both() -> None:
    draw = np.random.default_rng(0)
    hits, others = draw.random((3, 40)) < 0.9, draw.random((2, 30)) < 0.5
    # The second was tested on images 10 to 39, in another order.
    order = draw.permutation(np.arange(10, 40))
    tested = {"one": from_record(record(hits, range(40))), "two": from_record(record(others, order.tolist()))}
    (pair,) = comparison.pairs(tested)
    by_hand = compare(hits[:, 10:], others[:, np.argsort(order)])
    assert (pair.images, pair.seeds) == (30, (3, 2))
    assert (pair.difference, pair.low, pair.high, pair.p) == (
        by_hand.difference,
        by_hand.low,
        by_hand.high,
        by_hand.p,
    )
    assert pair.corrected == pair.p
    assert comparison.conclusion([pair]) == "one is better than two on the test images."
    assert "over 3 and 2 seeds and 30 test images of both" in comparison.sentence(pair)


def test_more_than_two_are_corrected() -> None:
    draw = np.random.default_rng(0)
    tested = {
        name: from_record(record(draw.random((3, 60)) < share, range(60)))
        for name, share in zip("abc", (0.9, 0.8, 0.5), strict=True)
    }
    pairs = comparison.pairs(tested)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.corrected for pair in pairs] == holm([pair.p or 0.0 for pair in pairs])


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (record([[1, 0]], [1, 2]), "There is no test of one and two: with one seed, the spread is unknown"),
        (record([[1, 0], [1, 1]], [3, 4]), "one and two share no test image."),
        (record([[1, 0], [1, 1]], None), "Which test images two had is not recorded."),
        (record([[1, 0], [1, 1]], [1, 2], ["rose", "daisy"]), "one and two have different classes"),
    ],
)
def test_what_cannot_be_tested_says_why(other: dict[str, Any], why: str) -> None:
    tested = {"one": from_record(record([[1, 0], [1, 1]], [1, 2])), "two": from_record(other)}
    (pair,) = comparison.pairs(tested)
    assert pair.p is None
    assert why in (pair.why or "")
    assert not comparison.conclusion([pair]).startswith("one is better")


def test_an_image_of_another_class_is_another_image() -> None:
    other = record([[1, 0], [1, 1]], [1, 2]) | {"classes": CLASSES[::-1]}
    (pair,) = comparison.pairs({"one": from_record(record([[1, 0], [1, 1]], [1, 2])), "two": from_record(other)})
    assert pair.images == 0


# -- who opened the test images ------------------------------------------------------------------------------------


def test_the_openings_of_all_studies_in_reach_are_added_up(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hits = [[True, False, True]] * 2
    test_on(begun("one"), hits, [1, 2, 3])
    test_on(begun("two"), hits, [2, 3, 4])
    test_on(begun("third"), hits, [4, 5, 6])  # shares one image with the second
    test_on(begun("elsewhere"), hits, [7, 8, 9])
    with open_store(begun("crashed"), find("crashed").storage_url) as store:
        opened(store)
    with open_store(
        begun("others", changes="data=dataclasses.replace(STUDY.train.data, seed=1)"), find("others").storage_url
    ) as store:
        opened(store)
    Path("studies/third.db").rename("studies/third.20260101-000000.db")  # as --fresh does
    shutil.copy("studies/two.db", "studies/copy.db")
    Path("studies/broken.db").write_text("nothing")
    found = seen(capsys, "one", "two")["openings"]
    assert {each["study"]: each["shared"] for each in found["studies"]} == {
        "one": 3,
        "two": 3,
        "third": 1,
        "crashed": None,
    }
    assert found["openings"] == 4
    assert "opened 4 times, by 4 studies in reach" in found["sentence"]
    assert "not recorded: 1." in found["sentence"]
    assert len(found["unread"]) == 1
    assert "broken.db" in found["unread"][0]


def test_all_studies_of_a_database_are_in_reach(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{place}/all.db"
    for name in ("one", "two", "three"):
        study = begun(name)
        with open_store(study, url) as store:
            opened(store)
    assert names_in(url) == ["one", "two", "three"]
    assert seen(capsys, "one", "two", "--storage", url)["openings"]["openings"] == 3


# -- the command ---------------------------------------------------------------------------------------------------


def test_a_study_may_be_untested_running_or_without_a_trial(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test_on(begun("one"), [[True, False]] * 2, [1, 2])
    running = begun("two")
    begun("three", trials=0)
    before = tree(place)
    with open_store(running, find("two").storage_url):
        assert main(["compare", "one", "two", "three"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "two is not tested." in out
    written = place / "studies" / "one.report" / "compare-two-three.html"
    assert str(written) in out
    text = written.read_text(encoding="utf-8")
    assert "no trial is complete yet" in text
    after = tree(place)
    new = {name for name in after.keys() - before.keys() if ".db-" not in name and ".db." not in name}
    assert new == {"studies/one.report", "studies/one.report/compare-two-three.html"}
    assert {name: after[name] for name in before if name.endswith(".db")} == {
        name: content for name, content in before.items() if name.endswith(".db")
    }


def test_wrong_studies_are_refused_in_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun("one")
    begun("two")
    Path("studies/new.py").write_text(Path("studies/one.py").read_text().replace("'one'", "'new'"))
    for names, words in (
        (["one"], ["two studies or more", "'one'"]),
        (["one", "studies/one.py"], ["'one' and 'studies/one.py' are the same study"]),
        (["one", "nothing"], ["no study 'nothing'"]),
        (["one", "new"], ["'new' has no results yet"]),
        (["one", "two", "--output", "studies/one.py"], ["is a file; give a folder"]),
    ):
        assert_refused(place, capsys, ["compare", *names], words)


def test_studies_of_one_name_are_called_as_they_were_given(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun("one")
    (place / "other" / "studies").mkdir(parents=True)
    shutil.copy("studies/one.py", "other/studies/one.py")
    other = find("other/studies/one.py")
    with open_store(other.study, other.storage_url) as store:
        run_analytic(other.study, store, 1)
    assert list(seen(capsys, "one", "other/studies/one.py")["studies"]) == ["one", "other/studies/one.py"]


@pytest.fixture(scope="module")
def tested(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two small studies that reached test results of two seeds; the second has half of the test images."""
    folder = tmp_path_factory.mktemp("tested")
    (folder / "studies").mkdir()
    for name, test_images in (("one", 4), ("two", 2)):
        (folder / "studies" / f"{name}.py").write_text(
            "import dataclasses\n\nfrom harness import FinalConfig\nfrom tests.small import small_study\n\n"
            f"STUDY = dataclasses.replace(small_study({str(image_cache)!r}), name={name!r}, trials=2)\n"
            f"DATA = dataclasses.replace(STUDY.train.data, test_per_class={test_images})\n"
            "TRAIN = dataclasses.replace(STUDY.train, data=DATA)\n"
            "FINAL = FinalConfig(seeds=2, publish=False)\n"
            "STUDY = dataclasses.replace(STUDY, train=TRAIN, final=FINAL)\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("one", "two"):
            assert main(["run", "--study", name]) == 0
        yield folder


@pytest.mark.slow
def test_two_real_studies_are_compared_on_the_test_images_of_both(
    tested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tested)
    before = {name: content for name, content in tree(tested).items() if name.endswith(".db")}
    found = seen(capsys, "one", "two")
    (test,) = found["tests"]
    assert test["images"] == found["studies"]["two"]["test"]["images"] == 32
    assert found["studies"]["one"]["test"]["images"] == 64
    assert 0 <= test["p"] <= 1
    assert test["low"] <= test["difference"] <= test["high"]
    assert [each["openings"] for each in found["openings"]["studies"]] == [1, 1]
    assert {each["path"] for each in found["definitions"]} == {"data.test_per_class", "content of data"}
    assert {name: content for name, content in tree(tested).items() if name.endswith(".db")} == before
    assert found == json.loads(json.dumps(compared(["one", "two"])[0]))


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_without_a_network_and_fits(
    tested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, dark: bool
) -> None:
    monkeypatch.chdir(tested)
    assert main(["compare", "one", "two", "--output", "page"]) == 0
    capsys.readouterr()
    found, said = compared(["one", "two"])[0], list[str]()
    with page(offline=True, width=width, dark=dark) as tab:
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto((tested / "page" / "compare-two.html").as_uri())
        assert tab.locator(".canvas svg.main-svg:first-child").count() == 3
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        words = tab.locator("body").inner_text()
        for sentence in (found["conclusion"], found["tests"][0]["sentence"], found["openings"]["sentence"]):
            assert sentence in words
    assert said == []
