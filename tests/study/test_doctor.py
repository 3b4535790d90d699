"""`doctor`: every disagreement is made for real, found in one line, mended, and then gone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.base import processes
from harness.base.keys import trial_key
from harness.cli.commands import main
from harness.config import find as catalogue
from harness.config.events import Completed, Diverged, Failed, Pruned, TrialOutcome
from harness.data.augment import IMAGENET
from harness.data.splits import prepare
from harness.final.test_set import summary
from harness.store.opening import open_store, read_store
from harness.store.store import Store
from harness.study.doctor import UNFINISHED
from harness.tracking.expected import facts, study_metrics, trial_tags
from harness.tracking.files import ARTIFACTS, move_in
from harness.tracking.places import local_tracker
from harness.training.checkpoint import fingerprint, identity_of, write_tensors
from tests.analytic import NOT_COMPARED, epoch_result
from tests.conftest import PROJECT
from tests.patience import PATIENCE_SECONDS
from tests.small import small_study, study_in

RUNTIME = {"device": "cpu", "precision": "fp32", "channels_last": False}
OUTCOMES: tuple[TrialOutcome, ...] = (
    Completed(value=0.6),
    Pruned(epoch=2),
    Diverged(epoch=3),
    Failed(reason="RuntimeError: x", traceback="Traceback"),
)
slow = pytest.mark.slow
WEIGHTS = {"0.weight": torch.arange(6.0)}
DESCRIPTION: dict[str, Any] = {
    "weights": {"tested": True},
    "classes": ["rose"],
    "preprocessing": {},
    "configuration": {},
    "fit_on": "train+val",
    "trial": 0,
    "trial_validation_accuracy": 0.6,
    "test": {},
}
SEED = "final-seed-0-of-trial-0"


def fill(store: Store) -> None:
    """A trial of every kind, and a final result."""
    study = small_study("cache")
    for outcome in OUTCOMES:
        asked = store.ask(study)
        epochs = [epoch_result(epoch, 0.2 * epoch) for epoch in (1, 2, 3)]
        for each in epochs:
            assert each.val is not None
            store.report(asked, each.epoch, each.val.accuracy)
        store.tell(asked, outcome, epochs, seconds=1.0)
    result = {"seed": 0, "correct": 90, "total": 100, "accuracy": 0.9, "loss": 0.4, "weights": fingerprint(WEIGHTS)}
    epochs = [epoch_result(epoch, 0.3 * epoch) for epoch in (1, 2)]
    per_seed = [result | {"epochs": [each.to_dict() for each in epochs]}]
    store.set_attribute(
        "final", summary(per_seed) | {"trial": 0, "fit_on": "train+val", "test_openings": 1} | NOT_COMPARED
    )
    store.set_attribute("runtime", RUNTIME)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Path:
    """A finished study: storage, MLflow, and a model; everything agrees."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "mlruns").mkdir()
    shutil.copy(empty_mlflow, folder / "mlruns" / "mlflow.db")
    study, url = study_in(folder, folder / "cache")
    model = folder / "studies" / "tiny.model"
    model.mkdir()
    write_tensors(model / "model.safetensors", WEIGHTS, {"trial": 0, "seed": 0})
    with open_store(study, url) as store:
        (model / "model.json").write_text(json.dumps(DESCRIPTION | {"study_uid": store.attributes().get("uid")}))
        fill(store)
        tracker = local_tracker(folder / "mlruns")
        tracker.start(study, store, facts(study, RUNTIME))
        assert tracker.finish(study_metrics(store), [model], "complete")
        store.set_attribute("published", store.finished())
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy whose MLflow names its own files."""
    shutil.copytree(folder, to)
    move_in(to / "mlruns" / "mlflow.db", to / "mlruns" / ARTIFACTS)
    return to


@pytest.fixture(scope="module")
def interrupted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study with a fifth trial, which was interrupted after its first epoch."""
    folder = copied(finished, tmp_path_factory.mktemp("interrupted") / "place")
    study = small_study("cache")
    with open_store(study, f"sqlite:///{folder}/studies/tiny.db") as store:
        tracker = local_tracker(folder / "mlruns")
        tracker.start(study, store, facts(study, RUNTIME))
        asked = store.ask(study)
        assert asked.number == 4
        log = tracker.run(trial_key(4), study.config(asked.params), trial_tags(study, 4))
        store.report(asked, 1, 0.2)
        log.epoch(epoch_result(1, 0.2))
        identity = identity_of(store.attributes().get("uid"), "trial-4", 1, study.config(asked.params))
        write_tensors(folder / "studies" / "tiny.checkpoints" / "trial-4.safetensors", WEIGHTS, {"identity": identity})
        tracker.interrupt()
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished study, as the working directory. MLflow never saw this path: it keeps files open."""
    copied(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def waiting(interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the interrupted study."""
    copied(interrupted, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def first_quick(first: Any, *others: Any) -> list[Any]:
    """The first set of parameters for every day, the others for the slow tests."""
    return [first, *(pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=slow) for each in others)]


