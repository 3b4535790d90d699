"""Studies that other machines and other studies have a part in: whose model lies there, and what MLflow ends with."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.base.errors import InputError
from harness.base.keys import trial_key
from harness.cli.commands import main
from harness.config.events import Completed, TrialEnded
from harness.config.study import Study
from harness.final.model_files import check_folder
from harness.final.retrain import Context, threads_of
from harness.final.test_set import final_run
from harness.store.leases import Leases
from harness.store.opening import open_store, read_store
from harness.store.store import Store
from harness.study.stages import run
from harness.tracking.expected import trial_tags
from harness.tracking.mlflow import MLflowTracker
from harness.tracking.places import local_tracker
from harness.training.step import Runtime
from tests.analytic import epoch_result
from tests.faulty import CommandLine, one_sentence, small_study
from tests.final.test_test_set import better_trial, context_of
from tests.refusal import tree
from tests.study.test_doctor import DESCRIPTION

pytestmark = pytest.mark.usefixtures("mlruns")


@pytest.fixture
def model(line: CommandLine) -> Path:
    return line.place / "studies" / "tiny.model"


@pytest.fixture
def two_threads() -> Iterator[None]:
    """With another number of threads the last bits of a training are others."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    assert torch.get_num_threads() == before + 1, "left as it was found"
    torch.set_num_threads(before)


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def url(request: pytest.FixtureRequest, line: CommandLine) -> str:
    if request.param == "SQLite":
        return f"sqlite:///{line.place}/studies/tiny.db"
    return str(request.getfixturevalue("database"))


def doctor(url: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["doctor", "tiny", "--storage", url, *more])
    said = capsys.readouterr()
    return code, said.out + said.err


# -- a model that is made again ------------------------------------------------------------------------------------


def lose(model: Path) -> None:
    for name in ("model.safetensors", "model.json"):  # but not the test images, which are not looked at again
        (model / name).unlink()


