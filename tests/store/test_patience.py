"""What is locked for longer than anybody's patience is waited for all the same, and said once."""

from __future__ import annotations

import io
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import filelock
import pytest

from harness.base.errors import InputError
from harness.search.samplers import Sampler
from harness.store.opening import move_aside, open_store, read_store
from tests.analytic import evaluate
from tests.conftest import make_study

STUDY = make_study("cache", sampler=Sampler("RandomSampler"), trials=2)
WAITING = "is locked by another program; waiting for it.\n"


class Until(io.StringIO):
    """stderr, and an event when somebody says there that he waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = threading.Event()

    def write(self, text: str) -> int:
        if "waiting for it" in text:
            self.waited.set()
        return super().write(text)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Until:
    monkeypatch.setattr("harness.store.leases.EXCLUSIVE_SECONDS", 0.05)
    monkeypatch.setattr("harness.store.database.BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr("harness.store.opening.BUSY_TIMEOUT_SECONDS", 0.05)
    return Until()


@contextmanager
def held(said: Until, hold: Callable[[], Any], release: Callable[[Any], None]) -> Iterator[None]:
    """What another thread holds until somebody has said that he waits for it."""
    ready = threading.Event()

    def work() -> None:
        what = hold()
        ready.set()
        said.waited.wait(60)
        release(what)

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    try:
        with redirect_stderr(said):
            yield
    finally:
        said.waited.set()
        thread.join()


def exclusively(file: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(f"{file}.queue.lock", thread_local=False)
    lock.acquire()
    return lock


def alone_with(file: Path) -> sqlite3.Connection:
    """A connection that keeps readers out, too."""
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    return connection


@pytest.mark.slow
def test_a_worker_waits_for_the_queue_as_long_as_it_takes(tmp_path: Path, said: Until) -> None:
    file = tmp_path / "tiny.db"
    url = f"sqlite:///{file}"
    with open_store(STUDY, url), open_store(STUDY, url, joining=True) as worker:
        with held(said, lambda: exclusively(file), lambda lock: lock.release()):
            asked = worker.ask(STUDY, 2)
        evaluate(STUDY, worker, asked)
        assert worker.finished() == 1
    assert said.getvalue() == f"The database {url} {WAITING}"


def test_a_worker_that_begins_waits_for_its_locked_study(tmp_path: Path, said: Until) -> None:
    file = tmp_path / "tiny.db"
    url = f"sqlite:///{file}"
    with open_store(STUDY, url) as store:
        evaluate(STUDY, store, store.ask(STUDY, 2))
    with (
        held(said, lambda: alone_with(file), lambda connection: connection.close()),
        open_store(STUDY, url, joining=True) as worker,
    ):
        assert worker.finished() == 1
    assert said.getvalue().count(WAITING) == 1


@pytest.mark.usefixtures("said")
def test_a_study_that_another_program_reads_is_not_moved_aside(tmp_path: Path) -> None:
    file = tmp_path / "tiny.db"
    url = f"sqlite:///{file}"
    with closing(sqlite3.connect(file)) as reader:
        with open_store(STUDY, url) as store:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM trials").fetchall()
            evaluate(STUDY, store, store.ask(STUDY, 2))  # is in the log, which would be left behind
        with pytest.raises(InputError, match="stop it and try again"):
            move_aside("tiny", url)
        assert file.exists()
    moved = move_aside("tiny", url)
    assert moved is not None
    with read_store("tiny", f"sqlite:///{moved}") as store:
        assert store.finished() == 1