Doctor = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """The command: its exit code and what it says, line by line."""

    def command(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main(["doctor", "tiny", *arguments])
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return command


@contextmanager
def mlflow(place: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(place / "mlruns" / "mlflow.db")) as database:
        yield database
        database.commit()


def run_id(database: sqlite3.Connection, key: str) -> str:
    query = "SELECT t.run_uuid FROM tags t JOIN runs r USING (run_uuid) WHERE t.key = 'harness.key' AND t.value = ?"
    ((found,),) = database.execute(query + " AND r.lifecycle_stage = 'active'", (key,)).fetchall()
    return str(found)


def shown(place: Path) -> dict[str, Any]:
    """What MLflow shows of each run, ids and times apart."""
    with mlflow(place) as database:
        runs = database.execute("SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'").fetchall()
        tags = {
            run: dict(database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,))) for run, _ in runs
        }
        keys = {run: tags[run]["harness.key"] for run, _ in runs}
        assert len(set(keys.values())) == len(keys)
        return {
            keys[run]: (
                status,
                tags[run]["harness.state"],
                keys.get(tags[run].get("mlflow.parentRunId", "")),
                sorted(database.execute("SELECT key, value FROM params WHERE run_uuid = ?", (run,))),
                sorted(database.execute("SELECT key, step, value FROM metrics WHERE run_uuid = ?", (run,))),
            )
            for run, status in runs
        }


def files(place: Path) -> dict[str, str]:
    """Every file's content, but what SQLite and the interpreter keep beside theirs."""
    passing = ("-wal", "-shm", "-journal", ".pyc", ".lock")
    found = (each for each in place.rglob("*") if each.is_file() and not each.name.endswith(passing))
    return {str(each.relative_to(place)): hashlib.sha256(each.read_bytes()).hexdigest() for each in found}


def check(place: Path, doctor: Doctor, expected: str, before: dict[str, Any]) -> None:
    """Found in one line; a look changes nothing; mended; then silence; mended twice is mended once."""
    content = files(place)
    code, lines = doctor()
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        unfinished = [UNFINISHED] if store.counts()["running"] else []
    assert (code, lines[1:]) == (1, unfinished), lines
    assert expected in lines[0]
    assert files(place) == content, "a look writes nothing"
    code, lines = doctor("--fix")
    assert (code, lines[-1]) == (0, "Repaired."), lines
    assert shown(place) == before
    content = files(place)
    code, lines = doctor("--fix")
    assert (code, len(lines)) == (0, 1), lines
    assert "agree" in lines[0]
    assert files(place) == content


# --- nothing is wrong ---


def test_a_finished_study_agrees_and_a_look_writes_nothing(place: Path, doctor: Doctor) -> None:
    doctor()  # SQLite makes its files beside the database, which stay while MLflow has it open
    before, touched = files(place), (place / "mlruns").stat().st_mtime_ns
    code, lines = doctor()
    assert (place / "mlruns").stat().st_mtime_ns == touched, "not even a probe, for the folder may be another user's"
    assert (code, len(lines)) == (0, 1)
    assert "agree on 4 finished trials." in lines[0]
    assert doctor("--fix") == (code, lines)
    assert files(place) == before


