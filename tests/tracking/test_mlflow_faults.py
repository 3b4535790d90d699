"""What MLflow and its artifact store refuse, lose, or have deleted: the study goes on, and all comes to be there."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils

from harness.base.errors import InputError
from harness.base.files import as_meant, sqlite_path, sqlite_url
from harness.base.keys import trial_key
from harness.cli.commands import main
from harness.config.events import Completed, Failed
from harness.config.study import Study
from harness.search.pruners import no_pruning
from harness.store.opening import open_store
from harness.store.store import Store
from harness.tracking.files import elsewhere, local_folder
from harness.tracking.library import (
    LONGEST_PARAM,
    LONGEST_TAG,
    PACKAGES,
    StoreFault,
    artifact_store,
    drop_connections,
    faults,
    fitted,
)
from harness.tracking.places import local_tracker, local_uri, tracker_at
from tests.conftest import make_study
from tests.faulty import CommandLine
from tests.tracking.test_tracker import OUTCOMES, client_of, run_trial, runs_of, steps_of, whole_study

slow = pytest.mark.slow
FAILED = Failed(reason="RuntimeError: x", traceback="Traceback")


@pytest.fixture
def study() -> Study:
    return make_study("cache", pruner=no_pruning())


@pytest.fixture
def store(study: Study, tmp_path: Path) -> Iterator[Store]:
    with open_store(study, f"sqlite:///{tmp_path / 'tiny.db'}") as store:
        yield store


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# -- an artifact store that fails in the client --------------------------------------------------------------------


@pytest.fixture
def cloud(mlruns: Path) -> Path:
    """A database whose experiment has its files in a cloud, for which the package is missing here."""
    scheme, package = ("s3", "boto3") if importlib.util.find_spec("boto3") is None else ("gs", "google.cloud.storage")
    assert package.partition(".")[0] == "boto3" or importlib.util.find_spec("google.cloud") is None
    client_of(mlruns).create_experiment("tiny", artifact_location=f"{scheme}://bucket/tiny")
    return mlruns


def test_a_store_whose_package_is_missing_costs_its_files_and_nothing_else(
    study: Study, store: Store, cloud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.report").mkdir()
    (tmp_path / "tiny.report" / "report.html").write_text("<html></html>")
    tracker = local_tracker(cloud)
    tracker.start(study, store, {})
    for outcome in (FAILED, Completed(value=0.6), FAILED):
        run_trial(study, store, tracker, outcome)
        assert tracker.flush()
    assert not tracker.finish({"best_val_accuracy": 0.6}, [tmp_path / "tiny.report"], "complete"), "it lacks files"
    (said,) = lines(capsys)
    assert "pip install " in said
    assert "The study goes on" in said
    runs = runs_of(cloud)
    assert {key: run.info.status for key, run in runs.items()} == {
        "study": "FINISHED",
        "trial-0": "FAILED",
        "trial-1": "FINISHED",
        "trial-2": "FAILED",
    }
    assert runs["study"].data.metrics == {"best_val_accuracy": 0.6}
    for key in ("trial-0", "trial-1", "trial-2"):
        assert runs[key].data.params
        assert steps_of(cloud, runs[key]) == [1, 2, 3]


def test_files_that_a_store_did_not_take_are_written_once_it_does(
    study: Study, store: Store, mlruns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mlruns / "artifacts").write_text("a file where the folder should be")
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    run_trial(study, store, tracker, FAILED)
    assert tracker.flush()
    (mlruns / "artifacts").unlink()
    assert tracker.finish({}, [], "complete")
    assert len(lines(capsys)) == 1
    run = runs_of(mlruns)["trial-0"]
    assert [each.path for each in client_of(mlruns).list_artifacts(run.info.run_id)] == ["traceback.txt"]


@pytest.mark.slow
def test_a_traceback_that_is_missing_is_written_at_the_next_start(study: Study, store: Store, mlruns: Path) -> None:
    whole_study(study, store, mlruns)
    shutil.rmtree(mlruns / "artifacts")
    local_tracker(mlruns).start(study, store, {})
    run = runs_of(mlruns)["trial-3"]
    assert [each.path for each in client_of(mlruns).list_artifacts(run.info.run_id)] == ["traceback.txt"]


class OfACloud(Exception):
    """No kin of anything that Python or MLflow raises."""


@pytest.mark.parametrize("error", [OfACloud("no credentials"), KeyError("x"), ImportError("x"), OSError(5, "x")])
def test_whatever_a_store_raises_is_one_kind_of_fault(error: Exception) -> None:
    with pytest.raises(faults()) as found, artifact_store():
        raise error
    assert isinstance(found.value, StoreFault)


@pytest.mark.parametrize("module", ["boto3", "google.cloud", "azure.storage.blob"])
def test_a_missing_package_is_named_as_pip_names_it(module: str) -> None:
    with pytest.raises(StoreFault, match=PACKAGES[module.partition(".")[0]]), artifact_store():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


# -- entries that MLflow refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "truncates"), [(LONGEST_PARAM, "true"), (6_001, "true"), (100_000, "false")])
def test_a_long_parameter_is_cut_with_a_mark(
    length: int, truncates: str, study: Study, store: Store, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", truncates)
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {"harness.command": "c" * 20_000})
    key, tags = trial_key(0), {"harness.study_uid": store.attributes().get("uid")}
    tracker.tell(lambda: tracker.open_run(key, {"a": "1", "long": "x" * length, "z": "2"}, tags))
    tracker.tell(lambda: tracker.close_run(tracker.known_runs()[key].info.run_id, "complete"))
    assert tracker.flush()
    shown = runs_of(mlruns)
    assert shown[key].data.params == {"a": "1", "long": fitted("x" * length, LONGEST_PARAM), "z": "2"}
    assert shown[key].info.status == "FINISHED"
    assert len(shown["study"].data.tags["harness.command"]) == LONGEST_TAG
    assert shown["study"].data.tags["harness.command"].endswith("(20000 characters, cut)")


@pytest.mark.slow
def test_a_refused_parameter_is_named_and_the_others_are_written(
    study: Study, store: Store, mlruns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    params = {f"p{number}": str(number) for number in range(250)} | {"bad!name?": "1", "n" * 300: "2"}
    tracker.tell(lambda: tracker.open_run(trial_key(0), params, {"harness.study_uid": store.attributes().get("uid")}))
    assert tracker.flush()
    assert len(runs_of(mlruns)[trial_key(0)].data.params) == 250
    said = lines(capsys)
    assert len(said) == 2
    assert "MLflow refuses param bad!name?, which is skipped" in said[0]


# -- what people delete in MLflow's pages --------------------------------------------------------------------------


def test_an_experiment_deleted_while_the_study_runs_is_said_once_and_filled_up_when_it_is_back(
    study: Study, store: Store, mlruns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, client = local_tracker(mlruns), client_of(mlruns)
    tracker.start(study, store, {})
    run_trial(study, store, tracker, OUTCOMES[0])
    assert tracker.flush()
    number = client.get_experiment_by_name("tiny").experiment_id
    client.delete_experiment(number)
    for outcome in OUTCOMES[1:]:
        run_trial(study, store, tracker, outcome)
    assert not tracker.finish({"best_val_accuracy": 0.6}, [], "complete")
    (said,) = lines(capsys)
    assert f"mlflow experiments restore --experiment-id {number}" in said
    assert "The study goes on" in said
    with pytest.raises(InputError, match="doctor tiny --fix"):
        local_tracker(mlruns).start(study, store, {})
    client.restore_experiment(number)
    again = local_tracker(mlruns)
    again.start(study, store, {})
    assert again.finish({"best_val_accuracy": 0.6}, [], "complete")
    assert set(runs_of(mlruns)) == {"study", "trial-0", "trial-1", "trial-2", "trial-3"}


@slow
def test_a_fresh_start_looks_at_mlflow_before_it_moves_the_study_aside(line: CommandLine, empty_mlflow: Path) -> None:
    (line.place / "mlruns").mkdir()
    shutil.copy(empty_mlflow, line.place / "mlruns" / "mlflow.db")
    assert line.run("--trials", "1").code == 0
    client = client_of(line.place / "mlruns")
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    before = sorted(each.name for each in (line.place / "studies").iterdir())
    refused = line.run("--fresh", "--trials", "1")
    assert refused.code == 2
    assert "mlflow experiments restore --experiment-id" in refused.err
    assert sorted(each.name for each in (line.place / "studies").iterdir()) == before
    assert main(["doctor", "tiny"]) == 1
    assert main(["doctor", "tiny", "--fix"]) == 0
    assert {each.info.status for each in runs_of(line.place / "mlruns").values()} == {"FINISHED"}


def test_the_studys_own_run_is_restored_when_it_was_deleted(study: Study, store: Store, mlruns: Path) -> None:
    tracker, client = local_tracker(mlruns), client_of(mlruns)
    tracker.start(study, store, {})
    run_trial(study, store, tracker, OUTCOMES[0])
    assert tracker.flush()
    client.delete_run(tracker.parent)
    assert tracker.finish({"best_val_accuracy": 0.6}, [], "complete")
    client.delete_run(tracker.parent)
    again = local_tracker(mlruns)
    again.start(study, store, {})
    assert again.parent == tracker.parent
    assert again.finish({}, [], "complete")
    assert runs_of(mlruns)["study"].data.metrics == {"best_val_accuracy": 0.6}


def test_a_run_deleted_while_it_is_trained_is_said_once_and_written_again_at_the_end(
    study: Study, store: Store, mlruns: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, client = local_tracker(mlruns), client_of(mlruns)
    tracker.start(study, store, {})
    asked = store.ask(study)
    log = tracker.run(trial_key(0), study.config(asked.params), {})
    assert tracker.flush()
    client.delete_run(runs_of(mlruns)["trial-0"].info.run_id)
    run_trial(study, store, tracker, OUTCOMES[0])
    log.end("complete")
    assert tracker.finish({}, [], "complete")
    assert len(lines(capsys)) <= 1
    assert steps_of(mlruns, runs_of(mlruns)["trial-0"]) == [1, 2, 3]


# -- files that are gone -------------------------------------------------------------------------------------------


def remove_mlflow(folder: Path) -> None:
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


@pytest.mark.slow
def test_a_database_deleted_while_the_study_runs_is_made_again_with_everything(
    study: Study, store: Store, mlruns: Path, empty_mlflow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    for outcome in OUTCOMES[:2]:
        run_trial(study, store, tracker, outcome)
    assert tracker.flush()
    remove_mlflow(mlruns)
    for outcome in OUTCOMES[2:]:
        run_trial(study, store, tracker, outcome)
    shutil.copy(empty_mlflow, mlruns / "mlflow.db")  # to make one takes seconds
    assert tracker.finish({"best_val_accuracy": 0.6}, [], "complete")
    assert any("was deleted; creating it again" in text for text in lines(capsys))
    runs = runs_of(mlruns)
    assert set(runs) == {"study", "trial-0", "trial-1", "trial-2", "trial-3"}
    assert {run.data.tags["mlflow.parentRunId"] for key, run in runs.items() if key != "study"} == {
        runs["study"].info.run_id
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", ["everything", *(pytest.param(each, marks=slow) for each in ("files", "a run", "nothing"))]
)
def test_what_a_finished_study_has_lost_in_mlflow_is_written_again_by_the_same_command(
    lost: str, line: CommandLine, empty_mlflow: Path
) -> None:
    mlruns = line.place / "mlruns"
    mlruns.mkdir()
    shutil.copy(empty_mlflow, mlruns / "mlflow.db")
    assert line.run("--trials", "1").code == 0
    shutil.rmtree(line.place / "data")  # no image is needed for it
    if lost == "everything":
        remove_mlflow(mlruns)
        drop_connections(local_uri(mlruns))  # of this process, which goes on
        shutil.copy(empty_mlflow, mlruns / "mlflow.db")
    elif lost == "files":
        shutil.rmtree(mlruns / "artifacts")
    elif lost == "a run":
        client_of(mlruns).delete_run(runs_of(mlruns)["trial-0"].info.run_id)
    again = line.run("--trials", "1")
    assert again.code == 0
    assert "Nothing is missing" in again.out
    assert again.err.count("Writing what is missing.") == (lost != "nothing"), again.err
    assert line.run("--trials", "1").err == ""
    assert main(["doctor", "tiny"]) == 0
    (report,) = mlruns.rglob("report.html")
    assert report.is_file()


# -- a folder that was moved or copied -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "copied", "moved without files"])
def test_a_clone_elsewhere_has_its_files_there(
    how: str, study: Study, tmp_path: Path, empty_mlflow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new%20one"
    (old / "mlruns").mkdir(parents=True)
    shutil.copy(empty_mlflow, old / "mlruns" / "mlflow.db")
    with open_store(study, f"sqlite:///{old}/tiny.db") as store:
        tracker = local_tracker(old / "mlruns")
        tracker.start(study, store, {})
        run_trial(study, store, tracker, Completed(value=0.6) if how == "moved without files" else FAILED)
        assert tracker.finish({}, [], "complete")
        client, run = tracker.client, tracker.parent
        model = client.create_logged_model(client.get_run(run).info.experiment_id, "tiny", source_run_id=run)
        client.create_registered_model("tiny")
        client.create_model_version("tiny", model.artifact_location, run, model_id=model.model_id)
    shutil.copytree(old, new)
    if how != "copied":
        shutil.rmtree(old)
    capsys.readouterr()
    database, artifacts = new / "mlruns" / "mlflow.db", new / "mlruns" / "artifacts"
    assert elsewhere(database, artifacts)
    with open_store(study, f"sqlite:///{new}/tiny.db".replace("%", "%25")) as store:
        tracker = local_tracker(new / "mlruns")
        tracker.start(study, store, {})
        assert len(lines(capsys)) == 1
        run_trial(study, store, tracker, FAILED)
        assert tracker.finish({}, [], "complete")
    assert lines(capsys) == []
    assert not elsewhere(database, artifacts)
    if how != "copied":
        assert not old.exists()
    with closing(sqlite3.connect(database)) as connection:
        dump = "\n".join(connection.iterdump())
    assert f"{old}/" not in dump, "not a single path of the old folder is left"
    assert len(list(artifacts.rglob("traceback.txt"))) == (1 if how == "moved without files" else 2)


def test_a_place_that_somebody_chose_stays(study: Study, store: Store, mlruns: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "big disk" / "artifacts" / "tiny"
    chosen.mkdir(parents=True)
    client_of(mlruns).create_experiment("tiny", artifact_location=chosen.as_uri())
    tracker = local_tracker(mlruns)
    tracker.start(study, store, {})
    run_trial(study, store, tracker, FAILED)
    assert tracker.finish({}, [], "complete")
    assert len(list(chosen.rglob("traceback.txt"))) == 1


# -- names of folders ----------------------------------------------------------------------------------------------

NAMES = ["x%20y", "feature%2Fx", "100%", "a?b"]
RARE = ["a#b", "a b", "a+b", "äö", "a&b", "x%3Fy", "[a]", "a%zz", "a;b", "a'b"]


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(each, marks=slow) for each in RARE)])
def test_a_study_runs_in_a_folder_of_any_name(name: str, study: Study, tmp_path: Path, empty_mlflow: Path) -> None:
    place = tmp_path / name
    (place / "mlruns").mkdir(parents=True)
    shutil.copy(empty_mlflow, place / "mlruns" / "mlflow.db")
    assert as_meant(f"sqlite:///{place}/tiny.db") in (f"sqlite:///{place}/tiny.db", sqlite_url(place / "tiny.db"))
    with open_store(study, as_meant(f"sqlite:///{place}/tiny.db")) as store:
        tracker = local_tracker(place / "mlruns")
        tracker.start(study, store, {})
        run_trial(study, store, tracker, FAILED)
        assert tracker.finish({}, [], "complete")
        assert sqlite_path(store.url) == place / "tiny.db"
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert (place / "tiny.db").is_file()
    run = runs_of(place / "mlruns")["trial-0"]
    kept = local_folder(run.info.artifact_uri)
    assert kept is not None
    assert (kept / "traceback.txt").read_text() == "Traceback"
    assert place in kept.parents
    given = tracker_at(as_meant(f"sqlite:///{place}/mlruns/mlflow.db"))
    given.connect()
    assert given.file == place / "mlruns" / "mlflow.db"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x%20y", "a?b"])
def test_every_command_works_in_a_folder_of_any_name(
    name: str, tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.faulty import CommandLine

    place = tmp_path / name
    (place / "mlruns").mkdir(parents=True)
    shutil.copy(empty_mlflow, place / "mlruns" / "mlflow.db")
    monkeypatch.chdir(place)
    line = CommandLine(place, capsys)
    arguments = ("--trials", "1", "--set", "final.publish=true")
    said = line.run(*arguments).out
    assert "became the champion" in said
    assert f"MLFLOW_TRACKING_URI={shlex.quote(local_uri(place / 'mlruns'))} mlflow models serve" in said
    assert "Nothing is missing" in line.run(*arguments).out
    assert main(["show", "tiny"]) == main(["doctor", "tiny"]) == main(["report", "tiny"]) == 0
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert {each.name for each in place.iterdir()} == {"data", "mlruns", "studies"}
    moved = tmp_path / "moved" / name
    moved.parent.mkdir()
    place.rename(moved)
    utils._artifact_repos_cache.clear()  # another process would not know where the files of a run were
    monkeypatch.chdir(moved)
    more = CommandLine(moved, capsys).run("--trials", "2", "--set", "final.publish=true")
    assert more.code == 0, more
    assert "MLflow's database was moved" in more.err
    assert main(["doctor", "tiny"]) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["moved"]
    client = client_of(moved / "mlruns")
    version = client.get_model_version_by_alias("tiny", "champion")
    kept = local_folder(client.get_model_version_download_uri("tiny", version.version))
    assert kept is not None
    assert (kept / "MLmodel").is_file()
    assert moved in kept.parents


# -- MLflow's own variables ----------------------------------------------------------------------------------------


def test_variables_that_lead_elsewhere_are_not_followed(
    study: Study, store: Store, mlruns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/a.db",
        "MLFLOW_REGISTRY_URI": f"sqlite:///{tmp_path}/b.db",
        "MLFLOW_ACTIVE_MODEL_ID": "m-0123",
        "MLFLOW_RUN_ID": "0" * 32,
        "MLFLOW_EXPERIMENT_ID": "77",
        "MLFLOW_EXPERIMENT_NAME": "another",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
        "MLFLOW_ENABLE_WORKSPACES": "true",
        "MLFLOW_WORKSPACE": "team",
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": str(tmp_path / "c"),
        "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "d"),
        "MLFLOW_READ_REPLICA_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/e.db",
    }.items():
        monkeypatch.setenv(name, value)
    before = {each.name for each in tmp_path.iterdir()}
    tracker = whole_study(study, store, mlruns)
    tracker.client.create_registered_model("tiny")
    said = lines(capsys)
    assert [text.partition(" ")[0] for text in said] == ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"]
    assert all(local_uri(mlruns) in text for text in said)
    assert {each.name for each in tmp_path.iterdir()} - {"tiny.db.queue.lock"} == before
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_ENABLE_WORKSPACES"):
        assert name not in os.environ
    client = MlflowClient(local_uri(mlruns), local_uri(mlruns))
    assert [each.name for each in client.search_registered_models()] == ["tiny"]
    assert set(runs_of(mlruns)) == {"study", "trial-0", "trial-1", "trial-2", "trial-3"}
