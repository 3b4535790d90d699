"""MLflow is a view of the storage: one parent, one child a trial, nothing twice, nothing left running."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.base.errors import InputError
from harness.base.keys import final_key, trial_key
from harness.config.events import Completed, Diverged, Failed, Pruned, TrialEnded, TrialOutcome, TrialStarted
from harness.config.space import Float
from harness.config.study import Study
from harness.search.pruners import no_pruning
from harness.store.opening import open_store
from harness.store.store import Store
from harness.tracking.client import view_of
from harness.tracking.expected import facts
from harness.tracking.mlflow import MLflowTracker
from harness.tracking.places import check_writable, local_tracker, local_uri, tracker_at
from harness.training.loop import Progress
from tests.analytic import epoch_result
from tests.conftest import PROJECT, make_study
from tests.patience import PATIENCE_SECONDS

RUNTIME = {"device": "cpu", "precision": "fp32", "channels_last": False}
OUTCOMES: tuple[TrialOutcome, ...] = (
    Completed(value=0.6),
    Pruned(epoch=2),
    Diverged(epoch=3),
    Failed(reason="RuntimeError: x", traceback="Traceback"),
)
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED"}


@pytest.fixture
def study() -> Study:
    return make_study("cache", pruner=no_pruning())


@pytest.fixture
def store(study: Study, tmp_path: Path) -> Iterator[Store]:
    with open_store(study, f"sqlite:///{tmp_path / 'tiny.db'}") as store:
        yield store


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=local_uri(folder))


def runs_of(folder: Path, name: str = "tiny") -> dict[str, Any]:
    """Every run of a study by its key; a key that comes twice fails."""
    client = client_of(folder)
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000)
    keys = [run.data.tags["harness.key"] for run in found]
    assert len(set(keys)) == len(keys), keys
    return dict(zip(keys, found, strict=True))


def steps_of(folder: Path, run: Any, metric: str = "val_accuracy") -> list[int]:
    return [each.step for each in client_of(folder).get_metric_history(run.info.run_id, metric)]


def run_trial(
    study: Study, store: Store, tracker: MLflowTracker, outcome: TrialOutcome, epochs: int = 3, dies: str = ""
) -> None:
    """What `objective.evaluate_trial` tells store and tracker; `dies` stops before "tell" or before the run's "end"."""
    asked, results = store.ask(study), []
    log = tracker.run(trial_key(asked.number), study.config(asked.params), {"harness.kind": "trial"})
    for epoch in range(1, epochs + 1):
        results.append(epoch_result(epoch, 0.2 * epoch))
        store.report(asked, epoch, 0.2 * epoch)
        log.epoch(results[-1])
    if dies == "tell":
        return
    if isinstance(outcome, Failed):
        log.text(outcome.traceback, "traceback.txt")
    store.tell(asked, outcome, results, seconds=1.0)
    if dies == "end":
        return
    log.end(outcome.state)


def whole_study(study: Study, store: Store, folder: Path) -> MLflowTracker:
    tracker = local_tracker(folder)
    tracker.start(study, store, facts(study, RUNTIME))
    for outcome in OUTCOMES:
        run_trial(study, store, tracker, outcome)
    tracker.finish({"best_val_accuracy": 0.6}, [], "complete")
    return tracker


# -- what is logged ------------------------------------------------------------------------------------------------


def test_a_study_is_one_parent_with_one_child_a_trial(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)
    runs = runs_of(mlruns)
    assert set(runs) == {"study", "trial-0", "trial-1", "trial-2", "trial-3"}
    parent = runs.pop("study")
    assert "mlflow.parentRunId" not in parent.data.tags
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"best_val_accuracy": 0.6}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["harness.study_uid"] == store.attributes().get("uid")