@pytest.mark.slow
def test_files_named_in_the_folder_that_the_database_was_in_are_found_and_mended(
    finished: Path, tmp_path: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "moved"
    shutil.copytree(finished, place)
    monkeypatch.chdir(place)
    code, said = doctor()
    assert code == 1
    assert f"MLflow looks for files in {finished}/mlruns/artifacts/tiny, but its database is now in" in said[0]
    code, said = doctor("--fix")
    assert code == 0
    assert "Repaired." in said
    assert (place / "mlruns" / ARTIFACTS / "tiny").is_dir()
    assert doctor()[0] == 0


def test_an_interrupted_trial_alone_is_no_disagreement(waiting: Path, doctor: Doctor) -> None:
    before = files(waiting)
    code, lines = doctor()
    assert (code, len(lines)) == (0, 1), lines
    assert "trial 4 resumes when the study does" in lines[0]
    assert files(waiting) == before


def test_a_study_without_results_is_one_sentence(place: Path, doctor: Doctor) -> None:
    for file in (place / "studies").glob("tiny.db*"):
        file.unlink()
    code, lines = doctor()
    assert (code, len(lines)) == (2, 1)
    assert "has no results yet" in lines[0]


# --- MLflow ---


@slow
def test_a_missing_database_is_made_again(place: Path, doctor: Doctor) -> None:
    before = shown(place)
    parent = before.pop("study")
    shutil.rmtree(place / "mlruns")
    code, lines = doctor()
    assert (code, len(lines)) == (1, 1)
    assert "no database and lacks 5 runs" in lines[0]
    assert not (place / "mlruns").exists()
    assert doctor("--fix")[0] == 0
    after = shown(place)
    assert after.pop("study")[:2] == parent[:2]
    assert after == before
    code, lines = doctor()
    assert code == 0, lines
    content = files(place)
    assert doctor("--fix") == (0, lines)
    assert files(place) == content


@pytest.mark.slow
@pytest.mark.parametrize("key", first_quick("trial-3", SEED))
def test_a_missing_run_is_written_again(place: Path, doctor: Doctor, key: str) -> None:
    before = shown(place)
    with mlflow(place) as database:
        database.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (run_id(database, key),))
    check(place, doctor, f"lacks the run of {key}", before)


@slow
def test_a_missing_parent_is_made_again_and_has_its_children(place: Path, doctor: Doctor) -> None:
    before = shown(place)
    with mlflow(place) as database:
        query = "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?"
        database.execute(query, (run_id(database, "study"),))
    code, lines = doctor()
    assert (code, len(lines)) == (1, 1), lines
    assert "lacks the study's own run" in lines[0]
    assert doctor("--fix")[0] == 0
    after = shown(place)
    assert after.pop("study")[:2] == before.pop("study")[:2]
    assert after == before
    assert doctor()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "expected"),
    first_quick(
        ("trial-1", "shows trial-1 as running, but it is pruned"),
        (SEED, f"shows {SEED} as running, but it is complete"),
        ("study", "shows study as running, but no process runs it"),
    ),
)
def test_a_run_left_running_is_closed(place: Path, doctor: Doctor, key: str, expected: str) -> None:
    before = shown(place)
    with mlflow(place) as database:
        run = run_id(database, key)
        database.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", (run,))
        database.execute("UPDATE tags SET value = 'running' WHERE key = 'harness.state' AND run_uuid = ?", (run,))
    check(place, doctor, expected, before)


@slow
def test_an_interrupted_trials_run_left_running_is_closed(waiting: Path, doctor: Doctor) -> None:
    before = shown(waiting)
    with mlflow(waiting) as database:
        query = "UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?"
        database.execute(query, (run_id(database, "trial-4"),))
    check(waiting, doctor, "shows trial-4 as running, but no process runs it", before)


@slow
def test_a_parent_says_complete_again_after_mending_although_the_file_asks_for_more_trials(
    place: Path, doctor: Doctor
) -> None:
    """The study ran with --trials 4; its file says 50."""
    file = place / "studies" / "tiny.py"
    file.write_text(f"import dataclasses\n{file.read_text()}STUDY = dataclasses.replace(STUDY, trials=50)\n")
    before = shown(place)
    with mlflow(place) as database:
        database.execute("DELETE FROM metrics WHERE step = 2 AND run_uuid = ?", (run_id(database, "trial-1"),))
    check(place, doctor, "trial-1 at 2 of 3 steps", before)


@pytest.mark.slow
@pytest.mark.parametrize("key", first_quick("trial-2", SEED))
def test_missing_epochs_are_written(place: Path, doctor: Doctor, key: str) -> None:
    before = shown(place)
    with mlflow(place) as database:
        database.execute("DELETE FROM metrics WHERE step = 1 AND run_uuid = ?", (run_id(database, key),))
    check(place, doctor, f"MLflow has train_loss of {key} at", before)


