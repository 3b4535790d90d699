"""`reproduce`: a trial trained again is the recorded one, and where it is not, the epoch and the reason are named."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.base import environment
from harness.base.errors import InputError
from harness.config.events import Failed
from harness.config.study import Study
from harness.data.augment import IMAGENET
from harness.data.splits import prepare
from harness.search.loop import evaluate_trial
from harness.store.opening import as_begun, open_store, read_store
from harness.store.store import Store
from harness.study.reproduce import reproduce
from harness.training.step import Runtime
from tests.small import Run, command, copied, small_study, study_in

CPU = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)


def train(study: Study, url: str, folder: Path, trials: int) -> None:
    """Trial 1 is pruned after its first epoch."""
    content = {"data": prepare(study.train.data, IMAGENET), "weights": study.train.backbone.fingerprint()}
    with open_store(study, url, content) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "should_prune", lambda self, asked, epoch: asked.number == 1)
        store.set_attribute("runtime", CPU.to_dict())
        for _ in range(trials):
            events = evaluate_trial(study, store.ask(study), store, CPU, folder / "studies/tiny.checkpoints")
            for _event in events:
                pass
        asked = store.ask(study)
        store.tell(asked, Failed(reason="RuntimeError: x", traceback="Traceback"), [], seconds=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_cache: Path) -> Path:
    """Trial 0 complete, trial 1 pruned, trial 2 failed before its first epoch."""
    folder = tmp_path_factory.mktemp("trained")
    study, url = study_in(folder, image_cache)
    train(study, url, folder, trials=2)
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be changed, as the working directory."""
    return copied(trained, tmp_path, monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command("reproduce", capsys)


def change(place: Path, number: int, key: str, changed: Callable[[Any], Any]) -> None:
    """Rewrite what the storage says of a trial; Optuna itself refuses that for a finished one."""
    with closing(sqlite3.connect(place / "studies" / "tiny.db")) as database:
        where = "key = ? AND trial_id = (SELECT trial_id FROM trials WHERE number = ?)"
        query = f"SELECT value_json FROM trial_user_attributes WHERE {where}"
        (text,) = database.execute(query, (key, number)).fetchone()
        new = json.dumps(changed(json.loads(text)))
        database.execute(f"UPDATE trial_user_attributes SET value_json = ? WHERE {where}", (new, key, number))
        database.commit()


def test_a_complete_trial_is_reproduced_epoch_by_epoch(place: Path, run: Run) -> None:
    code, out, err = run("0")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["epoch", "1"], ["epoch", "2"]]
    assert [line.split()[-1] for line in lines[:2]] == ["same", "same"]
    assert lines[2] == "Trial 0 is reproduced to the last bit: 2 epochs."


def test_a_pruned_trial_is_reproduced_as_far_as_it_went(place: Path, run: Run) -> None:
    code, out, _ = run("1")
    assert code == 0
    assert out.count("epoch 1") == 1
    assert "epoch 2" not in out