def test_the_studys_run_has_each_new_best_once_in_the_order_of_the_trials(
    study: Study, store: Store, mlruns: Path
) -> None:
    asked = store.ask(study)

    def end(tracker: MLflowTracker, number: int, outcome: TrialOutcome) -> None:
        tracker.show(TrialEnded(key=trial_key(number), number=number, params=asked.params, outcome=outcome))

    def shown() -> list[tuple[int, float]]:
        history = client_of(mlruns).get_metric_history(runs_of(mlruns)["study"].info.run_id, "best_val_accuracy")
        return [(each.step, each.value) for each in history]

    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    store.tell(asked, Completed(value=0.5), [], seconds=1.0)
    end(tracker, 0, Completed(value=0.5))
    tracker.interrupt()
    assert shown() == [(1, 0.5)]
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    end(tracker, 2, Completed(value=0.7))
    assert tracker.flush()
    assert shown() == [(1, 0.5)]  # trial 1 may still be better
    for number, outcome in enumerate((Completed(value=0.6), Pruned(epoch=1), Completed(value=0.65))):
        end(tracker, (1, 3, 4)[number], outcome)
    tracker.finish({"best_val_accuracy": 0.7}, [], "complete")
    assert shown() == [(1, 0.5), (2, 0.6), (3, 0.7)]


def test_the_results_are_a_saved_view_of_the_searched_hyperparameters(study: Study, store: Store, mlruns: Path) -> None:
    def columns(changed: Study) -> list[str]:
        tracker = local_tracker(mlruns)
        tracker.start(changed, store, {})
        ((_, path),) = tracker.pages()
        assert path.endswith("&viewStateShareKey=harness-results")
        tracker.interrupt()
        view = client_of(mlruns).get_experiment_by_name("tiny").tags["mlflow.sharedViewState.harness-results"]
        found: list[str] = json.loads(json.loads(view)["state"])["selectedColumns"]
        return found

    metrics, state = ["metrics.`val_accuracy`", "metrics.`test_accuracy`"], ["tags.`harness.state`"]
    assert columns(study) == metrics + [f"params.`{path}`" for path in study.space] + state
    narrower = dataclasses.replace(study, space={"backbone.dropout": Float(0.0, 0.6)})
    assert columns(narrower) == [*metrics, "params.`backbone.dropout`", *state]
    many: Any = SimpleNamespace(objective="accuracy", space=[f"optim.field_with_a_long_name_{n}" for n in range(99)])
    assert len(view_of(many)) < 5000  # characters, which MLflow takes


def test_system_metrics_are_logged_while_a_training_runs_if_asked_for(
    study: Study, store: Store, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    asked = store.ask(study)
    about = {"key": trial_key(0), "number": 0, "params": asked.params}

    def steps() -> list[int]:
        return sorted(steps_of(mlruns, runs_of(mlruns)["trial-0"], "system/system_memory_usage_percentage"))

    def train(until: int) -> None:
        """A start of the trial, until that many values were logged."""
        tracker = local_tracker(mlruns)
        tracker.start(study, store, {})
        started = TrialStarted(
            **about, kind="trial", name="trial 0", trial=0, epochs=3, resumed=False, groups=None, progress=Progress()
        )
        tracker.show(started)
        assert tracker.flush()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(steps()) < until:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if until == 1:
            return tracker.interrupt()
        tracker.show(TrialEnded(**about, outcome=Completed(value=0.5)))
        tracker.finish({}, [], "complete")
        assert not [each for each in threading.enumerate() if each.name == "SystemMetricsMonitor"]

    train(1)
    train(3)
    assert steps() == list(range(len(steps())))  # the second start goes on


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "maybe", "is neither true nor false"),
        ("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "ten", "is not a number above 0"),
        ("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "-1", "is not a number above 0"),
    ],
)
def test_wrong_variables_of_system_metrics_are_refused(
    mlruns: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value} {said}"):
        local_tracker(mlruns).check("tiny")
    local_tracker(mlruns).check()  # as `ui` does, which logs nothing