@slow
@pytest.mark.parametrize(
    ("key", "metric"), [("trial-0", "val_accuracy"), ("trial-1", "train_loss"), (SEED, "test_accuracy")]
)
def test_a_single_missing_value_is_written(place: Path, doctor: Doctor, key: str, metric: str) -> None:
    before = shown(place)
    with mlflow(place) as database:
        where = "step = 2 AND key = ? AND run_uuid = ?"
        assert database.execute(f"DELETE FROM metrics WHERE {where}", (metric, run_id(database, key))).rowcount == 1
    check(place, doctor, f"MLflow has {metric} of {key} at", before)


@slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("timestamp = timestamp + 1, value = value + 0.1", True),
        ("timestamp = timestamp - 1, value = value + 0.1", False),
        ("timestamp = timestamp + 1", False),
    ],
)
def test_of_two_entries_at_a_step_the_later_counts(place: Path, doctor: Doctor, change: str, found: bool) -> None:
    """A trial that another machine began anew is told of twice."""
    before = shown(place)
    with mlflow(place) as database:
        run = run_id(database, "trial-0")
        where = "key = 'val_accuracy' AND step = 2 AND run_uuid = ?"
        database.execute(f"CREATE TEMP TABLE again AS SELECT * FROM metrics WHERE {where}", (run,))
        database.execute(f"UPDATE again SET {change}")
        database.execute("INSERT INTO metrics SELECT * FROM again")
    if found:
        check(place, doctor, "other values of val_accuracy for trial-0", before)
    else:
        code, lines = doctor()
        assert code == 0
        assert "agree on 4 finished trials." in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "metric"), first_quick(("trial-0", "train_loss"), (SEED, "test_accuracy")))
def test_a_wrong_value_is_replaced(place: Path, doctor: Doctor, key: str, metric: str) -> None:
    before = shown(place)
    with mlflow(place) as database:
        query = "UPDATE metrics SET value = value + 1e-9 WHERE step = 2 AND key = ? AND run_uuid = ?"
        assert database.execute(query, (metric, run_id(database, key))).rowcount == 1
    check(place, doctor, f"other values of {metric} for {key}", before)


def add_run(place: Path, like: str, key: str, status: str = "FINISHED") -> None:
    """A newer run with another's tags and the given key."""
    with mlflow(place) as database:
        run = run_id(database, like)
        database.execute("CREATE TEMP TABLE r AS SELECT * FROM runs WHERE run_uuid = ?", (run,))
        database.execute("UPDATE r SET run_uuid = 'second', start_time = start_time + 1000, status = ?", (status,))
        database.execute("INSERT INTO runs SELECT * FROM r")
        database.execute("CREATE TEMP TABLE t AS SELECT * FROM tags WHERE run_uuid = ?", (run,))
        database.execute("UPDATE t SET run_uuid = 'second'")
        database.execute("UPDATE t SET value = ? WHERE key = 'harness.key'", (key,))
        database.execute("INSERT INTO tags SELECT * FROM t")


@pytest.mark.slow
@pytest.mark.parametrize("key", first_quick("trial-1", "study"))
def test_a_second_run_of_the_same_thing_is_taken_out(place: Path, doctor: Doctor, key: str) -> None:
    before = shown(place)
    add_run(place, key, key)
    check(place, doctor, f"a second run of {key}", before)


@slow
@pytest.mark.parametrize("status", ["FINISHED", "RUNNING"])
def test_a_run_of_an_unknown_trial_is_taken_out(place: Path, doctor: Doctor, status: str) -> None:
    before = shown(place)
    add_run(place, "trial-1", "trial-77", status)
    check(place, doctor, "trial-77, which is not in the storage", before)


@slow
@pytest.mark.parametrize(("key", "said"), [("trial-0", "pruned"), (SEED, "running")])
def test_a_wrong_state_is_corrected(place: Path, doctor: Doctor, key: str, said: str) -> None:
    before = shown(place)
    with mlflow(place) as database:
        query = "UPDATE tags SET value = ? WHERE key = 'harness.state' AND run_uuid = ?"
        database.execute(query, (said, run_id(database, key)))
    check(place, doctor, f"shows {key} as {said}", before)