@pytest.mark.parametrize(
    ("epoch", "field", "new"),
    [
        (1, ("train", "loss"), lambda loss: loss + 1e-12),
        (2, ("val", "correct"), lambda correct: correct + 1),
        (2, ("lr",), lambda lr: lr * (1 + 1e-12)),
    ],
)
def test_one_changed_number_is_found_and_its_epoch_named(
    place: Path, run: Run, epoch: int, field: tuple[str, ...], new: Callable[[Any], Any]
) -> None:
    def changed(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        owner = epochs[epoch - 1]
        for name in field[:-1]:
            owner = owner[name]
        owner[field[-1]] = new(owner[field[-1]])
        return epochs

    change(place, 0, "epochs", changed)
    code, out, _ = run("0")
    assert code == 1
    for line in out.splitlines()[:2]:
        assert line.endswith("DIFFERENT") == line.startswith(f"epoch {epoch} ")
    assert "is not reproduced" in out


def test_times_are_not_compared(place: Path, run: Run) -> None:
    change(place, 0, "epochs", lambda epochs: [each | {"seconds": 1e6} for each in epochs])
    assert run("0")[0] == 0


@pytest.mark.parametrize(
    ("key", "then"),
    [("torch", "1.0"), ("torchvision", "0.1"), ("threads", "64"), ("device", "another processor"), ("commit", "0000")],
)
def test_what_differs_from_then_is_named_as_the_reason(place: Path, run: Run, key: str, then: str) -> None:
    change(place, 1, "epochs", lambda epochs: [each | {"lr": 1.0} for each in epochs])
    change(place, 1, "environments", lambda each: [each[0] | {key: then}])
    code, out, _ = run("1")
    assert code == 1
    assert f"{key} was {then}, is {environment.environment(torch.device('cpu'))[key]}" in out.splitlines()[-1]
    assert ("Set OMP_NUM_THREADS=64" in out) == (key == "threads")


def test_without_a_difference_the_reason_says_that_too(place: Path, run: Run) -> None:
    change(place, 1, "epochs", lambda epochs: [each | {"lr": 1.0} for each in epochs])
    assert "Versions, device, threads and commit are the same" in run("1")[1]


def test_a_trial_that_moved_half_way_says_so(place: Path, run: Run) -> None:
    change(place, 1, "epochs", lambda epochs: [each | {"lr": 1.0} for each in epochs])
    change(place, 1, "environments", lambda each: [each[0] | {"threads": "3"}, each[0]])
    last = run("1")[1].splitlines()[-1]
    assert "threads was 3" in last
    assert "resumed elsewhere" in last


@pytest.mark.parametrize(
    ("number", "expected"), [("7", "has no trial 7; it has 0 to 2"), ("2", "Trial 2 has no recorded epoch")]
)
def test_what_cannot_be_compared_is_one_sentence(place: Path, run: Run, number: str, expected: str) -> None:
    code, out, err = run(number)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("number", ["-1", "one", "1.5"])
def test_a_number_that_is_none_is_refused(place: Path, run: Run, number: str) -> None:
    assert run(number)[:2] == (2, "")


def test_a_study_without_results_is_one_sentence(place: Path, run: Run) -> None:
    for file in (place / "studies").glob("tiny.db*"):
        file.unlink()
    code, _, err = run("0")
    assert code == 2
    assert "has no results yet" in err


def test_nothing_is_written(place: Path, run: Run) -> None:
    def files() -> dict[str, str]:
        found = (each for each in place.rglob("*") if each.is_file() and "__pycache__" not in each.parts)
        return {str(each): hashlib.sha256(each.read_bytes()).hexdigest() for each in found}

    before = files()
    assert run("1")[0] == 0
    assert files() == before
    assert not (place / "mlruns").exists()


def test_a_study_that_is_being_run_may_be_looked_at(place: Path, run: Run, image_cache: Path) -> None:
    with open_store(small_study(image_cache), f"sqlite:///{place}/studies/tiny.db"):
        assert run("1")[0] == 0


SETTINGS = ["epochs=1", "optim.weight_decay=0.5", "data.stored_size=80", "seed=5", "final.seeds=2", "batch_size=8"]


@pytest.mark.slow
def test_a_study_begun_with_settings_is_reproduced_without_them(
    tmp_path: Path, image_cache: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    study, url = study_in(tmp_path, image_cache)
    train(study.with_settings(SETTINGS), url, tmp_path, trials=1)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("0")
    assert code == 0, out
    assert "1 epoch" in out


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        ["data.stored_size=144", "data.image_size=128"],  # neither order of these two is allowed in both directions
        ["data.limit=20", "optim.clip_norm=null", "optim.name=adam", "optim.weight_decay=0", "optim.schedule=constant"],
        ["backbone.hidden=16,8", "augment.crop_scale=0.7,0.9", "checkpoint_seconds=0"],
    ],
)
def test_settings_of_the_start_are_put_back_as_they_were(
    tmp_path: Path, image_cache: Path, settings: list[str]
) -> None:
    study, url = study_in(tmp_path, image_cache)
    begun = study.with_settings(settings)
    with open_store(begun, url):
        pass
    with read_store("tiny", url) as store:
        assert as_begun(study, store).definition() == begun.definition()


def test_a_changed_study_file_is_named(place: Path, run: Run) -> None:
    file = place / "studies" / "tiny.py"
    file.write_text(file.read_text() + "import dataclasses\nSTUDY = dataclasses.replace(STUDY, sampler=tpe())\n")
    file.write_text("from harness.search.samplers import tpe\n" + file.read_text())
    code, _, err = run("0")
    assert code == 2
    assert "sampler was" in err


def test_a_trial_that_ran_with_less_memory_is_repeated_in_parts(place: Path) -> None:
    change(place, 1, "epochs", lambda epochs: [each | {"micro_batch": 5} for each in epochs])
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        trial = store.trials()[1]
        study = as_begun(small_study("cache"), store)
    found = list(reproduce(study, trial, CPU))
    assert [each.now.micro_batch for each in found] == [5]


def test_a_trial_without_epochs_is_wrong_input(place: Path) -> None:
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        trial = store.trials()[2]
    with pytest.raises(InputError, match="take another"):
        next(reproduce(small_study("cache"), trial, CPU))
