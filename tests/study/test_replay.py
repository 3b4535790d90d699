"""Every suggestion comes out again from what it had seen: of serial studies, of parallel ones, after kills."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers._tpe import sampler as tpe_sampler

from harness.base.errors import InputError
from harness.cli.commands import main
from harness.config import find as catalogue
from harness.config.events import Completed, Diverged, Failed, Pruned
from harness.config.space import Choice
from harness.config.study import Study
from harness.search.pruners import asha
from harness.search.replay import replay, replay_study
from harness.search.samplers import Sampler, gp, grid, tpe
from harness.store.opening import open_store, read_store
from harness.store.store import Asked, NoTrialFree, Store
from tests.analytic import epoch_result, evaluate, memory_store, run_analytic
from tests.conftest import make_study

WORKERS, TRIALS = 4, 24
SEARCHES = {
    "TPE": {"sampler": tpe(n_startup_trials=4), "pruner": asha(min_epochs=1)},
    "TPE without liar": {"sampler": tpe(n_startup_trials=4, constant_liar=False)},
    "TPE, univariate": {"sampler": tpe(n_startup_trials=4, multivariate=False)},
    "random": {"sampler": Sampler("RandomSampler")},
    "NSGA-II": {"sampler": Sampler("NSGAIISampler", population_size=4)},
    "NSGA-III": {"sampler": Sampler("NSGAIIISampler", population_size=4)},
    "Gaussian process": {"sampler": Sampler("GPSampler", n_startup_trials=4)},
    "Gaussian process, extrapolated": {"sampler": gp(n_startup_trials=4), "pruner": asha(min_epochs=1)},
    "CMA-ES": {"sampler": Sampler("CmaEsSampler", n_startup_trials=4, popsize=4, warn_independent_sampling=False)},
    "grid": {
        "sampler": grid(),
        "space": {
            "backbone.dropout": Choice((0.1, 0.2, 0.3)),
            "backbone.hidden": Choice(((16,), (16, 8))),
            "optim.base_lr": Choice((3e-4, 1e-3, 3e-3)),
            "optim.depth_lr_mult": Choice((0.5, 0.75)),
        },
    },
}


# One of the two that take seconds is for every day.
@pytest.fixture(
    params=[pytest.param(each, marks=pytest.mark.slow if each == "Gaussian process" else ()) for each in SEARCHES]
)
def searched(request: pytest.FixtureRequest) -> Study:
    if request.param == "CMA-ES" and importlib.util.find_spec("cmaes") is None:
        pytest.skip("cmaes is not installed")
    return make_study("cache", trials=TRIALS, **SEARCHES[request.param])


def differing(study: Study, store: Store) -> list[int]:
    """The trials whose suggestions are not the same when they are asked for again."""
    return [each.number for each in replay(study, store.optuna_study.trials) if not each.same]


def test_every_suggestion_of_a_serial_study_comes_out_again(searched: Study) -> None:
    store = memory_store(searched)
    run_analytic(searched, store, TRIALS)
    assert differing(searched, store) == []


@pytest.mark.parametrize("pruned", [0, 1])
@pytest.mark.parametrize("constant_liar", [True, False])
def test_a_trial_that_diverged_late_is_never_a_good_one_to_tpe(
    pruned: int, constant_liar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial is complete, few are pruned early, all others diverge in their last epoch."""
    good: list[set[int]] = []
    split = tpe_sampler._split_trials

    def watched(*arguments: Any) -> Any:
        below, above = split(*arguments)
        good.append({trial.number for trial in below})
        return below, above

    monkeypatch.setattr(tpe_sampler, "_split_trials", watched)
    study = make_study("cache", trials=25, sampler=tpe(n_startup_trials=2, constant_liar=constant_liar))
    store = memory_store(study)
    for number in range(study.trials):
        asked = store.ask(study)
        last = 1 if 0 < number <= pruned else 5
        results = [epoch_result(epoch, 0.1 * epoch) for epoch in range(1, last + 1)]
        for each in results:
            store.report(asked, each.epoch, 0.1 * each.epoch)
        outcome = Completed(value=0.5) if number == 0 else Pruned(epoch=1) if last == 1 else Diverged(epoch=6)
        store.tell(asked, outcome, results, seconds=1.0)
    assert len(good) > 0
    assert set().union(*good) == set(range(1 + pruned))
    assert differing(study, store) == []


# -- several processes ---------------------------------------------------------------------------------------------