@slow
def test_runs_of_an_earlier_final_result_are_left_alone(place: Path, doctor: Doctor) -> None:
    """An extended study found a better trial; the seeds of the earlier one stay to be looked at."""
    add_run(place, SEED, "final-seed-0-of-trial-1")
    assert doctor()[0] == 0


@slow
def test_another_studys_runs_are_left_alone(place: Path, doctor: Doctor) -> None:
    add_run(place, "trial-0", "trial-0")
    with mlflow(place) as database:
        database.execute("UPDATE tags SET value = 'other' WHERE key = 'harness.study_uid' AND run_uuid = 'second'")
    assert doctor()[0] == 0


@slow
def test_several_disagreements_are_a_line_each_and_mended_together(place: Path, doctor: Doctor) -> None:
    before = shown(place)
    with mlflow(place) as database:
        database.execute("DELETE FROM metrics WHERE step = 2 AND run_uuid = ?", (run_id(database, "trial-0"),))
        query = "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?"
        database.execute(query, (run_id(database, "trial-1"),))
    add_run(place, "trial-2", "trial-2")
    (place / "studies" / "tiny.db.pid").write_text("999999\n")
    code, lines = doctor()
    assert (code, len(lines)) == (1, 4), lines
    assert doctor("--fix")[0] == 0
    assert shown(place) == before
    assert doctor()[0] == 0


# --- checkpoints ---


@pytest.mark.slow
def test_the_checkpoint_of_a_finished_trial_is_dropped(place: Path, doctor: Doctor) -> None:
    before = shown(place)
    write_tensors(place / "studies" / "tiny.checkpoints" / "trial-0.safetensors", WEIGHTS, {})
    check(place, doctor, "trial-0.safetensors is left over", before)
    assert not (place / "studies" / "tiny.checkpoints").exists()


@slow
def test_what_a_killed_writer_left_is_dropped(waiting: Path, doctor: Doctor) -> None:
    before, folder = shown(waiting), waiting / "studies" / "tiny.checkpoints"
    (folder / "trial-4.safetensors.partial").write_bytes(b"half")
    check(waiting, doctor, "trial-4.safetensors.partial is left over", before)
    assert [each.name for each in folder.iterdir()] == ["trial-4.safetensors"]


@slow
def test_a_file_that_is_being_written_is_left_alone(waiting: Path, doctor: Doctor) -> None:
    folder = waiting / "studies" / "tiny.checkpoints"
    (folder / f"trial-4.safetensors{processes.mark()}").write_bytes(b"half")
    assert not any("partial" in line for line in doctor()[1])


@slow
def test_a_folder_among_the_checkpoints_is_left_to_its_owner(waiting: Path, doctor: Doctor) -> None:
    (waiting / "studies" / "tiny.checkpoints" / "copies").mkdir()
    assert doctor()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", first_quick("cut", "flipped", "pickle"))
def test_a_damaged_checkpoint_is_dropped(waiting: Path, doctor: Doctor, damage: str) -> None:
    before, path = shown(waiting), waiting / "studies" / "tiny.checkpoints" / "trial-4.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "flipped": whole[:-1] + b"\x7f", "pickle": b"\x80\x04]\x94."}[damage])
    check(waiting, doctor, "trial-4.safetensors is damaged", before)
    assert not path.exists()


@slow
@pytest.mark.parametrize("record", [{"identity": {"study": "other"}}, {"trial": 0, "seed": 0}])
def test_the_checkpoint_of_another_study_is_dropped(waiting: Path, doctor: Doctor, record: dict[str, Any]) -> None:
    before, path = shown(waiting), waiting / "studies" / "tiny.checkpoints" / "trial-4.safetensors"
    write_tensors(path, WEIGHTS, record)
    check(waiting, doctor, "trial-4.safetensors", before)
    assert not path.exists()


# --- processes ---


@pytest.mark.slow
def test_a_pid_file_of_a_process_that_is_gone_is_removed(place: Path, doctor: Doctor) -> None:
    before, pid = shown(place), place / "studies" / "tiny.db.pid"
    pid.write_text("999999\n")
    check(place, doctor, "names process 999999, which is gone", before)
    assert not pid.exists()