def test_a_machine_without_system_metrics_is_said_once_and_logged_as_before(
    study: Study, store: Store, mlruns: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import psutil

    def refused() -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setattr(psutil, "net_io_counters", refused)
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    for number in range(2):
        asked = store.ask(study)
        about = {"key": trial_key(number), "number": number, "params": asked.params}
        tracker.show(
            TrialStarted(
                **about, kind="trial", name="", trial=number, epochs=3, resumed=False, groups=None, progress=Progress()
            )
        )
        tracker.show(TrialEnded(**about, outcome=Completed(value=0.5)))
    tracker.finish({}, [], "complete")
    assert {run.info.status for run in runs_of(mlruns).values()} == {"FINISHED"}
    assert capsys.readouterr().err.count("System metrics are not logged") == 1


def test_the_status_of_a_run_is_the_state_of_its_trial(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)
    runs = runs_of(mlruns)
    for record in store.trials():
        run = runs[f"trial-{record.number}"]
        assert run.info.status == STATUS[record.state]
        assert run.data.tags["harness.state"] == record.state


def test_parameters_are_the_whole_flat_configuration_of_the_trial(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)
    for key, record in zip(("trial-0", "trial-1"), store.trials()[:2], strict=True):
        params = runs_of(mlruns)[key].data.params
        for path, value in record.params.items():
            assert params[path] == str(value)
        assert params["data.type"] == "Garden"
        assert params["epochs"] == "2"
        assert params["optim.weight_decay"] == "0.02"


@pytest.mark.slow
def test_metrics_carry_their_epoch_as_step_and_are_few(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)
    runs, keys = runs_of(mlruns), set()
    for name in ("trial-0", "trial-3"):
        run = runs[name]
        keys |= set(run.data.metrics)
        for metric in run.data.metrics:
            assert steps_of(mlruns, run, metric) == [1, 2, 3]
        assert run.data.metrics["val_accuracy"] == pytest.approx(0.6)
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "epoch_seconds"} <= keys
    assert len(keys) <= 15


@pytest.mark.slow
def test_every_run_names_its_data_set_once(study: Study, tmp_path: Path, mlruns: Path) -> None:
    content = {"data": "0123456789abcdef, " * 3}
    with open_store(study, f"sqlite:///{tmp_path}/named.db", content) as store:
        for _ in range(2):  # two starts
            tracker = local_tracker(mlruns)
            tracker.start(study, store, facts(study, RUNTIME))
            run_trial(study, store, tracker, Completed(value=0.6))
            tracker.finish({}, [], "complete")
    runs = runs_of(mlruns)
    assert len(runs) == 3
    inputs = [each.inputs.dataset_inputs for each in runs.values()]
    assert [len(each) for each in inputs] == [1, 1, 1]
    (first, *others) = [each[0].dataset for each in inputs]
    assert first.name == "Garden"
    assert re.fullmatch("[0-9a-f]{16}", first.digest)
    assert all((each.name, each.digest) == (first.name, first.digest) for each in others)


def test_tags_say_with_what_the_study_ran(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)
    for run in runs_of(mlruns).values():
        tags = run.data.tags
        assert tags["harness.seed"] == "0"
        for package in ("torch", "torchvision", "optuna", "mlflow", "python"):
            assert tags[f"version.{package}"][0].isdigit()
        assert tags["harness.device"] == "cpu"
        assert tags["harness.precision"] == "fp32"
        assert tags["harness.command"]
        assert tags["mlflow.source.git.commit"]


def test_the_study_s_own_run_has_the_command_of_its_last_start(study: Study, store: Store, mlruns: Path) -> None:
    for command in ("run --trials 4", "run --trials 10"):
        tracker = local_tracker(mlruns)
        tracker.start(study, store, {"harness.command": command})
        tracker.run(trial_key(0), study.train, {}).end("complete")
        tracker.finish({}, [], "complete")
    said = {key: run.data.tags["harness.command"] for key, run in runs_of(mlruns).items()}
    assert said == {"study": "run --trials 10", "trial-0": "run --trials 4"}


def test_the_commit_is_that_of_the_code(study: Study) -> None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False)
    expected = done.stdout.strip() if done.returncode == 0 else "unknown"
    assert facts(study, RUNTIME)["mlflow.source.git.commit"].removesuffix("+changes") == expected


def test_final_runs_are_found_by_trial_and_seed(study: Study, store: Store, mlruns: Path) -> None:
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    for trial, seed in ((3, 0), (3, 1), (7, 0)):
        tracker.run(final_key(trial, seed), study.train, {"harness.kind": "final"}).end("complete")
    tracker.finish({}, [], "complete")
    assert set(runs_of(mlruns)) == {
        "study",
        "final-seed-0-of-trial-3",
        "final-seed-1-of-trial-3",
        "final-seed-0-of-trial-7",
    }


def test_a_reopened_test_set_changes_what_the_studys_run_shows_once(study: Study, store: Store, mlruns: Path) -> None:
    for accuracy in (0.5, 0.6, 0.6):
        tracker = local_tracker(mlruns)
        tracker.start(study, store, {})
        tracker.finish({"test_accuracy": accuracy}, [], "complete")
    run = runs_of(mlruns)["study"]
    history = client_of(mlruns).get_metric_history(run.info.run_id, "test_accuracy")
    assert run.data.metrics["test_accuracy"] == 0.6
    assert [each.value for each in history] == [0.5, 0.6]
    assert len({each.step for each in history}) == 2


