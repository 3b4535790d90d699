"""The final model in MLflow: registered once, checked in another process, promoted by its validation score alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model

from harness.config.study import Study
from harness.data.augment import IMAGENET, normalise
from harness.data.splits import load_split, load_test
from harness.final.model_files import CHECK_IMAGES
from harness.serving import registry as mlflow_model
from harness.serving.export import logits_of, write_program
from harness.serving.model import load_saved
from harness.serving.registry import (
    CHAMPION,
    CHECK,
    IMAGES,
    PASSED,
    PLACE,
    SCORE,
    VERSIONS,
    WEIGHTS,
    Candidate,
    candidate,
    publish,
    validation_fingerprint,
)
from harness.store.opening import open_store
from harness.store.store import Store
from harness.tracking.check import model_missing
from harness.tracking.files import lacking, local_folder
from harness.tracking.mlflow import MLflowTracker
from harness.tracking.places import local_tracker, tracker_at
from tests.conftest import make_study
from tests.faulty import Died, complete, small_study
from tests.mlflow_server import Server
from tests.patience import PATIENCE_SECONDS


@dataclass(frozen=True)
class Finished:
    study: Study
    store: Store
    wanted: Candidate


@pytest.fixture(scope="module")
def finished(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A study that was run to its end without MLflow."""
    place, study = tmp_path_factory.mktemp("finished"), small_study(image_cache)
    complete(study, place)
    with open_store(study, f"sqlite:///{place}/tiny.db") as store:
        saved = load_saved(study, store, place / "tiny.model")
        yield Finished(study, store, candidate("tiny", store, saved))


def told(finished: Finished, tracker: MLflowTracker) -> MLflowTracker:
    """The study's runs in MLflow, as they are when the model's turn comes."""
    tracker.start(finished.study, finished.store, {})
    assert tracker.finish({}, [], "complete")
    return tracker


@pytest.fixture
def tracker(finished: Finished, mlruns: Path) -> MLflowTracker:
    return told(finished, local_tracker(mlruns))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on the check, which takes seconds."""
    monkeypatch.setattr(mlflow_model, "_wrong", lambda *arguments: None)


def models(client: MlflowClient) -> list[Any]:
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return list(client.search_logged_models([experiment.experiment_id]))


def versions(client: MlflowClient) -> list[Any]:
    """Oldest first."""
    return sorted(client.search_model_versions("name = 'tiny'"), key=lambda each: int(each.version))


def registered(client: MlflowClient) -> list[tuple[str, str]]:
    """The versions that the only logged model's page shows; a server writes their numbers as numbers."""
    (model,) = models(client)
    return [(each["name"], str(each["version"])) for each in json.loads(model.tags[VERSIONS])]


def measured(client: MlflowClient) -> set[str]:
    """The names of what the only logged model's page shows as its results."""
    (model,) = models(client)
    assert len(model.metrics) == len({each.key for each in model.metrics})
    return {each.key for each in model.metrics}


def champion(client: MlflowClient) -> str | None:
    number = client.get_registered_model("tiny").aliases.get(CHAMPION)
    return None if number is None else str(number)


def retagged(wanted: Candidate, **tags: str) -> Candidate:
    """Another model of the same name: other weights by its tags, and these."""
    names = {"weights": WEIGHTS, "score": SCORE, "images": IMAGES}
    return dataclasses.replace(
        wanted, tags={**wanted.tags, WEIGHTS: "other", **{names[name]: text for name, text in tags.items()}}
    )


