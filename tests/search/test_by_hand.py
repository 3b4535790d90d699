"""First configurations, and a hand on a running study: they are trials as others, and replay knows them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.base.errors import InputError
from harness.base.seeds import derive_seed
from harness.cli.commands import main
from harness.config import events
from harness.config.find import Found, find
from harness.config.study import Study
from harness.search import by_hand
from harness.search.replay import replay
from harness.search.samplers import grid
from harness.store.opening import open_store
from harness.store.store import LOOK_SECONDS
from harness.training import loop
from tests.analytic import memory_store, run_analytic
from tests.conftest import make_study
from tests.small import study_in

FIRST: tuple[dict[str, Any], ...] = ({"optim.base_lr": 3e-4}, {"backbone.dropout": 0.5, "backbone.hidden": (16, 8)})
STUDY = make_study("cache", trials=5, first=FIRST)


# -- first configurations ----------------------------------------------------------------------------------------------


def test_first_configurations_come_after_the_base_and_count_as_trials() -> None:
    store = memory_store(STUDY)
    run_analytic(STUDY, store, 5)
    base, first, second, third, _ = (trial.params for trial in store.trials())
    assert first == {**base, "optim.base_lr": 3e-4}
    assert second == {**base, "backbone.dropout": 0.5, "backbone.hidden": "16-8"}
    assert third not in (base, first, second)
    assert all(each.same for each in replay(STUDY, store.optuna_study.trials))


def test_first_configurations_are_part_of_the_definition_if_there_are_any() -> None:
    assert STUDY.definition()["first"][0]["optim.base_lr"] == 3e-4
    assert "first" not in make_study("cache").definition()


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ([{"epochs": 3}], "first, configuration 1: epochs is not searched; choose from backbone.dropout"),
        ([{"optim.base_lr": 1.0}], r"configuration 1: optim\.base_lr = 1\.0 is outside of Float"),
        ([{"optim.base_lr": "fast"}], "optim.base_lr must be a number"),
        ([{}], "configuration 1: it is the base or an earlier one"),
        ([FIRST[0], FIRST[0]], "configuration 2: it is the base or an earlier one"),
        ({"optim.base_lr": 3e-4}, "first lists configurations"),
        ("fast", "first lists configurations"),
    ],
)
def test_first_configurations_outside_of_the_space_are_one_sentence(first: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_study("cache", first=first)


def test_a_grid_has_its_own_order() -> None:
    space = {"optim.base_lr": harness.Choice((1e-3, 1e-2))}
    with pytest.raises(InputError, match="A grid has its own order"):
        make_study("cache", first=[{"optim.base_lr": 1e-2}], sampler=grid(), space=space, trials=2)


# -- try and skip ------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path, image_cache: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of milliseconds with two trials, in the working directory."""
    monkeypatch.chdir(tmp_path)
    study, _ = study_in(tmp_path, image_cache)
    harness.run("tiny", trials=2, progress=False)
    return study


def test_a_queued_configuration_is_the_next_trial(begun: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "tiny", "optim.base_lr=0.005", "backbone.hidden=16,8"]) == 0
    assert capsys.readouterr().out == (
        "Trial 2 is queued with this configuration; it runs when the study is asked for more trials: --trials 3.\n"
    )
    result = harness.open("tiny")
    assert len(result.trials()) == 2  # it has not begun
    result = harness.run("tiny", trials=4, progress=False)
    tried = result.trials().set_index("number").loc[2]
    assert (tried["optim.base_lr"], tried["backbone.hidden"], tried["reason"]) == (0.005, "16-8", "queued by hand")
    assert result.replay()
    assert result.doctor()


def test_the_base_is_not_skipped_and_each_queued_trial_says_when_it_runs(
    begun: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["skip", "tiny", "0"]) == 2
    assert "Trial 0 is the base configuration" in capsys.readouterr().err
    for number, value in ((2, "16-8"), (3, "16")):  # as the table of trials writes it, and as the study file does
        assert main(["try", "tiny", f"backbone.hidden={value}", f"optim.base_lr=0.00{number}"]) == 0
        assert f"Trial {number} is queued" in (said := capsys.readouterr().out)
        assert f"--trials {number + 1}." in said