def test_report_and_model_lie_with_the_parent_run(study: Study, store: Store, mlruns: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.report").mkdir()
    (tmp_path / "tiny.report" / "report.html").write_text("<html></html>")
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    tracker.finish({}, [tmp_path / "tiny.report"], "complete")
    files = client_of(mlruns).list_artifacts(runs_of(mlruns)["study"].info.run_id, "tiny.report")
    assert [file.path for file in files] == ["tiny.report/report.html"]


# -- after a death -------------------------------------------------------------------------------------------------


def test_a_resumed_trial_logs_no_step_twice_and_nothing_stays_running(study: Study, store: Store, mlruns: Path) -> None:
    first = local_tracker(mlruns)
    first.start(study, store, facts(study, RUNTIME))
    run_trial(study, store, first, Completed(value=0.4), epochs=2, dies="tell")
    assert first.flush()
    assert runs_of(mlruns)["trial-0"].info.status == "RUNNING"
    again = local_tracker(mlruns)
    again.start(study, store, facts(study, RUNTIME))
    run_trial(study, store, again, Completed(value=0.6), epochs=3)
    again.finish({}, [], "complete")
    runs = runs_of(mlruns)
    assert set(runs) == {"study", "trial-0"}
    assert steps_of(mlruns, runs["trial-0"]) == [1, 2, 3]
    assert [run.info.status for run in runs.values()] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True])
def test_trials_told_to_the_storage_only_are_closed_at_the_next_start(
    study: Study, store: Store, mlruns: Path, interrupted: bool
) -> None:
    """A kill or Ctrl-C between the storage's tell and the run's end; KILLED is also the status of a pruned trial."""
    first = local_tracker(mlruns)
    first.start(study, store, {})
    for outcome in OUTCOMES:
        run_trial(study, store, first, outcome, dies="end")
    assert first.flush()
    if interrupted:
        first.interrupt()
    local_tracker(mlruns).start(study, store, {})
    for number, outcome in enumerate(OUTCOMES):
        run = runs_of(mlruns)[f"trial-{number}"]
        assert (run.info.status, run.data.tags["harness.state"]) == (STATUS[outcome.state], outcome.state)
        assert steps_of(mlruns, run) == [1, 2, 3]


def test_an_interruption_marks_what_is_open_and_the_same_runs_go_on(study: Study, store: Store, mlruns: Path) -> None:
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    run_trial(study, store, tracker, Completed(value=0.6))
    run_trial(study, store, tracker, Completed(value=0.6), epochs=1, dies="tell")
    tracker.interrupt()
    before = runs_of(mlruns)
    for key, status, state in (
        ("study", "KILLED", "interrupted"),
        ("trial-0", "FINISHED", "complete"),
        ("trial-1", "KILLED", "interrupted"),
    ):
        assert (before[key].info.status, before[key].data.tags["harness.state"]) == (status, state)
    again = local_tracker(mlruns)
    again.start(study, store, {})
    run_trial(study, store, again, Completed(value=0.6))
    again.finish({}, [], "complete")
    after = runs_of(mlruns)
    assert {key: run.info.run_id for key, run in before.items()} == {key: run.info.run_id for key, run in after.items()}
    assert {run.info.status for run in after.values()} == {"FINISHED"}


@pytest.mark.slow
def test_mlflow_is_rebuilt_from_the_storage_when_it_was_deleted(
    study: Study, store: Store, mlruns: Path, empty_mlflow: Path
) -> None:
    whole_study(study, store, mlruns)

    def shown(folder: Path) -> dict[str, Any]:
        return {
            key: (run.info.status, run.data.params, run.data.metrics, run.data.tags["harness.state"])
            for key, run in runs_of(folder).items()
            if key != "study"
        }

    # Another folder stands for the deleted one, because MLflow keeps the connections of a process open.
    rebuilt = mlruns.with_name("rebuilt")
    rebuilt.mkdir()
    shutil.copy(empty_mlflow, rebuilt)
    tracker = local_tracker(rebuilt)
    tracker.start(study, store, facts(study, RUNTIME))
    tracker.finish({}, [], "complete")
    assert shown(rebuilt) == shown(mlruns)
    assert all(steps_of(rebuilt, runs_of(rebuilt)[key]) == [1, 2, 3] for key in shown(mlruns))


