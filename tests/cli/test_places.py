"""Commands other than `run`, and the databases that all take: wrong input is refused, and nothing is written."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from harness.cli.commands import main
from harness.config.find import PROJECT, find
from harness.store.opening import open_store
from tests.analytic import Died, run_analytic
from tests.refusal import assert_refused

pytestmark = pytest.mark.usefixtures("offline")

Preparation = Callable[[Path, Path], None]


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a demo that began on CUDA: two finished trials, and one that was interrupted."""
    file = tmp_path_factory.mktemp("begun") / "demo.db"
    study = find(str(PROJECT / "studies" / "demo.py")).study
    with open_store(study, f"sqlite:///{file}") as store:
        store.set_attribute("runtime", {"device": "cuda", "precision": "fp32", "channels_last": True})
        with pytest.raises(Died):
            run_analytic(study, store, 3, stop_after=(2, 1, "report"))
    return file


def as_begun(home: Path, database: Path) -> None:
    shutil.copy(database, home / "studies" / "demo.db")


def empty_database(home: Path, database: Path) -> None:
    (home / "studies" / "demo.db").touch()


def half_a_database(home: Path, database: Path) -> None:
    (home / "studies" / "demo.db").write_bytes(database.read_bytes()[:5000])


def recipes(home: Path, database: Path) -> None:
    as_begun(home, database)
    with contextlib.closing(sqlite3.connect(home / "other.db")) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()