def begun_with_one_thread(line: CommandLine, url: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert line.run("--storage", url, "--trials", "1").code == 0
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_a_lost_model_is_made_again_with_the_threads_and_so_the_bits_of_the_tested_one(
    url: str, line: CommandLine, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_with_one_thread(line, url)
    with read_store("tiny", url) as store:
        (environment,) = store.attributes()["final"]["per_seed"][0]["environments"]
    assert environment["threads"] == "1"
    assert {"torch", "device", "commit"} <= environment.keys()
    before = (model / "model.safetensors").read_bytes()
    lose(model)
    ended = line.run("--storage", url, "--trials", "1")
    assert ended.code == 0, ended.err
    assert "retraining its seed" in ended.err
    assert "Since the last trial" not in ended.err, "no trial is trained"
    assert (model / "model.safetensors").read_bytes() == before
    assert json.loads((model / "model.json").read_text())["weights"]["tested"] is True
    assert doctor(url, capsys)[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_a_model_that_cannot_be_made_to_the_same_bits_says_so_and_is_used(
    url: str, line: CommandLine, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun_with_one_thread(line, url)
    with open_store(small_study("data/cache").located(line.place, None, None), url) as store:
        final = store.attributes().get("final")
        final["per_seed"][0]["environments"][0]["threads"] = "2"  # as if another processor were this one
        store.set_attribute("final", final)
    kept = line.place / "kept"
    shutil.copytree(model, kept)
    lose(model)
    ended = line.run("--storage", url, "--trials", "1")
    assert ended.code == 0, ended.err
    said = [each for each in ended.err.splitlines() if "its weights differ from the tested ones" in each]
    assert len(said) == 1, ended.err
    assert "copy tiny.model from the machine that trained it first" in said[0]
    described = json.loads((model / "model.json").read_text())
    assert described["weights"]["tested"] is False
    assert described["weights"]["sha256"] != final["per_seed"][0]["weights"]
    assert "were retrained from that seed after the tested ones were lost" in (model / "README.md").read_text()
    assert "Nothing is missing" in line.run("--storage", url, "--trials", "1").out
    code, text = doctor(url, capsys)
    assert code == 0, text
    assert f"the model in {model} was retrained after the tested one was lost, and shows" in text
    assert main(["export", "tiny", "--storage", url, "--onnx", str(line.place / "x.onnx")]) == 0
    in_mlflow = [json.loads(each.read_text()) for each in (line.place / "mlruns").rglob("model.json")]
    assert [each["weights"]["tested"] for each in in_mlflow] == [True], "MLflow has the tested one"

    shutil.rmtree(model)
    kept.rename(model)  # the tested one is welcome
    assert line.run("--storage", url, "--trials", "1").code == 0
    assert json.loads((model / "model.json").read_text())["weights"]["tested"] is True
    code, text = doctor(url, capsys)
    assert (code, "retrained" in text) == (0, False), text


@pytest.mark.slow
def test_threads_that_are_not_known_or_changed_are_left_alone() -> None:
    before = torch.get_num_threads()
    for environments in ([], [{"torch": "2"}], [{"threads": "7"}, {"threads": "9"}]):
        with threads_of(environments):
            assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_changed_threads_are_named_when_trials_are_trained(line: CommandLine) -> None:
    begun_with_one_thread(line, f"sqlite:///{line.place}/studies/tiny.db")
    ended = line.run("--trials", "2")
    assert f"Since the last trial, threads was 1, is {torch.get_num_threads()}" in ended.err


# -- what is left of a trial ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_that_another_machine_ended_leaves_no_checkpoint_here(study: Study, tmp_path: Path) -> None:
    """It was begun here, and taken up by one that does not see this folder."""
    runtime = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)
    left = tmp_path / "checkpoints" / "trial-0.safetensors"
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        context = Context(study=study, store=store, runtime=runtime, checkpoints=left.parent)
        for event in run(context, tmp_path / "model"):
            if isinstance(event, TrialEnded) and event.number == 0:
                left.parent.mkdir(exist_ok=True)
                left.write_bytes(b"half of a training")
    assert not left.exists()


# -- whose a model is ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_study_does_not_overwrite_the_model_of_the_first(
    url: str, database: str, line: CommandLine, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line.run("--storage", url, "--trials", "1").code == 0
    before = tree(line.place)
    other = database if url != database else f"sqlite:///{line.place}/studies/tiny.db"
    ended = line.run("--storage", other, "--trials", "1")
    assert ended.code == 2
    assert one_sentence(ended.err), ended.err
    assert f"{model} holds the model of another study than " in ended.err
    assert "move that folder away, or give" in ended.err
    assert tree(line.place) == before
    model.rename(line.place / "first")
    assert line.run("--storage", other, "--trials", "1").code == 0
    refused = line.run("--storage", url, "--trials", "2")
    assert (refused.code, one_sentence(refused.err)) == (2, True)
    code, text = doctor(url, capsys)
    assert code == 1
    assert "holds the model of another study" in text
    assert doctor(url, capsys, "--fix")[0] == 1
    assert (model / "model.json").is_file(), "it is not this study's to remove"
    assert main(["export", "tiny", "--storage", url, "--onnx", str(line.place / "x.onnx")]) == 2
    assert main(["doctor", "tiny", "--storage", other]) == 0


@pytest.mark.slow
def test_two_sqlite_files_with_one_stem_have_a_folder_each(line: CommandLine) -> None:
    studies = line.place / "studies"
    assert line.run("--trials", "1").code == 0
    first = tree(studies / "tiny.model")
    other = ("--storage", f"sqlite:///{studies}/tiny.sqlite3", "--trials", "1")
    ended = line.run(*other)
    assert ended.code == 0, ended.err
    assert tree(studies / "tiny.model") == first
    description = json.loads((studies / "tiny.sqlite3.model" / "model.json").read_text())
    assert description["study_uid"] != json.loads((studies / "tiny.model" / "model.json").read_text())["study_uid"]
    again = line.run(*other, "--fresh")
    assert again.code == 0, again.err
    assert tree(studies / "tiny.model") == first


@pytest.mark.slow
def test_a_model_that_another_study_has_left_in_the_meantime_stays(tmp_path: Path, image_cache: Path) -> None:
    study = small_study(image_cache)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(DESCRIPTION | {"study_uid": "another"}))
    before = tree(folder)
    with open_store(study, f"sqlite:///{tmp_path}/tiny.db") as store:
        better_trial(study, store)
        with pytest.raises(InputError, match="holds the model of another study"):
            list(final_run(context_of(study, store, tmp_path), folder))
        assert store.ledger() == []
        check_folder(tmp_path / "none", store.url, store.attributes().get("uid"))
    assert tree(folder) == before


# -- a trial that another process begins anew ----------------------------------------------------------------------


def tell(store: Store, tracker: MLflowTracker, losses: list[float], dies: bool) -> None:
    study = small_study("cache")
    asked = store.ask(study)
    log = tracker.run(trial_key(asked.number), study.config(asked.params), trial_tags(study, asked.number))
    results = [epoch_result(epoch, 0.1 * epoch, loss) for epoch, loss in enumerate(losses, 1)]
    for result in results:
        assert result.val is not None
        store.report(asked, result.epoch, result.val.accuracy)
        log.epoch(result)
    if not dies:
        store.tell(asked, Completed(value=0.3), results, seconds=1.0)
        log.end("complete")


@pytest.mark.slow
def test_mlflow_ends_with_the_epochs_of_whoever_ended_the_trial(
    line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first process died with epochs 1 and 2 told, and its checkpoint with it; the other has other last bits."""
    (line.place / "studies" / "tiny.py").write_text(
        "from tests.faulty import small_study\n\nSTUDY = small_study('c')\n"
    )
    study, url = small_study("c").located(line.place, None, None), f"sqlite:///{line.place}/studies/tiny.db"
    for losses, dies in (([1.5, 1.2], True), ([1.5 + 1e-12, 1.2 - 1e-12, 1.1], False)):
        with open_store(study, url) as store:
            tracker = local_tracker(line.place / "mlruns")
            tracker.start(study, store, {})
            tell(store, tracker, losses, dies)
            assert tracker.flush()
            if not dies:
                assert tracker.finish({}, [], "complete")
            (run,) = [each for each in tracker.all_runs() if each.data.tags["harness.key"] == "trial-0"]
            latest = dict(tracker.history(run.info.run_id, "train_loss"))
    assert latest == {1: 1.5 + 1e-12, 2: 1.2 - 1e-12, 3: 1.1}
    assert run.data.metrics["train_loss"] == 1.1
    code, text = doctor(url, capsys)
    assert code == 0, text


# -- who is at what ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_trial_is_named_with_its_own_process(
    database: str, line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    (line.place / "studies" / "tiny.py").write_text(
        "from tests.faulty import small_study\n\nSTUDY = small_study('c')\n"
    )
    study = small_study("c").located(line.place, None, None)
    here = f"process {os.getpid()} on {socket.gethostname()}"
    with open_store(study, database) as store:
        elsewhere, *gone = (store.of(f"gpu-7/-/{pid} abcd") for pid in (77, 78, 79))
        for each in (store, elsewhere, *gone):
            each.ask(study)
        for number, each in enumerate(gone, 2):
            each.leases.release(trial_key(number))
        code, text = doctor(database, capsys)
        assert code == 0, text
        assert (
            f"; trial 0 is running in {here}; trial 1 is running in process 77 on gpu-7; trials 2 and 3 resume" in text
        )
        code, text = doctor(database, capsys, "--fix")
        assert code == 2
        assert "'tiny' is being run by processes " in text
        assert isinstance(elsewhere.leases, Leases)
        elsewhere.leases.release(trial_key(1))
        _, text = doctor(database, capsys, "--fix")
        assert f"is being run by {here}; wait" in text
    code, text = doctor(database, capsys)
    assert "; trials 0, 1, 2 and 3 resume when the study does." in text
