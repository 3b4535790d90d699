"""Labels under suspicion: counted by hand, from real trials, and the same whatever the final run trains on."""

from __future__ import annotations

import base64
import dataclasses
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from harness.base.packing import pack, pack_bits, unpack_bits
from harness.config.events import Event, Metrics, TrialStarted
from harness.config.space import Float, Int
from harness.config.study import Study
from harness.config.train import FinalConfig
from harness.data.splits import load_split
from harness.datasets.image_folder import ImageFolder
from harness.final.suspects import better_half, suspects
from harness.report.overview import overview
from harness.store.opening import read_store
from harness.store.records import TrialRecord
from harness.store.store import Store
from tests.analytic import epoch_result, memory_store
from tests.datasets.test_image_table import at, listed
from tests.datasets.test_wrapped import wrapped
from tests.faulty import complete, small_study
from tests.final.test_choice import trial
from tests.report.test_report import page_of

IMAGES = 32  # two of each class, in order


@pytest.fixture
def study(image_cache: Path) -> Study:
    return dataclasses.replace(small_study(image_cache), space={"epochs": Int(1, 2)})


@pytest.fixture
def store(study: Study) -> Store:
    return memory_store(study)


def missing(number: int, guesses: dict[int, int], images: int = IMAGES, **changes: Any) -> TrialRecord:
    """A complete trial that misses these images, by number, and takes them for these classes; 0 is the best one."""
    hits = np.array([image not in guesses for image in range(images)])
    value = 0.9 - number / 100
    predicted = np.array([guesses[image] for image in sorted(guesses)], "uint16")
    val = Metrics(loss=1.0, correct=int(hits.sum()), total=images, hits=pack_bits(hits), missed=pack(predicted))
    last = dataclasses.replace(epoch_result(1, value), val=dataclasses.replace(val, **changes))
    return TrialRecord(
        number=number,
        state="complete",
        value=value,
        params={"epochs": 1},
        epochs=(last,),
        curve={1: value},
        reason=None,
        seconds=1.0,
    )


def worse(count: int) -> list[TrialRecord]:
    """Trials below the median, which miss everything."""
    return [missing(50 + number, dict.fromkeys(range(IMAGES), 0)) for number in range(count)]


def test_images_are_counted_over_the_better_half_and_taken_for_what_most_predict(study: Study) -> None:
    better = [
        missing(0, {0: 5, 1: 2, 9: 3, 30: 0}),
        missing(1, {0: 5, 1: 3, 9: 3}),
        missing(2, {0: 6, 1: 3, 9: 1}),
        missing(3, {0: 6, 1: 2, 20: 4}),
    ]
    found = suspects(study, [*worse(4), *better])
    assert found is not None
    assert (found["trials"], found["images"], found["found"]) == (4, IMAGES, 3)
    names = study.train.data.classes()
    rows = [(each["label"], each["taken_for"], each["missed_by"]) for each in found["rows"]]
    equal = [(names[0], names[5], 4), (names[0], names[2], 4)]  # of images 0 and 1; the first class of a tie
    assert rows[:2] in (equal, equal[::-1])
    assert rows[2:] == [(names[4], names[3], 3)]
    assert [each["path"] for each in found["rows"][:2]] == sorted(each["path"] for each in found["rows"][:2])
    assert len(found["thumbnails"]) == 3
    with Image.open(io.BytesIO(base64.b64decode(found["thumbnails"][0]))) as picture:
        assert picture.format == "JPEG"


def test_the_better_half_is_complete_and_above_the_median_of_all(study: Study) -> None:
    ends = [(0.9, "complete"), (0.8, "complete"), (0.7, "pruned"), (0.6, "complete"), (0.5, "pruned"), (0.4, "failed")]
    trials = [
        dataclasses.replace(missing(number, {}), value=value if state == "complete" else None, state=state, curve=curve)
        for number, (value, state) in enumerate(ends)
        for curve in [{1: 0.95, 2: value}]
    ]
    assert [each.number for each, _ in better_half(trials)] == [0, 1]
    assert better_half([]) == []


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [*worse(3), *(missing(number, {0: 1}) for number in range(3))],
        [dataclasses.replace(missing(number, {0: 1}), value=0.5, curve={1: 0.5}) for number in range(9)],
        [*worse(4), *(missing(number, {number: 9}) for number in range(4))],
        [trial(number, 1e-2, 0.9 - number / 100) for number in range(9)],
    ],
    ids=["none", "few", "equal", "nothing-in-common", "without-hits"],
)
def test_without_enough_better_trials_or_anything_in_common_there_are_none(
    study: Study, trials: Sequence[TrialRecord]
) -> None:
    assert suspects(study, trials) is None


def test_older_trials_say_which_images_they_missed_but_not_what_for(study: Study, store: Store, tmp_path: Path) -> None:
    older = [missing(number, {0: 1, 1: 2}, missed=None) for number in range(4)]
    found = suspects(study, [*worse(4), *older])
    assert found is not None
    assert [each["taken_for"] for each in found["rows"]] == [None, None]
    store.set_attribute("suspects", {"finished": 0, **found})
    _, page = page_of(store, tmp_path)
    assert "missed by 4 of 4" in page.words
    assert "taken for" not in page.words
    newer = suspects(study, [*worse(4), *older[:3], missing(3, {0: 7, 1: 7})])
    assert newer is not None
    assert {each["taken_for"] for each in newer["rows"]} == {study.train.data.classes()[7]}