def dies_in_its_question(store: Store, number: int) -> None:
    """Have this process killed when it has written two parameters of that trial, or of a later one."""
    storage: Any = store.optuna_study._storage
    write, written = storage.set_trial_param, []

    def dying(trial_id: int, name: str, *rest: Any) -> None:
        write(trial_id, name, *rest)
        if storage.get_trial(trial_id).number >= number:
            written.append(name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    storage.set_trial_param = dying


def work(study: Study, url: str, seed: int, dies_at: int | None) -> None:
    """A worker: asks, takes its time, tells, as long as the study lacks trials."""
    nap = random.Random(seed)
    with open_store(study, url, joining=True) as store:
        if dies_at is not None:
            dies_in_its_question(store, dies_at)
        while store.finished() < study.trials:
            try:
                asked = store.ask(study, study.trials)
            except NoTrialFree:
                time.sleep(0.02)
                continue
            time.sleep(nap.uniform(0.0, 0.05))
            evaluate(study, store, asked)


@pytest.fixture
def started() -> Iterator[list[Any]]:
    """Processes of a test, none of which outlives it."""
    processes: list[Any] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def search(study: Study, url: str, started: list[Any], dies_at: int | None = None) -> list[int]:
    """Run a study in several processes, of which one may die; returns their exit codes."""
    with open_store(study, url):
        pass
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.study.test_replay", "torch"])  # the imports are paid once
    for number in range(WORKERS):
        dying = dies_at if number == 0 else None
        started.append(context.Process(target=work, args=(study, url, number, dying)))
        started[-1].start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


@pytest.mark.slow
def test_every_suggestion_of_a_parallel_study_comes_out_again(
    searched: Study, tmp_path: Path, started: list[Any]
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert search(searched, url, started) == [0] * WORKERS
    with read_store(searched.name, url) as store:
        trials = store.optuna_study.trials
        assert [trial.number for trial in trials] == list(range(TRIALS))
        assert any("seen" in trial.user_attrs for trial in trials)  # they did run side by side
        assert differing(searched, store) == []


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_its_question_leaves_nothing_that_differs(
    tmp_path: Path, started: list[Any]
) -> None:
    study, url = (
        make_study("cache", trials=TRIALS, sampler=tpe(n_startup_trials=4)),
        f"sqlite:///{tmp_path / 'study.db'}",
    )
    assert search(study, url, started, dies_at=8) == [-signal.SIGKILL, 0, 0, 0]
    with read_store(study.name, url) as store:
        assert store.counts()["running"] == 0
        assert store.finished() == TRIALS
        assert differing(study, store) == []


# -- what does not fit ---------------------------------------------------------------------------------------------


def edit(file: Path, statement: str) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute(statement)
    connection.close()


def test_an_edited_parameter_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, file = make_study("cache", sampler=Sampler("RandomSampler"), trials=6), tmp_path / "study.db"
    with open_store(study, f"sqlite:///{file}") as store:
        run_analytic(study, store, study.trials)
        assert replay_study(study, store)
    assert capsys.readouterr().out == "All 6 suggestions are the same when replayed.\n"
    edit(
        file,
        "UPDATE trial_params SET param_value = 0.25 WHERE param_name = 'backbone.dropout' "
        "AND trial_id = (SELECT trial_id FROM trials WHERE number = 3)",
    )
    with read_store(study.name, f"sqlite:///{file}") as store:
        assert not replay_study(study, store)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("trial 3: backbone.dropout is 0.25, replayed 0.")
    assert last == "1 of 6 suggestions differ."


def test_a_parameter_that_is_gone_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, file = make_study("cache", sampler=Sampler("RandomSampler"), trials=3), tmp_path / "study.db"
    with open_store(study, f"sqlite:///{file}") as store:
        run_analytic(study, store, study.trials)
    edit(file, "DELETE FROM trial_params WHERE param_name = 'backbone.dropout' AND trial_id = 2")
    with read_store(study.name, f"sqlite:///{file}") as store:
        assert not replay_study(study, store)
    assert "trial 1: backbone.dropout is missing, replayed 0." in capsys.readouterr().out


def test_another_version_of_optuna_is_named_when_suggestions_differ(capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study("cache", sampler=Sampler("RandomSampler"))
    store = memory_store(study)
    run_analytic(study, store, 4)
    store.set_attribute("versions", {"python": "3.8.1", "optuna": "2.0.0", "torch": "1.0", "mlflow": "1.0"})
    assert replay_study(study, store)
    assert "versions" not in capsys.readouterr().out
    assert not replay_study(dataclasses.replace(study, seed=study.seed + 1), store)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("3 of 4 suggestions differ, first that of trial 1; later ones may depend on it.")
    assert "python was 3.8.1, is 3." in last
    assert "optuna was 2.0.0, is " in last
    assert "mlflow" not in last


def test_a_trial_that_lacks_parameters_still_is_compared_in_those_that_it_has() -> None:
    study = make_study("cache", sampler=tpe(n_startup_trials=2))
    store = memory_store(study)
    run_analytic(study, store, 4)
    whole = store.ask(study)
    trials = store.optuna_study.trials
    del trials[-1].params["optim.base_lr"]
    *_, last = replay(study, trials)
    assert (last.number, last.same) == (whole.number, True)
    trials[-1].params["optim.depth_lr_mult"] = 0.123
    *_, last = replay(study, trials)
    assert last.line().startswith(f"trial {whole.number}: optim.depth_lr_mult is 0.123, replayed")
    trials[-1].params.clear()  # it has been taken, and nothing was asked
    assert [each.number for each in replay(study, trials)] == [0, 1, 2, 3]


def test_failed_and_running_trials_were_seen_as_what_they_were() -> None:
    study = make_study("cache", sampler=tpe(n_startup_trials=2))
    store = memory_store(study)
    for number in range(8):
        asked: Asked = store.ask(study)
        failed = Failed(reason="RuntimeError: no", traceback="")
        store.tell(asked, failed if number % 3 == 1 else Completed(value=number / 10), [], seconds=1.0)
    store.ask(study)
    assert differing(study, store) == []


def test_a_study_without_trials_has_nothing_to_replay() -> None:
    study = make_study("cache")
    with pytest.raises(InputError, match="no trials yet; run it"):
        replay_study(study, memory_store(study))


@pytest.mark.slow
def test_the_command_says_so_and_writes_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = catalogue.find("demo")
    with open_store(found.study.located(found.home, None, None), found.storage_url) as store:
        run_analytic(found.study, store, 12)
    files = {path: path.read_bytes() for path in (workspace / "studies").glob("demo.*")}
    assert main(["replay", "demo"]) == 0
    assert capsys.readouterr().out == "All 12 suggestions are the same when replayed.\n"
    assert {path: path.read_bytes() for path in (workspace / "studies").glob("demo.*")} == files