def anothers_study(home: Path, database: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{home / 'other.db'}")
    optuna.create_study(study_name="demo", storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    storage.engine.dispose()


def report_that_is_a_file(home: Path, database: Path) -> None:
    as_begun(home, database)
    (home / "page").write_text("mine")


def changed_definition(home: Path, database: Path) -> None:
    as_begun(home, database)
    file = home / "studies" / "demo.py"
    file.write_text(file.read_text().replace("Float(0.0, 0.6)", "Float(0.0, 0.7)"))


POSTGRES = "postgresql://flora:secret@127.0.0.1:1/studies"
REFUSED = ["Connection refused", "that the server is running", ":***@"]
OTHER = "sqlite:///other.db"
NEVER = ["'demo' has no results yet", "--study demo"]
ROWS: dict[str, tuple[Preparation | None, list[str], list[str]]] = {
    # a study that never ran, or another's
    "show before run": (None, ["show", "demo"], NEVER),
    "show as JSON before run": (None, ["show", "demo", "--json"], NEVER),
    "digest before run": (None, ["show", "demo", "--digest"], NEVER),
    "report before run": (None, ["report", "demo"], NEVER),
    "reproduce before run": (None, ["reproduce", "demo", "0"], NEVER),
    "doctor before run": (None, ["doctor", "demo"], NEVER),
    "doctor that mends before run": (None, ["doctor", "demo", "--fix"], NEVER),
    "show of an empty database": (empty_database, ["show", "demo"], ["demo.db is empty", "from a backup"]),
    "show of half a database": (half_a_database, ["show", "demo"], ["demo.db"]),
    "doctor of half a database": (half_a_database, ["doctor", "demo"], ["demo.db"]),
    "run on half a database": (half_a_database, ["run", "--study", "demo"], ["demo.db"]),
    "show of no study": (None, ["show", "nothing"], ["no study 'nothing'", "demo"]),
    "report of no study": (None, ["report", "nothing"], ["no study 'nothing'", "demo"]),
    "reproduce of no study": (None, ["reproduce", "nothing", "0"], ["no study 'nothing'", "demo"]),
    "doctor of no study": (None, ["doctor", "nothing"], ["no study 'nothing'", "demo"]),
    "groups of no study": (None, ["show", "nothing", "--groups"], ["no study 'nothing'"]),
    "show of an empty name": (None, ["show", ""], ["no study ''"]),
    "show of another's database": (recipes, ["show", "demo", "--storage", OTHER], ["not a study"]),
    "report of another's database": (recipes, ["report", "demo", "--storage", OTHER], ["not a study"]),
    "doctor of another's database": (recipes, ["doctor", "demo", "--storage", OTHER], ["not a study"]),
    "run on another's database": (recipes, ["run", "--study", "demo", "--storage", OTHER], ["not a study"]),
    "doctor of another's study": (anothers_study, ["doctor", "demo", "--storage", OTHER], ["has not started"]),
    "run on another's study": (
        anothers_study,
        ["run", "--study", "demo", "--storage", OTHER],
        ["started by another program", "--storage"],
    ),
    "show of a study under another name": (
        as_begun,
        ["show", "flowers102", "--storage", "sqlite:///studies/demo.db"],
        ["holds no study named 'flowers102'"],
    ),
    "run with another definition": (
        as_begun,
        ["run", "--study", "demo", "--set", "epochs=5"],
        ["epochs was 6, is 5", "--fresh"],
    ),
    "doctor with another definition": (changed_definition, ["doctor", "demo"], ["space.backbone.dropout was"]),
    "reproduce with another definition": (changed_definition, ["reproduce", "demo", "0"], ["space.backbone.dropout"]),
    # report
    "a report that is a file": (report_that_is_a_file, ["report", "demo", "--output", "page"], ["page is a file"]),
    "a report inside of a file": (report_that_is_a_file, ["report", "demo", "--output", "page/inside"], ["page"]),
    "a report nowhere": (as_begun, ["report", "demo", "--output="], ["argument --output", "it is empty"]),
    # reproduce
    "a trial that is none": (as_begun, ["reproduce", "demo", "17"], ["has no trial 17", "0 to 2"]),
    "a trial in words": (as_begun, ["reproduce", "demo", "best"], ["argument N", "not 'best'"]),
    "a negative trial": (as_begun, ["reproduce", "demo", "--", "-1"], ["argument N", "0 or more, not '-1'"]),
    "half a trial": (as_begun, ["reproduce", "demo", "0.5"], ["argument N", "not '0.5'"]),
    "a trial of too many digits": (as_begun, ["reproduce", "demo", "9" * 5000], ["argument N"]),
    "another device": (
        as_begun,
        ["reproduce", "demo", "0", "--device", "cpu"],
        ["began on cuda", "--device cuda", "--fresh"],
    ),
    "an unknown device": (as_begun, ["reproduce", "demo", "0", "--device", "abacus"], ["--device abacus"]),
    "a data root for drawn flowers": (
        as_begun,
        ["reproduce", "demo", "0", "--data-root", "x"],
        ["Garden reads no folder"],
    ),
    # databases
    "a server that is away": (None, ["run", "--study", "demo", "--storage", POSTGRES], REFUSED),
    "a server that is away, to look": (None, ["show", "demo", "--storage", POSTGRES], REFUSED),
    "a study in MySQL": (None, ["show", "demo", "--storage", "mysql://a@h/x"], ["SQLite or PostgreSQL"]),
    "an empty storage": (as_begun, ["show", "demo", "--storage="], ["argument --storage", "it is empty"]),
    "an empty tracking": (as_begun, ["doctor", "demo", "--tracking-uri="], ["argument --tracking-uri", "it is empty"]),
    "tracking that is no URI": (as_begun, ["doctor", "demo", "--tracking-uri", "http://[::1:5000"], ["is not a URI"]),
    "tracking of no known kind": (as_begun, ["doctor", "demo", "--tracking-uri", "x://y"], ["--tracking-uri"]),
    "tracking in a study": (
        as_begun,
        ["doctor", "demo", "--tracking-uri", "sqlite:///studies/demo.db"],
        ["--tracking-uri"],
    ),
    "tracking in a study file": (
        as_begun,
        ["doctor", "demo", "--tracking-uri", "sqlite:///studies/demo.py"],
        ["--tracking-uri"],
    ),
    "tracking in another's database": (recipes, ["doctor", "demo", "--tracking-uri", OTHER], ["--tracking-uri"]),
    "tracking on a server without a driver": (
        as_begun,
        ["doctor", "demo", "--tracking-uri", "mysql://flora:secret@127.0.0.1:1/x"],
        ["--tracking-uri", ":***@"],
    ),
    "tracking on a server that is away": (
        as_begun,
        ["doctor", "demo", "--tracking-uri", "http://flora:secret@127.0.0.1:9"],
        ["--tracking-uri", ":***@"],
    ),
    # ui
    "ui before run": (None, ["ui"], ["no runs yet", "mlflow.db"]),
    "ui of a server": (None, ["ui", "--tracking-uri", "http://127.0.0.1:5000"], ["open it in a browser"]),
    "ui of no file": (None, ["ui", "--tracking-uri", "sqlite:///none.db"], ["no such file"]),
    "ui of a study": (as_begun, ["ui", "--tracking-uri", "sqlite:///studies/demo.db"], ["--tracking-uri"]),
    "ui of a study file": (None, ["ui", "--tracking-uri", "sqlite:///studies/demo.py"], ["--tracking-uri"]),
    "ui of no known kind": (None, ["ui", "--tracking-uri", "x://y"], ["--tracking-uri"]),
    "ui on a port in words": (None, ["ui", "--port", "first"], ["argument --port", "'first'"]),
}


@pytest.mark.parametrize(("prepare", "arguments", "words"), ROWS.values(), ids=ROWS.keys())
def test_what_cannot_be_done_is_refused(
    prepare: Preparation | None,
    arguments: list[str],
    words: list[str],
    begun: Path,
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if prepare is not None:
        prepare(workspace, begun)
    assert_refused(workspace, capsys, arguments, words)


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:///studies/demo.py", "sqlite:///no/such/mlflow.db"])
def test_a_tracking_uri_that_cannot_be_used_is_refused(
    uri: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [f"--set=data.{split}_per_class=1" for split in ("train", "val", "test")]
    assert_refused(workspace, capsys, ["run", "--study", "demo", *few, "--tracking-uri", uri], ["--tracking-uri"])


def test_looking_for_runs_makes_no_database(begun: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_begun(workspace, begun)
    assert main(["doctor", "demo", "--tracking-uri", "sqlite:///none.db"]) == 1
    assert "MLflow has no database" in capsys.readouterr().out
    assert not (workspace / "none.db").exists()