# -- what is there afterwards --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_is_logged_registered_checked_and_promoted(
    finished: Finished,
    tracker: MLflowTracker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert publish(tracker, finished.wanted)
    assert not (tmp_path / "mlflow.db").exists(), "nothing goes to MLflow's default database"
    assert capsys.readouterr().out.splitlines() == [
        "model     tiny version 1 in MLflow: checked, became the champion",
        f"serve     MLFLOW_TRACKING_URI={tracker.uri} mlflow models serve -m models:/tiny@champion --env-manager local",
    ]
    (version,), (model,) = versions(tracker.client), models(tracker.client)
    assert (version.source, version.run_id, version.tags[CHECK]) == (model.artifact_location, tracker.parent, PASSED)
    assert champion(tracker.client) == "1"
    assert version.tags[SCORE] == repr(finished.wanted.saved.description["trial_validation_accuracy"])
    assert [each.model_id for each in tracker.client.get_run(tracker.parent).outputs.model_outputs] == [model.model_id]
    assert (model.name, registered(tracker.client)) == ("tiny", [("tiny", "1")])
    first = finished.store.attributes()["final"]["per_seed"][0]
    shown = {each.key: each.value for each in model.metrics}
    assert shown == {"test_accuracy": first["accuracy"], "test_loss": first["loss"]}, "the model's, not the mean"
    seed = next(run for key, run in tracker.known_runs().items() if key.startswith("final-seed-0"))
    assert len(tracker.client.get_metric_history(seed.info.run_id, "test_accuracy")) == 1
    assert publish(tracker, finished.wanted)
    assert len(versions(tracker.client)) == len(models(tracker.client)) == 1, "the same study registers nothing twice"