def test_a_trial_that_is_queued_after_a_limit_says_so(begun: Study, capsys: pytest.CaptureFixture[str]) -> None:
    harness.run("tiny", trials=20, patience=1, progress=False)
    assert main(["try", "tiny", "optim.base_lr=0.005"]) == 0
    said = capsys.readouterr().out
    assert "runs when the limit that stopped the search (1 trial without a new best after trial" in said


@pytest.mark.parametrize("count", [-1, 1.5, "a", True, 10**6])
def test_a_number_of_workers_that_is_none_is_refused(begun: Study, count: object) -> None:
    with pytest.raises(InputError, match="workers is a whole number from 0 to 10,000"):
        harness.run("tiny", workers=count, progress=False)  # type: ignore[arg-type]


def test_a_skipped_trial_ends_at_its_next_batch(begun: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOOK_SECONDS, "sqlite", 0.0)

    def skip(event: object) -> None:
        if isinstance(event, events.TrialStarted) and event.kind == "trial" and event.number == 2:
            assert main(["skip", "tiny", "2"]) == 0

    result = harness.run("tiny", trials=4, progress=False, on_event=skip)
    with result.store() as store:
        skipped, after = store.trials()[2:]
    assert (skipped.state, skipped.reason, skipped.curve) == ("pruned", "skipped by hand", {})
    assert after.state == "complete"
    assert result.replay()
    assert result.doctor()
    assert harness.run("tiny", trials=4, progress=False).digest() == result.digest()


def test_a_grid_has_no_queue(tmp_path: Path) -> None:
    space = {"optim.base_lr": harness.Choice((1e-3, 1e-2))}
    study = make_study("cache", sampler=grid(), space=space, trials=1)
    url = f"sqlite:///{tmp_path}/tiny.db"
    with open_store(study, url) as store:
        run_analytic(study, store, 1, curve=lambda params, epoch: 0.5)
    with pytest.raises(InputError, match=r"^A grid tries every point in its own order; wait for it, or use another"):
        by_hand.queue(Found(study=study, file=tmp_path / "tiny.py", home=tmp_path), url, ["optim.base_lr=0.01"])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["try", "tiny", "optim.base_lr"], "'optim.base_lr' has no value; write PATH=VALUE"),
        (["try", "tiny", "epochs=3"], "epochs is not searched; choose from backbone.dropout"),
        (["try", "tiny", "optim.base_lr=fast"], "optim.base_lr must be a number"),
        (["try", "tiny", "optim.base_lr=3"], "optim.base_lr = 3 is outside of Float"),
        (["try", "tiny", "optim.base_lr=0.001"], "Trial 0 has this configuration already; try another"),
        (["skip", "tiny", "1"], "Trial 1 has ended (complete); only an unfinished one can be skipped"),
        (["skip", "tiny", "7"], "There is no trial 7 yet"),
    ],
)
@pytest.mark.usefixtures("begun")
def test_what_makes_no_sense_is_one_sentence(command: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(harness.open("tiny").trials()) == 2


def test_a_study_that_has_not_begun_has_no_queue(
    tmp_path: Path, image_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study_in(tmp_path, image_cache)
    with pytest.raises(InputError, match="has no results yet"):
        by_hand.queue(find("tiny"), None, ["optim.base_lr=0.005"])
    assert not (tmp_path / "studies" / "tiny.db").exists()


def test_a_queue_waits_for_the_first_configurations(
    begun: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dataclasses.replace(begun, first=FIRST, name="other")
    harness.run(first, home=tmp_path, trials=2, progress=False)
    found = Found(study=first, file=tmp_path / "studies" / "other.py", home=tmp_path)
    with pytest.raises(InputError, match="tries its base and the 2 configurations of first before others"):
        by_hand.queue(found, None, ["optim.base_lr=0.005"])


def test_a_trial_that_is_skipped_while_it_validates_keeps_the_epochs_value(
    begun: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOOK_SECONDS, "sqlite", 0.0)
    genuine = loop._result

    def result(training: Any) -> Any:
        found = genuine(training)
        if training.seed == derive_seed(0, "trial", 2) and found.epoch == 1:
            assert main(["skip", "tiny", "2"]) == 0
        return found

    monkeypatch.setattr(loop, "_result", result)
    study = harness.run("tiny", trials=3, progress=False)
    with study.store() as store:
        skipped = store.trials()[2]
    assert (skipped.state, len(skipped.curve), len(skipped.epochs)) == ("pruned", 1, 1)
    assert study.doctor()