HOLD = """
import sys
from harness.store.opening import open_store
from tests.small import small_study
with open_store(small_study("cache"), sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@slow
def test_while_a_process_runs_the_study_what_is_under_way_is_left_out_and_mending_refused(
    waiting: Path, doctor: Doctor
) -> None:
    with mlflow(waiting) as database:
        for key in ("study", "trial-4"):
            database.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", (run_id(database, key),))
    (waiting / "studies" / "tiny.checkpoints" / "trial-4.safetensors.partial").write_bytes(b"being written")
    command = [sys.executable, "-c", HOLD, f"sqlite:///{waiting}/studies/tiny.db"]
    process = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = files(waiting)
        code, lines = doctor()
        assert code == 0, lines
        code, lines = doctor("--fix")
        assert (code, len(lines)) == (2, 1)
        assert f"is being run by process {process.pid}" in lines[0]
        assert files(waiting) == before
        with mlflow(waiting) as database:
            query = "UPDATE tags SET value = 'pruned' WHERE key = 'harness.state' AND run_uuid = ?"
            database.execute(query, (run_id(database, "trial-0"),))
        code, lines = doctor()
        assert (code, len(lines)) == (1, 2), lines
        assert "shows trial-0 as pruned" in lines[0]
        assert lines[1].startswith(f"The study is running in process {process.pid}, ")
    finally:
        process.kill()
        process.wait(timeout=PATIENCE_SECONDS)
    # The process was killed, and what it left is found: two runs left running, the partial file, the PID.
    code, lines = doctor()
    assert (code, len(lines), lines[-1]) == (1, 6, UNFINISHED), lines
    assert doctor("--fix")[0] == 0
    assert doctor()[0] == 0


# --- the model ---


@pytest.mark.slow
@pytest.mark.parametrize("file", first_quick("model.safetensors", "model.json"))
def test_a_missing_model_is_named_and_waits_for_a_run(place: Path, doctor: Doctor, file: str) -> None:
    (place / "studies" / "tiny.model" / file).unlink()
    for arguments in ((), ("--fix",), ()):
        code, lines = doctor(*arguments)
        assert code == 1
        assert "holds no model" in lines[0]
        assert "run the study again" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("text", first_quick("{}", "", "[1]", json.dumps(DESCRIPTION | {"classes": "rose"})))
def test_a_model_that_is_not_described_is_named_and_waits_for_a_run(place: Path, doctor: Doctor, text: str) -> None:
    path = place / "studies" / "tiny.model" / "model.json"
    path.write_text(text)
    code, lines = doctor()
    assert (code, len(lines)) == (1, 1)
    assert "model.json is damaged (" in lines[0]
    assert "run the study again: it restores lost files, and the test set stays closed" in lines[0]
    assert path.read_text() == text
    assert doctor("--fix")[0] == 1
    assert not path.exists(), "the next run makes it again"


@slow
@pytest.mark.parametrize("damage", ["other", "flipped"])
def test_another_or_a_damaged_model_is_named_and_waits_for_a_run(place: Path, doctor: Doctor, damage: str) -> None:
    path = place / "studies" / "tiny.model" / "model.safetensors"
    if damage == "other":
        write_tensors(path, {"0.weight": torch.arange(6.0) + 1}, {"trial": 0, "seed": 0})
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    content = files(place)
    code, lines = doctor()
    assert (code, len(lines)) == (1, 1)
    assert ("differs from the final" if damage == "other" else "is damaged") in lines[0]
    assert files(place) == content
    code, lines = doctor("--fix")
    assert code == 1
    assert "Some disagreements remain." in lines[-1]
    assert not path.exists(), "the next run trains it again"
    code, lines = doctor()
    assert code == 1
    assert "holds no model" in lines[0]


@slow
def test_a_study_without_a_final_result_lacks_no_model(place: Path, doctor: Doctor) -> None:
    shutil.rmtree(place / "studies" / "tiny.model")
    with mlflow(place) as database:
        query = "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?"
        database.execute(query, (run_id(database, SEED),))
    with closing(sqlite3.connect(place / "studies" / "tiny.db")) as database:
        database.execute("DELETE FROM study_user_attributes WHERE key = 'final'")
        database.commit()
    assert doctor()[0] == 0


def test_an_empty_database_is_one_sentence(place: Path, doctor: Doctor) -> None:
    (place / "studies" / "tiny.db").write_bytes(b"")
    code, lines = doctor()
    assert (code, len(lines)) == (2, 1)
    assert "tiny.db is empty); restore the file from a backup if it had any, else run it with " in lines[0]


@pytest.mark.slow
def test_an_edited_test_ledger_is_named_and_never_mended(place: Path, doctor: Doctor) -> None:
    with open_store(small_study(place / "cache"), f"sqlite:///{place}/studies/tiny.db") as store:
        store.add_to_ledger({"event": "opened", "trial": 0})
        lines = store.attributes().get("ledger")
        store.set_attribute("ledger", [lines[0] | {"trial": 1}])
    for arguments in ([], ["--fix"]):
        code, said = doctor(*arguments)
        assert code == 1
        assert "line 1 of the test ledger was changed" in said[0]


@pytest.mark.slow
def test_an_image_cache_that_rotted_is_found_and_made_again(place: Path, doctor: Doctor) -> None:
    """Its file's size and times are as they were, so that a start would take it for whole."""
    before, data = shown(place), catalogue.find("tiny").study.train.data
    prepare(data, IMAGENET)
    arrays = {each: each.read_bytes() for each in Path(data.cache).glob("*.npy")}
    array = min(arrays)
    array.write_bytes(arrays[array][:-1] + bytes([arrays[array][-1] ^ 1]))
    record, stat = json.loads(array.with_suffix(".json").read_text()), array.stat()
    record["file"] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    array.with_suffix(".json").write_text(json.dumps(record))
    check(place, doctor, f"{array} is damaged", before)
    prepare(data, IMAGENET)
    assert {each: each.read_bytes() for each in arrays} == arrays