def test_trials_on_other_images_do_not_count(study: Study) -> None:
    study = dataclasses.replace(study, space={"data.seed": Int(0, 3)})
    on = [dataclasses.replace(missing(number, {0: 1}), params={"data.seed": 0}) for number in range(5)]
    assert (suspects(study, [*worse(5), *on]) or {})["trials"] == 5
    other = [dataclasses.replace(each, params={"data.seed": 1}) for each in on[:2]]
    assert suspects(study, [*worse(5), *other, *on[2:]]) is None


def photographs(folder: Path) -> ImageFolder:
    for split in ("train", "val", "test"):
        for name, shade in (("daisy", 50), ("rose", 200)):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (60, 60), (shade, 20 * number, 7))
                image.save(folder / "photos" / split / name / f"{number}.png")
    return ImageFolder(root=str(folder / "photos"), cache=str(folder / "cache"))


def table(folder: Path) -> Any:
    (folder / "a").mkdir()
    for number in range(24):
        Image.new("RGB", (60, 60), (number, 255 - number, 7)).save(folder / "a" / f"{number}.png")
    return at(folder, listed(24, split=lambda number: ("train", "val", "test")[number // 8]))


@pytest.mark.parametrize(
    ("made", "path", "label", "other"),
    [
        (photographs, "val/daisy/1.png", "daisy", "rose"),
        (table, "a/9.png", "rose", "daisy"),
        (lambda folder: wrapped(folder / "cache"), "image 1 of Colours-8-val", "1", "0"),
    ],
    ids=["folder", "table", "wrapped"],
)
def test_photographs_are_named_and_shown_without_the_files(
    study: Study, store: Store, tmp_path: Path, made: Any, path: str, label: str, other: str
) -> None:
    data = dataclasses.replace(made(tmp_path), image_size=16, stored_size=18)
    guess = data.classes().index(other)
    study = dataclasses.replace(study, train=dataclasses.replace(study.train, data=data))
    load_split(data, study.train.backbone.preprocessing(), "val")
    found = suspects(study, [missing(number, {1: guess}, images=8) for number in range(9)])
    assert found is not None
    assert found["rows"] == [{"path": path, "label": label, "taken_for": other, "missed_by": 4}]
    store.set_attribute("suspects", {"finished": 0, **found})
    for folder in (tmp_path / "photos", tmp_path / "a", tmp_path / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    text, page = page_of(store, tmp_path)
    assert path in page.words
    assert text.count("data:image/jpeg;base64,") == 1


def test_the_table_has_all_of_them_and_the_page_the_first(study: Study, store: Store, tmp_path: Path) -> None:
    found = suspects(study, [*worse(4), *(missing(n, dict.fromkeys(range(2, 32), 0)) for n in range(4))])
    assert found is not None
    found["rows"][0] |= {"path": "=<b>1", "taken_for": None}
    store.set_attribute("suspects", {"finished": 0, **found})
    text, page = page_of(store, tmp_path)
    assert "<b>1" not in text
    assert "Most of the 4 better trials miss 30 of the 32 validation images" in page.words
    assert text.count("data:image/jpeg;base64,") == 24
    kept = pandas.read_csv(tmp_path / "suspects.csv")
    assert list(kept.columns) == ["path", "label", "taken_for", "missed_by", "trials"]
    assert len(kept) == 30
    assert kept["taken_for"].isna().tolist() == [True] + [False] * 29
    assert set(kept["trials"]) == {4}
    seen = overview("tiny", store, "sqlite:///mlflow.db")["suspects"]
    assert seen == {name: found[name] for name in ("trials", "images", "found", "rows")}
    store.set_attribute("suspects", None)
    _, page = page_of(store, tmp_path)
    assert "Labels under suspicion" not in page.words
    assert not (tmp_path / "suspects.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["accuracy", "loss"])
def test_a_study_finds_them_from_its_trials_before_the_test_and_again_after_more(
    image_cache: Path, tmp_path: Path, objective: Any
) -> None:
    study = small_study(image_cache)
    train = dataclasses.replace(
        study.train, data=dataclasses.replace(study.train.data, train_per_class=8, val_per_class=10)
    )
    final = FinalConfig(seeds=1, publish=False, fit_on="train+val", compare_base=False)
    space = {"optim.base_lr": Float(1e-3, 1e-1, log=True)}  # so that few trials are equally good
    study = dataclasses.replace(study, train=train, trials=10, objective=objective, final=final, space=space)
    opened = []

    def at_event(event: Event) -> None:
        if isinstance(event, TrialStarted) and event.kind == "final":
            with read_store("tiny", f"sqlite:///{tmp_path}/tiny.db") as store:
                opened.append((store.facts().suspects is not None, store.ledger()))

    found, trials = complete(study, tmp_path, at=at_event, look=lambda store: (store.facts().suspects, store.trials()))
    assert opened == [(True, [])]
    assert found["finished"] == 10
    assert all(each.val.missed is None for trial in trials for each in trial.epochs[:-1])
    missed = sum(~unpack_bits(val.hits, val.total) for _, val in better_half(trials))
    counts = sorted((int(each) for each in missed if 2 * each > found["trials"]), reverse=True)
    assert [each["missed_by"] for each in found["rows"]] == counts
    assert all(each["taken_for"] not in (None, each["label"]) for each in found["rows"])
    again = complete(dataclasses.replace(study, trials=11), tmp_path, look=lambda store: store.facts().suspects)
    assert again["finished"] == 11