@pytest.mark.slow
def test_synchronising_twice_changes_nothing(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)

    def shown() -> dict[str, Any]:
        return {key: run.to_dictionary() for key, run in runs_of(mlruns).items() if key != "study"}

    before = shown()
    local_tracker(mlruns).start(study, store, {})
    assert shown() == before


@pytest.mark.slow
def test_a_fresh_study_of_the_same_name_has_runs_of_its_own(
    study: Study, store: Store, mlruns: Path, tmp_path: Path
) -> None:
    whole_study(study, store, mlruns)
    with open_store(study, f"sqlite:///{tmp_path / 'fresh.db'}") as fresh:
        tracker = local_tracker(mlruns)
        tracker.start(study, fresh, {})
        run_trial(study, fresh, tracker, Completed(value=0.6))
        tracker.finish({}, [], "complete")
    client = client_of(mlruns)
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len({run.data.tags["harness.study_uid"] for run in found}) == 2
    assert len(found) == 5 + 2


# -- written by a thread -------------------------------------------------------------------------------------------


def test_an_epoch_is_seen_while_the_next_one_trains_which_waits_for_nothing(
    study: Study, store: Store, mlruns: Path
) -> None:
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    log = tracker.run(trial_key(0), study.train, {})
    for epoch in (1, 2):
        with closing(sqlite3.connect(mlruns / "mlflow.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")  # whoever waited for MLflow now would wait for ever
            log.epoch(epoch_result(epoch, 0.5))
            other.execute("ROLLBACK")
        while epoch not in (steps_of(mlruns, runs["trial-0"]) if "trial-0" in (runs := runs_of(mlruns)) else []):
            time.sleep(0.05)
    assert steps_of(mlruns, runs_of(mlruns)["trial-0"]) == [1, 2]
    tracker.interrupt()


@pytest.mark.slow
def test_more_epochs_than_one_request_takes_are_there_whole(study: Study, store: Store, mlruns: Path) -> None:
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    log = tracker.run(trial_key(0), study.train, {})
    for epoch in range(1, 261):
        log.epoch(epoch_result(epoch, 0.5))
    log.end("complete")
    assert tracker.finish({}, [], "complete")
    for metric in ("train_loss", "val_accuracy", "lr"):
        assert steps_of(mlruns, runs_of(mlruns)["trial-0"], metric) == list(range(1, 261))


def test_a_mistake_in_the_thread_is_no_fault_of_a_trial_and_is_raised(
    study: Study, store: Store, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.tracking.outbox.GATHERING_SECONDS", 0.0)
    tracker, done = local_tracker(mlruns), threading.Event()
    tracker.start(study, store, {})
    log = tracker.run(trial_key(0), study.train, {})
    tracker.tell(lambda: 1 // 0)
    tracker.tell(done.set)
    assert done.wait(20)
    log.epoch(epoch_result(1, 0.5))
    log.end("complete")
    with pytest.raises(ZeroDivisionError):
        tracker.run(trial_key(1), study.train, {})
    assert tracker.finish({}, [], "complete")
    assert steps_of(mlruns, runs_of(mlruns)["trial-0"]) == [1]


def test_an_interruption_writes_what_waits(
    study: Study, store: Store, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.tracking.outbox.GATHERING_SECONDS", 60.0)
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    run_trial(study, store, tracker, Completed(value=0.6))
    run_trial(study, store, tracker, Completed(value=0.6), epochs=2, dies="tell")
    assert set(runs_of(mlruns)) == {"study"}
    tracker.interrupt()
    runs = runs_of(mlruns)
    assert steps_of(mlruns, runs["trial-0"]) == [1, 2, 3]
    assert steps_of(mlruns, runs["trial-1"]) == [1, 2]
    assert {key: run.info.status for key, run in runs.items()} == {
        "study": "KILLED",
        "trial-0": "FINISHED",
        "trial-1": "KILLED",
    }


KILLED = """
import os, signal, sys
from pathlib import Path
from harness.tracking import outbox
from harness.config.events import Completed
from harness.search.pruners import no_pruning
from harness.store.opening import open_store
from harness.tracking.places import local_tracker
from tests.conftest import make_study
from tests.tracking.test_tracker import run_trial

outbox.GATHERING_SECONDS = 3600.0  # before there is a thread, so that nothing is written but by `flush`
place = Path(sys.argv[1])
study = make_study("cache", pruner=no_pruning())
with open_store(study, f"sqlite:///{place}/tiny.db") as store:
    tracker = local_tracker(place / "mlruns")
    tracker.start(study, store, {})
    run_trial(study, store, tracker, Completed(value=0.6), dies="tell")
    tracker.flush()
    for dies in ("", "end", "tell"):
        run_trial(study, store, tracker, Completed(value=0.6), dies=dies)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_waits_when_the_process_is_killed_is_written_at_the_next_start(
    study: Study, mlruns: Path, tmp_path: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # The first trial was resumed within that process: three epochs of it are in MLflow, its end is not, nor the others.
    assert {key: run.info.status for key, run in runs_of(mlruns).items()} == {"study": "RUNNING", "trial-0": "RUNNING"}
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        tracker = local_tracker(mlruns)
        tracker.start(study, store, {})
        run_trial(study, store, tracker, Completed(value=0.6))
        assert tracker.finish({}, [], "complete")
        assert store.finished() == 3
    runs = runs_of(mlruns)
    assert set(runs) == {"study", "trial-0", "trial-1", "trial-2"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for key in ("trial-0", "trial-1", "trial-2"):
        for metric in ("train_loss", "val_accuracy"):
            assert steps_of(mlruns, runs[key], metric) == [1, 2, 3], key


BEGINS = """
import sys
from pathlib import Path
from harness.tracking.places import tracker_for

tracker_for(sys.argv[1], Path("nowhere")).check()
"""


@pytest.mark.slow
def test_several_studies_may_begin_at_once_on_one_new_database(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BEGINS, f"sqlite:///{tmp_path}/shared.db"]
    begun = [subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [each.communicate()[1] for each in begun]
    assert [each.returncode for each in begun] == [0] * 4, said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["shared.db", "shared.db.lock"]


def test_the_local_database_is_in_wal_mode_and_a_given_one_stays_as_it_is(mlruns: Path, empty_mlflow: Path) -> None:
    def journal(file: Path) -> str:
        with closing(sqlite3.connect(file)) as connection:
            return str(connection.execute("PRAGMA journal_mode").fetchone()[0])

    given = mlruns / "given.db"
    shutil.copy(empty_mlflow, given)
    with closing(sqlite3.connect(given)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    local_tracker(mlruns).connect()
    tracker_at(f"sqlite:///{given}").connect()
    assert journal(mlruns / "mlflow.db") == "wal"
    assert journal(given) == "delete"


# -- where it cannot be written ------------------------------------------------------------------------------------


def test_a_file_in_place_of_mlruns_is_wrong_input_and_stays(tmp_path: Path) -> None:
    (tmp_path / "mlruns").write_text("a file")
    with pytest.raises(InputError, match=r"mlruns cannot be written.*--tracking-uri"):
        local_tracker(tmp_path / "mlruns")
    assert (tmp_path / "mlruns").read_text() == "a file"


def test_a_check_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["nonsense://somewhere", "sqlite:///FOLDER/garbage.db"])
def test_a_tracking_uri_that_cannot_be_used_is_wrong_input(
    study: Study, store: Store, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "garbage.db").write_bytes(b"this is no database " * 100)
    with pytest.raises(InputError, match="--tracking-uri"):
        MLflowTracker(uri.replace("FOLDER", str(tmp_path)), None).start(study, store, {})


# -- who imports it ------------------------------------------------------------------------------------------------


def test_nothing_but_the_tracking_module_imports_mlflow() -> None:
    offenders = []
    for file in sorted((PROJECT / "harness").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "mlflow" for name in names):
                offenders.append(file.relative_to(PROJECT / "harness").as_posix())
    rooms = {*(f"tracking/{name}.py" for name in ("library", "client", "files", "check")), "serving/registry.py"}
    assert set(offenders) == rooms


def test_mlflow_sends_no_telemetry_and_starts_no_jobs() -> None:
    names = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION")
    code = (
        f"import os, harness.tracking.mlflow, sys; print(*(os.environ[n] for n in {names!r}), 'mlflow' in sys.modules)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["true", "true", "false", "False"]