def test_a_folder_that_may_not_be_written_can_be_looked_at(place: Path, doctor: Doctor) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (place / "mlruns").chmod(0o555)
    try:
        assert doctor()[0] == 0
    finally:
        (place / "mlruns").chmod(0o755)


@slow
def test_the_results_are_never_touched(place: Path, doctor: Doctor) -> None:
    """Whatever is mended, the storage says what it said."""

    def content() -> str:
        with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
            trials = [repr(each) for each in store.trials()]
            return json.dumps([trials, store.attributes().get("final"), store.attributes().get("definition")])

    before = content()
    shutil.rmtree(place / "studies" / "tiny.model")
    with mlflow(place) as database:
        database.execute("UPDATE metrics SET value = 0")
    assert doctor("--fix")[0] == 1
    assert content() == before


@pytest.mark.slow
def test_lost_metrics_of_the_studys_own_run_are_written_again(place: Path, doctor: Doctor) -> None:
    before = shown(place)
    with mlflow(place) as database:
        for table in ("metrics", "latest_metrics"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id(database, "study"),))
    code, lines = doctor()
    assert (code, len(lines)) == (1, 2), lines
    assert all("of the study's own run" in line for line in lines)
    assert doctor("--fix")[0] == 0
    assert doctor()[0] == 0
    assert shown(place) == before


def test_mlflow_that_fails_half_way_is_one_sentence_and_leaves_no_run_open(
    place: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    def fail(*arguments: object) -> None:
        raise MlflowException("502 Bad Gateway")

    before = shown(place)
    monkeypatch.setattr("harness.tracking.check._compare", fail)
    for options in ([], ["--fix"]):
        code, lines = doctor(*options)
        assert code == 2
        assert len(lines) == 1
        assert "cannot be used (502 Bad Gateway); check --tracking-uri." in lines[0]
    assert {key: each[0] for key, each in shown(place).items()} == {key: each[0] for key, each in before.items()}


def test_what_is_written_again_has_the_versions_and_the_command_of_its_run(place: Path, doctor: Doctor) -> None:
    with open_store(small_study("cache"), f"sqlite:///{place}/studies/tiny.db") as store:
        store.set_attribute("versions", {"torch": "1.0"})
        store.set_attribute("command", "python run_study.py --study tiny")
    (place / "mlruns" / "mlflow.db").unlink()
    assert doctor("--fix")[0] == 0
    with mlflow(place) as database:
        tags = dict(database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id(database, "study"),)))
    assert tags["version.torch"] == "1.0"
    assert tags["harness.command"] == "python run_study.py --study tiny"
