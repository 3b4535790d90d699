"""When a search ends before it has all its trials: after the same trial in every run, as a study with that many."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import harness
from harness.base.errors import InputError
from harness.config import events
from harness.config.events import Diverged
from harness.config.study import Study
from harness.config.train import FinalConfig, OptimConfig
from harness.search import limits
from harness.store.opening import read_store
from harness.store.store import Store
from tests.analytic import evaluate, memory_store, run_analytic
from tests.conftest import PROJECT, make_study
from tests.forked import Process
from tests.patience import PATIENCE_SECONDS
from tests.small import small_study, study_in

STUDY = make_study("cache", trials=30)
MANY = 4000  # trials, which no limit of seconds reaches


def stopped(study: Study, store: Store) -> str | None:
    """Evaluate trials as a search does; return why it stopped."""
    while store.finished() < study.trials:
        reason = limits.reason_to_stop(study, store)
        if reason is not None:
            store.stop(study.limits(), reason)
            return reason
        evaluate(study, store, store.ask(study))
    return None


# -- patience, and a value that is good enough -------------------------------------------------------------------------


@pytest.mark.parametrize(("trials", "rerank", "count"), [(1, 0, 3), (1, 5, 3), (2, 0, 6), (2, 5, 12), (20, 5, 21)])
def test_trainings_after_the_search_are_counted(trials: int, rerank: int, count: int) -> None:
    assert FinalConfig(seeds=3, rerank=rerank).trainings(trials) == count


def test_patience_ends_after_so_many_trials_without_a_new_best() -> None:
    study = dataclasses.replace(STUDY, patience=4)
    store = memory_store(study)
    reason = stopped(study, store)
    best = store.best()
    assert best is not None
    assert reason == f"4 trials without a new best after trial {best.number}"
    assert store.finished() == best.number + 5


def test_patience_also_ends_a_search_without_a_complete_trial() -> None:
    study = dataclasses.replace(STUDY, patience=2)
    store = memory_store(study)
    for _ in range(3):
        assert limits.reason_to_stop(study, store) is None
        store.tell(store.ask(study), Diverged(epoch=1, step=1), [], 1.0)
    assert limits.reason_to_stop(study, store) == "3 trials without one that is complete"
    base, *others = store.trials()
    trials = [dataclasses.replace(base, state="running"), *others, *others]  # another worker trains the base
    beside: Any = SimpleNamespace(trials=lambda: trials, facts=store.facts)
    assert limits.reason_to_stop(study, beside) is None


def test_a_value_that_is_good_enough_ends_the_search() -> None:
    store = memory_store(STUDY)
    run_analytic(STUDY, store, 12)
    best = store.best()
    assert best is not None
    assert best.value is not None
    study = dataclasses.replace(STUDY, until=best.value)
    again = memory_store(study)
    value = f"{100 * best.value:.2f} %"
    assert stopped(study, again) == f"trial {best.number} has a validation accuracy of {value} ({value} asked for)"
    assert again.finished() == best.number + 1


def test_without_a_limit_nothing_stops() -> None:
    store = memory_store(STUDY)
    assert stopped(STUDY, store) is None


# -- hours -------------------------------------------------------------------------------------------------------------


def with_hours(hours: float, **changes: Any) -> Study:
    final = dataclasses.replace(STUDY.final, seeds=2, fit_on="train")
    return dataclasses.replace(STUDY, hours=hours, final=final, **changes)


def test_the_final_run_is_set_aside() -> None:
    study = with_hours(1.0)
    store = memory_store(study)
    run_analytic(study, store, 3)
    trials = [dataclasses.replace(trial, seconds=100.0) for trial in store.trials()]
    epoch = sum(each.seconds for each in trials[0].epochs) / len(trials[0].epochs)
    # two seeds of the best and of the base, of two epochs each
    assert limits.final_seconds(study, trials) == pytest.approx(2 * 2 * 2 * epoch)
    assert limits.hours_left(study, trials) == pytest.approx(1.0 - (300.0 + 8 * epoch) / 3600)


def test_no_trial_begins_that_cannot_reach_its_first_rung() -> None:
    study = with_hours(1.0)
    store = memory_store(study)
    run_analytic(study, store, 3)
    spent = sum(trial.seconds or 0.0 for trial in store.trials())
    epoch = limits._epoch_seconds(store.trials())
    needed = spent + limits.final_seconds(study, store.trials())
    enough, too_few = ((needed + factor * epoch) / 3600 for factor in (2.1, 1.9))  # no pruning: a rung is two epochs
    assert limits.reason_to_stop(with_hours(enough), store) is None
    assert "are used, or set aside for the final run" in (limits.reason_to_stop(with_hours(too_few), store) or "")


def test_the_hours_also_end_a_search_without_a_complete_trial() -> None:
    study = with_hours(
        0.0001, train=dataclasses.replace(STUDY.train, optim=OptimConfig(base_lr=9e-3, depth_lr_mult=0.5))
    )
    store = memory_store(study)
    assert limits.reason_to_stop(study, store) is None
    evaluate(study, store, store.ask(study))
    assert store.best() is None
    assert limits.reason_to_stop(study, store) == "0.0001 h are used, or set aside, and no trial is complete"
    assert limits.reason_to_stop(with_hours(9.0), store) is None


# -- whole studies -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mlruns")
def test_a_stopped_study_is_the_one_with_that_many_trials(image_cache: Path, tmp_path: Path) -> None:
    study = dataclasses.replace(small_study(image_cache), trials=20)
    said: list[events.SearchStopped] = []

    def watch(event: object) -> None:
        said.extend([event] if isinstance(event, events.SearchStopped) else [])

    result = harness.run(study, home=tmp_path, patience=2, progress=False, on_event=watch)
    assert result.final is not None
    (stop,) = said
    count = len(result.trials())
    assert stop.trials == count < 20
    sentence = f"The search stopped after {count} of 20 trials: 2 trials without a new best"
    assert sentence in result.summary()
    assert sentence in result.report.path.read_text(encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    same = harness.run(dataclasses.replace(study, trials=count), home=other, progress=False)
    assert same.digest() == result.digest()
    assert result.replay()
    # The same command again changes nothing; a larger limit goes on.
    assert harness.run(study, home=tmp_path, patience=2, progress=False).digest() == result.digest()
    longer = harness.run(study, home=tmp_path, trials=count + 1, progress=False)
    assert len(longer.trials()) == count + 1
    assert "The search stopped" not in longer.summary()
    assert longer.doctor()


@pytest.mark.usefixtures("mlruns")
def test_a_killed_study_stops_at_the_same_trial(image_cache: Path, tmp_path: Path) -> None:
    study = dataclasses.replace(small_study(image_cache), trials=20)
    whole = harness.run(study, home=tmp_path, patience=2, progress=False)
    kills = iter([1, 2])
    other = tmp_path / "other"
    other.mkdir()
    for number in kills:

        def kill(event: object, number: int = number) -> None:
            if isinstance(event, events.EpochEnded) and event.number == number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            harness.run(study, home=other, patience=2, progress=False, on_event=kill)
    again = harness.run(study, home=other, patience=2, progress=False)
    assert again.digest() == whole.digest()


@pytest.mark.usefixtures("mlruns")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hours_end_a_search_in_time_for_its_final_run(
    image_cache: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study, _ = study_in(tmp_path, image_cache)  # workers load it from its file
    result = harness.run("tiny", hours=4 / 3600, trials=MANY, workers=workers, progress=False)
    check_hours(study, result, 4.0, workers)


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
@pytest.mark.parametrize("workers", [1, 2])
def test_hours_are_kept_over_three_kills(
    image_cache: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study, url = study_in(tmp_path, image_cache)
    result = harness.run("tiny", trials=4, progress=False, storage=f"sqlite:///{tmp_path}/before.db")
    seconds = 400 * float(result.trials()["seconds"].mean())
    options = ["--hours", str(seconds / 3600), "--trials", str(MANY), "--workers", str(workers)]
    command = [str(PROJECT / "run_study.py"), "--study", "tiny", *options]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    ended = 0
    for _ in range(3):
        process = Process(command, cwd=tmp_path, env=environment, start_new_session=True)
        until = time.monotonic() + PATIENCE_SECONDS
        while finished(url) <= ended:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = finished(url)
    process = Process(command, cwd=tmp_path, env=environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    check_hours(study, harness.open("tiny"), seconds, workers)


def finished(url: str) -> int:
    try:
        with read_store("tiny", url) as store:
            return store.finished()
    except InputError:  # it is being made
        return 0


def check_hours(study: Study, result: harness.Result, seconds: float, workers: int) -> None:
    """The limit is exact to the epoch that each worker was in, and to what lies around its epochs."""
    assert result.final is not None
    with result.store() as store:
        trials = store.trials()
        spent = sum(trial.seconds or 0.0 for trial in trials)
        assert trials[0].state == "complete"
        assert len(trials) < MANY
        longest = max(result.seconds for trial in trials for result in trial.epochs)
        around = max((trial.seconds or 0.0) - sum(each.seconds for each in trial.epochs) for trial in trials)
        reserved = limits.final_seconds(study, trials)
        assert spent + reserved <= seconds + workers * (longest + around) + reserved / 2
    assert "h are used" in result.summary()
    assert result.replay()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hours": 0.0}, "hours must lie between 0 and 1,000,000"),
        ({"hours": "long"}, "hours must be a number"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"until": 97.0}, r"until is a share between 0 and 1, not 97\.0"),
    ],
)
def test_a_limit_that_makes_no_sense_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dataclasses.replace(STUDY, **changes)
