"""The door for programs: what the command line does, a program can do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.api import Model, _command
from harness.base.errors import InputError
from harness.cli.commands import main
from harness.config.events import EpochEnded, Event, TrialEnded
from harness.config.study import Study
from harness.tracking.library import set_aside, variables_back
from harness.training import interrupt
from tests.conftest import PROJECT
from tests.small import small_study, study_in


def test_every_public_name_is_there_and_nothing_large_is_imported_for_it() -> None:
    code = "\n".join(
        [
            "import sys, harness",
            "print(sys.modules.keys() & {'torch', 'optuna', 'numpy'}, set(harness.__all__) <= set(dir(harness)))",
            "[getattr(harness, name) for name in harness.__all__]",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set() True"), done.stderr


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        harness.nothing  # noqa: B018


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_study_of_a_program_is_run_once_and_says_all_that_the_commands_say(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[Event] = []
    result = harness.run(study, trials=3, on_event=events.append, progress=False)
    assert capsys.readouterr().out == ""
    assert sum(isinstance(each, TrialEnded) for each in events) == 3
    assert result.final is not None
    assert result.best is not None
    assert result.final.trial == result.best.number
    assert result.best.config == study.config(result.best.params)
    assert result.trials()["number"].tolist() == [0, 1, 2]
    curves = result.curves()
    assert len(curves) == sum(result.trials()["epochs"])
    assert {"trial", "epoch", "val_accuracy", "train_loss", "lr"} <= set(curves.columns)
    page = result.report
    assert page.path.is_file()
    assert page.path.as_uri() in page._repr_html_()
    assert "Test accuracy" in page._repr_html_()
    assert result.replay()
    assert result.doctor()
    assert all(each.same for each in result.reproduce(result.best.number))
    (guesses,) = result.model.predict([_drawn()], top=2)
    assert len(guesses) == 2
    assert guesses[0].probability >= guesses[1].probability

    events.clear()
    again = harness.run(study, trials=3, on_event=events.append)
    assert "Nothing is missing" in capsys.readouterr().out
    assert events == []
    assert again.digest() == result.digest() == harness.open(study).digest()
    (row,) = json.loads(_printed(capsys, "list", "--json"))
    assert (row["study"], row["state"], row["finished"]) == (study.name, "finished", 3)
    assert row["test"] == result.final.accuracy


def _drawn() -> Any:
    from harness.garden.drawing import draw
    from harness.garden.species import DEMO_SPECIES

    return draw(DEMO_SPECIES[0], seed=1, size=80)


def _printed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_workers_do_not_run_the_program_again(tmp_path: Path, image_cache: Path) -> None:
    study_in(tmp_path, image_cache)
    program = tmp_path / "program.py"
    program.write_text(
        "import harness\n"
        "print('the program')\n"
        "result = harness.run('tiny', trials=2, workers=2, progress=False, on_event=lambda event: None)\n"
        "print(len(result.trials()))\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(PROJECT)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split("\n")) == (0, ["the program", "2", ""]), done.stderr


def test_one_where_a_list_is_meant_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"write set=\['epochs=1'\]"):
        harness.run(study, set="epochs=1", home=tmp_path)
    with pytest.raises(InputError, match=r"write set=\['epochs=1', 'batch_size=8'\]"):
        harness.run(study, set={"epochs": 1, "batch_size": 8}, home=tmp_path)
    with pytest.raises(InputError, match=r"There is no folder .*nowhere; create it first"):
        harness.run(study, home=tmp_path / "nowhere")
    for top in (0, -1, "2", True):
        with pytest.raises(InputError, match="top is a number of classes from 1, not "):
            Model(None).predict([], top=top)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="predict takes files or Pillow images, not 3"):
        Model(None).predict([3])  # type: ignore[arg-type, list-item]
    with pytest.raises(InputError, match="put the photograph into brackets"):
        Model(None).predict("photo.jpg")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"There is no file nowhere\.jpg"):
        Model(None).predict(["nowhere.jpg"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reopen_test": True}, "reopen_test must be .*, not True"),
        ({"engine": "foo"}, "engine must be processes or ray, not 'foo'"),
        ({"set": [1]}, "set must be "),
    ],
)
def test_options_of_another_type_are_refused(options: Any, said: str, study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        harness.run(study, home=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_second_thread_is_refused_while_a_study_runs(study: Study, tmp_path: Path) -> None:
    found: list[str] = []

    def run() -> None:
        try:
            harness.run(study, home=tmp_path)
        except InputError as error:
            found.append(str(error))

    with interrupt.handled(), interrupt.handled():  # an event of a study may run another one
        other = threading.Thread(target=run)
        other.start()
        other.join()
    assert found == ["This process runs a study in another thread; wait for its end, or use another process."]
    assert list(tmp_path.iterdir()) == []


def test_mlflow_does_not_write_into_the_studys_database(study: Study, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/all.db"
    with pytest.raises(InputError, match=r"all\.db is the study's own database; give MLflow another file"):
        harness.run(study, home=tmp_path, storage=url, tracking_uri=url)
    assert not (tmp_path / "all.db").exists()


def test_variables_of_mlflow_are_back_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    with variables_back():
        set_aside("sqlite:///other.db")
        assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///mine.db"


def test_what_cannot_be_called_is_refused_before_anything_is_written(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on_event must be a function"):
        harness.run(study, on_event="runs.csv", home=tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_request_to_stop_leaves_a_checkpoint_and_the_handlers_as_they_were(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        harness.run(study, trials=2, on_event=stop, progress=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert list((tmp_path / "studies").glob("*.checkpoints/*.safetensors"))
    result = harness.run(study, trials=2, progress=False)
    straight = harness.run(study, trials=2, progress=False, home=tmp_path_factory.mktemp("straight"))
    assert result.digest() == straight.digest()


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_study_runs_in_a_thread(study: Study, tmp_path: Path) -> None:
    found: list[Any] = []
    run = threading.Thread(target=lambda: found.append(harness.run(study, trials=1, progress=False, home=tmp_path)))
    run.start()
    run.join()
    assert found[0].final is not None


def test_what_cannot_be_run_is_wrong_input(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Workers load a study from its file"):
        harness.run(study, workers=2, home=tmp_path)
    with pytest.raises(InputError, match="no option 'epochs'; choose from"):
        harness.run(study, epochs=3, home=tmp_path)
    with pytest.raises(InputError, match="has no results yet"):
        harness.open(study, home=tmp_path)
    with pytest.raises(InputError, match="There is no study 'nothing'"):
        harness.open("nothing", home=tmp_path)


def test_the_command_that_is_kept_has_no_password_and_nothing_that_holds_once() -> None:
    url = "postgresql+psycopg://flora:secret@db.example/flowers"
    given = {"trials": 1, "storage": url, "fresh": True, "reopen_test": "why", "device": None}
    said = _command("demo", given)
    assert said == f"harness.run('demo', trials=1, storage='{url.replace('secret', '***')}')"


def test_handlers_that_are_there_already_stay() -> None:
    interrupt.install()
    with interrupt.handled():
        interrupt._State.requested = True
    assert interrupt.requested()
    assert signal.getsignal(signal.SIGINT) is interrupt._handle


def test_a_request_to_stop_ends_with_what_it_stopped() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.handled():
        signal.raise_signal(signal.SIGINT)
    with interrupt.undivided():  # as around each batch, whoever trains
        pass


def test_the_list_names_studies_that_cannot_be_read(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "studies" / "broken.py").write_text("STUDY = 1 / 0\n")
    assert main(["list"]) == 0
    said = capsys.readouterr()
    assert "demo" in said.out
    assert "not begun" in said.out
    assert "broken" in said.out
    assert "ZeroDivisionError" in said.err
    assert {"broken", "demo", "flowers102"} <= set(harness.studies(workspace)["study"])
    (workspace / "studies" / "Thumbs.db").write_text("another program's")
    damaged = workspace / "studies" / "damaged.db"
    with sqlite3.connect(damaged) as connection:
        connection.executescript("CREATE TABLE alembic_version (x); CREATE TABLE studies (x); CREATE TABLE trials (x);")
    damaged.write_bytes(damaged.read_bytes()[:4096] + b"x" * 8192)
    states = harness.studies(workspace).set_index("study")["state"]
    assert (states["Thumbs"], states["damaged"], states["demo"]) == ("cannot be read", "cannot be read", "not begun")


def test_the_list_of_an_empty_folder_has_columns(tmp_path: Path) -> None:
    assert {"study", "state", "best"} <= set(harness.studies(tmp_path).columns)


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_copy_of_a_database_is_listed_and_what_is_refused_leaves_no_folder(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        harness.run(study, trials=0, home=tmp_path)
    assert not (tmp_path / "studies").exists()
    harness.run(study, trials=1, home=tmp_path, progress=False)
    shutil.copy(tmp_path / "studies" / f"{study.name}.db", tmp_path / "studies" / "copy.db")
    listed = harness.studies(tmp_path).set_index("study")
    assert listed.state["copy"] == listed.state[study.name]
