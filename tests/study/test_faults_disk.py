"""Full disks and locked databases, made for real: small file systems, and a second connection that holds a lock."""

from __future__ import annotations

import dataclasses
import sqlite3
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from harness.config.events import EpochEnded, Event
from harness.config.study import Study
from harness.final.model_files import has_model
from harness.store.database import connect, dispose
from harness.store.opening import exists, open_store
from tests.faulty import CommandLine, complete, one_sentence, small_disk, small_study
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("mlruns")

ROOMY = 16_384  # kilobytes; the report alone takes 4.8 MB, for it carries plotly


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


# -- a full disk, the command line -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_whose_disk_is_full_again_and_again_ends_as_the_undisturbed_one(
    line: CommandLine, undisturbed: Any
) -> None:
    studies, finished, named = line.place / "studies", 0, []
    with small_disk(studies, 40) as disk:
        # From the first table to the report, each room is just too small for the next thing.
        for kilobytes in (40, 100, 140, 180, 220, 260, 300, 340, 400, 600):
            disk.resize(kilobytes)
            ended = line.run()
            assert ended.code == 1, ended
            assert one_sentence(ended.err), ended.err
            assert "make room" in ended.err
            assert ended.out.splitlines()[-2] == "Resume with:"
            named.append(ended.err)
            if kilobytes >= 220:
                now, _ = line.stored()
                assert now >= finished, "a finished trial is lost"
                finished = now
            assert not leftovers(studies)
            assert has_model(studies / "tiny.model") or not (studies / "tiny.model" / "model.json").exists()
        assert sum("tiny.db failed (" in each for each in named) >= 5
        assert "tiny.report/report.html cannot be written (No space left on device)" in named[-1]
        disk.resize(ROOMY)
        assert line.run().code == 0
        assert line.stored() == (3, undisturbed)
        assert "Nothing is missing" in line.run().out


@pytest.mark.slow
def test_no_room_for_the_image_cache_is_said_before_anything_is_begun(line: CommandLine, undisturbed: Any) -> None:
    cache = line.place / "data" / "cache"
    with small_disk(cache, 64) as disk:
        ended = line.run()
        assert ended.code == 1
        assert one_sentence(ended.err), ended.err
        assert ".npy cannot be written (No space left on device); make room" in ended.err
        assert not leftovers(cache)
        assert not (line.place / "studies" / "tiny.db").exists()
        for array in cache.glob("*.npy"):  # what was whole stays
            assert array.stat().st_size in (32 * 18 * 18 * 3 + 128, 32 * 16 * 16 * 3 + 128)
        disk.resize(ROOMY)
        assert line.run().code == 0
        assert line.stored() == (3, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tiny.checkpoints", "tiny.model", "tiny.report"])
def test_no_room_for_what_lies_beside_the_study_stops_it_and_room_lets_it_go_on(
    what: str, line: CommandLine, undisturbed: Any
) -> None:
    studies = line.place / "studies"
    with small_disk(studies / what, 8) as disk:
        ended = line.run("--set", "checkpoint_seconds=0")
        assert ended.code == 1
        assert one_sentence(ended.err), ended.err
        assert f"{studies / what}/" in ended.err
        assert "cannot be written (No space left on device); make room" in ended.err
        assert not leftovers(studies)
        finished, _ = line.stored()
        assert finished == (0 if what == "tiny.checkpoints" else 3)
        assert not (studies / what / "report.html").exists()
        assert not has_model(studies / what)
        disk.resize(ROOMY)
        assert line.run("--set", "checkpoint_seconds=0").code == 0
        assert line.stored() == (3, undisturbed)
        disk.resize(ROOMY)


# -- a locked database -----------------------------------------------------------------------------------------------


class Locker:
    """A second connection that holds the study's database, as a backup program may, until somebody waits for it."""

    def __init__(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = file
        self._locked, self._heard = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)
        self._stderr = sys.stderr
        monkeypatch.setattr("sys.stderr", self)

    def write(self, text: str) -> int:
        if "waiting for it" in text:
            self._heard.set()
        return self._stderr.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stderr, name)

    def lock(self) -> None:
        self._thread.start()
        assert self._locked.wait(PATIENCE_SECONDS)

    def wait(self) -> None:
        self._thread.join()

    def _hold(self) -> None:
        with closing(sqlite3.connect(self._file, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            self._locked.set()
            self._heard.wait(PATIENCE_SECONDS)
            connection.execute("ROLLBACK")


def held_at_first_epoch(locker: Locker, number: int) -> Callable[[Event], None]:
    def lock(event: Event) -> None:
        if isinstance(event, EpochEnded) and (event.number, event.result.epoch) == (number, 1):
            locker.lock()

    return lock


@pytest.mark.slow
def test_a_study_waits_for_its_locked_database_and_says_so_once(
    study: Study,
    tmp_path: Path,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("harness.store.database.BUSY_TIMEOUT_SECONDS", 0.1)
    locker = Locker(tmp_path / "tiny.db", monkeypatch)
    assert complete(study, tmp_path, at=held_at_first_epoch(locker, 1)) == undisturbed
    locker.wait()
    said = capsys.readouterr().err
    assert said == f"The database sqlite:///{tmp_path}/tiny.db is locked by another program; waiting for it.\n"


@pytest.mark.slow
def test_opening_a_locked_study_waits_too(
    study: Study,
    tmp_path: Path,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    complete(dataclasses.replace(study, trials=1), tmp_path)
    monkeypatch.setattr("harness.store.database.BUSY_TIMEOUT_SECONDS", 0.1)
    locker = Locker(tmp_path / "tiny.db", monkeypatch)
    locker.lock()
    found = complete(study, tmp_path)
    assert found[1] == undisturbed[1]
    locker.wait()
    assert capsys.readouterr().err.count("is locked by another program; waiting for it.") == 1


@pytest.mark.slow
def test_a_database_locked_in_the_middle_of_a_command_delays_it_only(
    line: CommandLine, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.store.database.BUSY_TIMEOUT_SECONDS", 0.2)
    assert line.run("--trials", "1").code == 0
    locker = Locker(line.place / "studies" / "tiny.db", monkeypatch)
    locker.lock()
    ended = line.run("--trials", "2")
    assert ended.code == 0
    assert ended.err.count("is locked by another program; waiting for it.") == 1
    assert len(ended.err.splitlines()) == 1
    locker.wait()


@pytest.mark.slow
def test_a_start_cut_off_before_the_definition_was_stored_counts_as_none(study: Study, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tiny.db"
    storage = connect(url)
    optuna.create_study(storage=storage, study_name="tiny", direction="maximize")
    dispose(storage)
    assert not exists("tiny", url)
    with open_store(study, url, {"data": "these images"}):
        assert exists("tiny", url)
    with open_store(study, url):  # a look without the images takes nothing away
        pass
    with open_store(study, url, {"data": "these images"}) as store:
        assert store.attributes()["definition"]["content of data"] == "these images"
