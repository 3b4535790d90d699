"""A study's database that is deleted, moved or replaced while the study runs: noticed, named, and saved."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness.base.errors import Halt
from harness.config.events import EpochEnded, Event
from harness.report.display import Display
from harness.search.samplers import Sampler
from harness.store.locks import holder, study_lock
from harness.store.opening import open_store, read_store
from tests.analytic import run_analytic
from tests.conftest import make_study
from tests.faulty import CommandLine, one_sentence

STUDY = make_study("cache", sampler=Sampler("RandomSampler"), trials=4)


def lost_after(trials: int, folder: Path, lose: Callable[[Path], Any], more: int = 1) -> str:
    """What is said of a study whose file is lost after some trials, and noticed after some more."""
    folder.mkdir(exist_ok=True)
    file = folder / "tiny.db"
    with open_store(STUDY, f"sqlite:///{file}") as store:
        run_analytic(STUDY, store, trials)
        store.check_file()
        lose(file)

        def go_on() -> None:  # where a new connection is needed it hears of it before it looks
            run_analytic(STUDY, store, trials + more)
            store.check_file()

        with pytest.raises(Halt) as halt:
            go_on()
    assert len(str(halt.value).splitlines()) == 1
    return str(halt.value)


def delete(file: Path) -> None:
    for each in file.parent.glob("tiny.db*"):
        each.unlink()


def replace(file: Path) -> None:
    other = file.with_name("other.db")
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()
    other.replace(file)


LOSSES: dict[str, Callable[[Path], Any]] = {
    "deleted with its log": delete,
    "deleted alone": Path.unlink,
    "deleted with its folder": lambda file: shutil.rmtree(file.parent),
    "replaced": replace,
}


@pytest.mark.slow
@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_lost_file_is_named_and_what_was_stored_is_saved_beside_it(
    lose: Callable[[Path], Any], tmp_path: Path
) -> None:
    said = lost_after(2, tmp_path / "studies", lose)
    file, saved = tmp_path / "studies" / "tiny.db", tmp_path / "studies" / "tiny.rescued.db"
    assert f"The study's database {file} was deleted or replaced" in said
    assert f"saved in {saved}" in said
    saved.replace(file)
    with open_store(STUDY, f"sqlite:///{file}") as store:
        assert store.finished() == 3
        run_analytic(STUDY, store, 4)


def test_a_link_to_a_database_has_its_locks(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    there, link = tmp_path / "big" / "demo.db", tmp_path / "demo.db"
    there.touch()
    link.symlink_to(there)
    with study_lock(link, "demo"):
        assert holder(there) == holder(link) == str(os.getpid())
    assert holder(there) is None


def test_an_older_saved_file_is_kept(tmp_path: Path) -> None:
    older = tmp_path / "tiny.rescued.db"
    older.write_text("mine")
    assert f"{tmp_path}/tiny.rescued-1.db" in lost_after(1, tmp_path, delete)
    assert older.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="needs Linux, where the name of an open file can be asked for")
@pytest.mark.parametrize("whole", [True, False], ids=["with its folder", "alone"])
def test_of_a_moved_file_it_is_said_where_it_lies(whole: bool, tmp_path: Path) -> None:
    folder, there = tmp_path / "studies", tmp_path / "moved"
    if whole:
        said = lost_after(2, folder, lambda file: file.parent.rename(there))
    else:
        there.mkdir()
        said = lost_after(2, folder, lambda file: file.rename(there / "tiny.db"))
    assert f"was moved to {there / 'tiny.db'}" in said
    assert not list(tmp_path.rglob("*.rescued*"))
    shutil.copy(there / "tiny.db", tmp_path / "alone.db")  # whole without its log
    with read_store("tiny", f"sqlite:///{tmp_path}/alone.db") as store:
        assert store.finished() in (2, 3)


def test_what_only_looks_different_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_store(STUDY, "sqlite:///tiny.db") as store:
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        os.utime(tmp_path / "tiny.db", (0, 0))
        store.check_file()


def test_where_nothing_can_be_written_the_results_are_said_to_be_lost(tmp_path: Path) -> None:
    def remove(file: Path) -> None:
        shutil.rmtree(file.parent)
        file.parent.write_text("a file where the folder was")

    said = lost_after(1, tmp_path / "studies", remove, more=0)
    assert "its results are lost" in said
    assert "from a backup" in said


@pytest.mark.slow
@pytest.mark.usefixtures("mlruns")
def test_a_command_whose_study_is_deleted_ends_with_1_and_says_how_to_go_on(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = Display.show
    database = line.place / "studies" / "tiny.db"

    def deleting(self: Display, event: Event) -> None:
        show(self, event)
        if isinstance(event, EpochEnded) and event.number == 1 and database.exists():
            delete(database)

    monkeypatch.setattr(Display, "show", deleting)
    ended = line.run("--trials", "3")
    assert ended.code == 1
    assert one_sentence(ended.err), ended.err
    assert "tiny.rescued.db" in ended.err
    assert "Resume with:" in ended.out
    assert not (line.place / "studies" / "tiny.report").exists()
    monkeypatch.setattr(Display, "show", show)
    database.with_name("tiny.rescued.db").replace(database)
    assert line.run("--trials", "3").code == 0
    assert line.stored()[0] == 3