@pytest.mark.slow
def test_it_loads_by_its_alias_without_pickles_and_with_any_batch_size(
    finished: Finished, tracker: MLflowTracker, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    assert publish(tracker, finished.wanted)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/tiny@{CHAMPION}")
    for count in (1, 3):
        images = finished.wanted.images[:count]
        assert numpy.abs(loaded.predict(images.numpy()) - logits_of(finished.wanted.saved, images)).max() < 1e-4
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert loaded.metadata.signature.outputs.inputs[0].shape == (-1, 16)
    assert loaded.metadata.metadata["classes"] == list(finished.wanted.saved.classes)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/tiny@{CHAMPION}"))
    assert (folder / "input_example.json").is_file()
    kinds = {each.suffix for each in folder.rglob("*") if each.is_file()}
    assert not kinds & {".pkl", ".pickle", ".pth", ".pt"}


@pytest.mark.slow
def test_mlflow_gets_the_program_that_was_checked_unless_it_is_damaged(
    finished: Finished, tracker: MLflowTracker, unchecked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    saved = dataclasses.replace(finished.wanted.saved, program=tmp_path / "model.pt2")
    write_program(saved, tmp_path / "model.pt2")
    with monkeypatch.context() as patch:
        patch.setattr("harness.serving.export._program", lambda *arguments: pytest.fail("exported again"))
        assert publish(tracker, dataclasses.replace(finished.wanted, saved=saved))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/tiny@{CHAMPION}"))
    content = (folder / "data" / "model.pt2").read_bytes()
    assert content == (tmp_path / "model.pt2").read_bytes()
    assert Model.load(folder).model_size_bytes >= len(content)
    place = content.index(b"weight_0") + 200
    damaged = content[:place] + bytes(100) + content[place + 100 :]
    (tmp_path / "model.pt2").write_bytes(damaged)
    write_program(saved, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_bytes() != damaged


# -- killed anywhere -----------------------------------------------------------------------------------------------

STEPS = (
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "finalize_logged_model",
    "log_batch",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_model_version_tag",
    "set_registered_model_alias",
)


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_the_next_run_completes_it(
    finished: Finished, tracker: MLflowTracker, unchecked: None, step: str, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = getattr(tracker.client, step)

    def dies(*arguments: Any, **named: Any) -> None:
        if done:
            genuine(*arguments, **named)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, step, dies)
        with pytest.raises(Died):
            publish(tracker, finished.wanted)
    for _ in range(2):
        assert publish(tracker, finished.wanted)
        assert [each.status for each in models(tracker.client)] == ["READY"]
        assert [each.tags[CHECK] for each in versions(tracker.client)] == [PASSED]
        assert champion(tracker.client) == "1"
        assert registered(tracker.client) == [("tiny", "1")]
        assert measured(tracker.client) == {"test_accuracy", "test_loss"}


# -- the check -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_with_other_logits_is_kept_tagged_and_not_promoted(
    finished: Finished, tracker: MLflowTracker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = finished.wanted.saved.config.backbone.build(16, 16).eval()
    genuine = mlflow_model._write_model

    def another(folder: Path, logged: Any, run: Any, saved: Any) -> None:
        genuine(folder, logged, run, dataclasses.replace(saved, model=model))

    monkeypatch.setattr(mlflow_model, "_write_model", another)
    for _ in range(2):
        assert publish(tracker, finished.wanted)
        assert "not promoted, because in a new process it gives logits that differ by" in capsys.readouterr().out
        (version,) = versions(tracker.client)
        assert "from the model's" in version.tags[CHECK]
        assert champion(tracker.client) is None


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_kept_tagged_and_not_promoted(
    finished: Finished, tracker: MLflowTracker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = mlflow_model._write_model

    def broken(folder: Path, *others: Any) -> None:
        genuine(folder, *others)
        program = folder / "data" / "model.pt2"
        program.write_bytes(program.read_bytes()[:-1000])

    monkeypatch.setattr(mlflow_model, "_write_model", broken)
    assert publish(tracker, finished.wanted)
    assert "cannot be loaded (" in capsys.readouterr().out
    assert versions(tracker.client)[0].tags[CHECK].startswith("cannot be loaded (")
    assert champion(tracker.client) is None


# -- who is the champion -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("score", "holder"), [("0.9", "2"), ("0.5", "1"), ("0.1", "1")])
def test_the_better_validation_score_wins_and_the_holder_keeps_a_tie(
    finished: Finished,
    tracker: MLflowTracker,
    unchecked: None,
    score: str,
    holder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert publish(tracker, retagged(finished.wanted, weights="first", score="0.5"))
    assert publish(tracker, retagged(finished.wanted, weights="second", score=score))
    assert champion(tracker.client) == holder
    said = capsys.readouterr().out
    if holder == "1":
        assert "version 1 stays the champion, with 50.00 % on the validation images against" in said
    assert len(versions(tracker.client)) == 2


@pytest.mark.slow
def test_a_champion_on_other_validation_images_stays_and_the_user_is_told(
    finished: Finished, tracker: MLflowTracker, unchecked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(tracker, retagged(finished.wanted, weights="first", score="0.5", images="others"))
    assert publish(tracker, retagged(finished.wanted, weights="second", score="0.9"))
    assert champion(tracker.client) == "1"
    assert "version 1 stays the champion, because its validation images differ" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_version_is_said_to_be_stays_true_when_the_next_one_takes_over(
    finished: Finished, tracker: MLflowTracker, unchecked: None
) -> None:
    assert publish(tracker, retagged(finished.wanted, weights="first", score="0.5"))
    assert publish(tracker, retagged(finished.wanted, weights="second", score="0.9"))
    assert [each.tags[PLACE] for each in versions(tracker.client)] == ["checked, became the champion"] * 2


@pytest.mark.slow
def test_an_alias_that_a_person_has_moved_is_left_alone(
    finished: Finished, tracker: MLflowTracker, unchecked: None
) -> None:
    assert publish(tracker, retagged(finished.wanted, weights="first", score="0.5"))
    second = retagged(finished.wanted, weights="second", score="0.9")
    assert publish(tracker, second)
    tracker.client.set_registered_model_alias("tiny", CHAMPION, "1")
    assert publish(tracker, second)
    assert champion(tracker.client) == "1"


def test_the_test_images_have_no_say(finished: Finished, tracker: MLflowTracker, unchecked: None) -> None:
    """Not in the promotion: what is compared is in the tags."""
    assert not any("test" in tag for tag in finished.wanted.tags)


def test_the_check_takes_the_test_images_that_the_opening_left_and_opens_nothing(
    finished: Finished,
) -> None:
    data = finished.wanted.saved.config.data
    left = normalise(load_test(data, IMAGENET).images)
    assert len(finished.wanted.images) == CHECK_IMAGES
    assert all((left == image).flatten(1).all(1).any() for image in finished.wanted.images)

    lost = dataclasses.replace(finished.wanted.saved, check_images=None)
    shown = normalise(load_split(data, IMAGENET, "val").images)
    for image in candidate("tiny", finished.store, lost).images:
        assert (shown == image).flatten(1).all(1).any()


@pytest.mark.slow
def test_the_fingerprint_is_of_the_images_not_of_their_side(image_cache: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        data = dataclasses.replace(make_study(image_cache).train.data, **changes)
        return validation_fingerprint(data, load_split(data, IMAGENET, "val"))

    assert fingerprint() == fingerprint(image_size=32) == fingerprint(train_per_class=3)
    assert len({fingerprint(), fingerprint(val_per_class=3), fingerprint(seed=1), fingerprint(limit=16)}) == 4


def test_a_version_that_was_deleted_is_missing(finished: Finished, tracker: MLflowTracker, unchecked: None) -> None:
    assert publish(tracker, finished.wanted)
    assert tracker.file is not None
    look = functools.partial(lacking, tracker.file, finished.store.uid, ["study"], [], "tiny")
    assert look() is None
    tracker.client.delete_registered_model_alias("tiny", CHAMPION)
    tracker.client.delete_model_version("tiny", "1")
    assert look() == f"MLflow's registry in {tracker.file} lacks the study's model."


# -- a server, and MLflow away -------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, empty_mlflow: Path) -> Iterator[Server]:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_on_a_server_that_was_away_the_next_run_registers_the_model(
    finished: Finished, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = told(finished, tracker_at(server.uri))
    server.kill()
    assert not publish(tracker, finished.wanted)
    assert f"MLflow at {server.uri} did not accept the model" in capsys.readouterr().err
    server.start()
    assert publish(tracker, finished.wanted)
    assert publish(tracker, finished.wanted)
    assert [each.tags[CHECK] for each in versions(tracker.client)] == [PASSED]
    assert champion(tracker.client) == "1"
    assert len(models(tracker.client)) == 1
    assert registered(tracker.client) == [("tiny", "1")]


@pytest.mark.slow
def test_mlflow_serves_the_champion(finished: Finished, tracker: MLflowTracker, unchecked: None) -> None:
    assert publish(tracker, finished.wanted)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/tiny@{CHAMPION}"]
    serving = subprocess.Popen(
        [*command, "--env-manager", "local", "--port", str(port)],
        env=os.environ | {"MLFLOW_TRACKING_URI": tracker.uri, "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        answer = ask(port, {"inputs": finished.wanted.images.tolist()}, serving)
    finally:
        os.killpg(serving.pid, signal.SIGKILL)
        serving.wait()
    wanted = logits_of(finished.wanted.saved, finished.wanted.images)
    assert numpy.abs(numpy.array(answer["predictions"]) - wanted).max() < 1e-4


def ask(port: int, question: dict[str, Any], serving: subprocess.Popen[bytes]) -> Any:
    """The answer of a server that may still be starting."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        except OSError:
            pass
        assert serving.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server does not answer"
        time.sleep(0.2)
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(question).encode(), headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not through the environment's proxy
    with direct.open(request, timeout=PATIENCE_SECONDS) as answer:
        return json.load(answer)


# -- the whole command ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_registers_the_model_once(
    image_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first run without publishing stands for a study from before there was a registry."""
    from harness.cli.commands import main

    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tiny.py").write_text(
        f"from tests.faulty import small_study\n\nSTUDY = small_study({str(image_cache)!r})\n"
    )
    monkeypatch.chdir(tmp_path)
    run = ["run", "--study", "tiny", "--trials", "2"]
    assert main(run) == 0
    assert "model " not in capsys.readouterr().out
    assert main([*run, "--set", "final.publish=true"]) == 0
    said = capsys.readouterr().out
    assert "tiny version 1 in MLflow: checked, became the champion" in said
    assert "The test set was opened once" in said
    assert main([*run, "--set", "final.publish=true"]) == 0
    assert "Nothing is missing" in capsys.readouterr().out
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert (len(versions(client)), len(models(client)), champion(client)) == (1, 1, "1")
    assert (tmp_path / "studies" / "tiny.model" / "model.pt2").is_file()
    assert "torch.export.load" in (tmp_path / "studies" / "tiny.model" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_files_of_a_logged_model_that_were_deleted_are_written_again(
    finished: Finished, tracker: MLflowTracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    tracker.connect()
    assert publish(tracker, finished.wanted)
    assert f"MLFLOW_REGISTRY_URI={tracker.uri} mlflow models serve -m models:/tiny@champion" in capsys.readouterr().out
    (model,) = models(tracker.client)
    place = local_folder(model.artifact_location)
    assert place is not None
    assert not model_missing(tracker, "tiny")
    shutil.rmtree(place)
    assert model_missing(tracker, "tiny")
    assert publish(tracker, finished.wanted)
    assert (place / "MLmodel").is_file()
    assert len(models(tracker.client)) == len(versions(tracker.client)) == 1
    tracker.client.delete_registered_model("tiny")
    assert model_missing(tracker, "tiny")
    assert publish(tracker, finished.wanted)
    assert not model_missing(tracker, "tiny")
