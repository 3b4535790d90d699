"""A study on PostgreSQL: the laws that hold on SQLite, and several processes that make exactly what one would."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from harness.final import sentences
from harness.store import database as databases
from harness.store import leases, opening
from harness.store import store as storage
from harness.store.leases import LeaseLost
from harness.store.opening import open_store, read_store
from harness.store.store import NoTrialFree, Store
from tests.analytic import Died, accuracy, evaluate, run_analytic
from tests.analytic_worker import patient, searching
from tests.conftest import PROJECT
from tests.final.test_test_set import overtaken
from tests.patience import PATIENCE_SECONDS
from tests.postgres import PostgreSQL
from tests.small import small_study
from tests.store.test_store import death_at_write, told

TRIALS = 12
LEASE = 2.0  # seconds; 45 in use


def run(url: str, trials: int, **options: Any) -> list[dict[str, Any]] | None:
    """Open the study and go on to `trials` trials; None if the process died on the way."""
    study = searching()
    try:
        with open_store(study, url) as store:
            run_analytic(study, store, trials, **options)
            return told(store)
    except Died:
        return None


def query(url: str, statement: str) -> list[Any]:
    """The rows that a statement gives, if it gives any."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        result = connection.execute(sqlalchemy.text(statement))
        rows = list(result) if result.returns_rows else []
    engine.dispose()
    return rows


@pytest.fixture(scope="module")
def uninterrupted(postgres: PostgreSQL) -> list[dict[str, Any]]:
    straight = run(postgres.create(), TRIALS)
    assert straight is not None
    return straight


# -- the law: interrupted and resumed = uninterrupted ----------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [(0, 3, "report"), (9, 0, "ask"), (11, 0, "tell")], ids=str)
def test_killed_and_resumed_equals_uninterrupted(
    stop_after: tuple[int, int, str], uninterrupted: list[dict[str, Any]], database: str
) -> None:
    assert run(database, TRIALS, stop_after=stop_after) is None
    assert run(database, TRIALS) == uninterrupted


@pytest.mark.slow
def test_killed_again_and_again_between_any_two_writes(uninterrupted: list[dict[str, Any]], database: str) -> None:
    """From the first table to the last trial's state."""
    deaths, end = 0, None
    while end is None:
        with death_at_write(3 if deaths < 4 else 25 + deaths % 3):
            end = run(database, TRIALS)
        with contextlib.suppress(sqlalchemy.exc.ProgrammingError):  # there may be no table of leases yet
            query(database, "DELETE FROM harness_leases")  # as after 45 seconds, for this process lives on
        deaths += end is None
        assert deaths < 100
    assert deaths > 10
    assert end == uninterrupted


@pytest.mark.slow
def test_a_server_that_is_restarted_in_the_middle_of_a_study_is_waited_for(
    uninterrupted: list[dict[str, Any]], postgres: PostgreSQL, capsys: pytest.CaptureFixture[str]
) -> None:
    database, epochs, starts = postgres.create(), 0, []

    def curve(params: Mapping[str, Any], epoch: int) -> float:
        nonlocal epochs
        epochs += 1
        if epochs == 9:  # every connection is gone at the next statement
            postgres.stop()
            postgres.start()
        if epochs == 20:
            postgres.stop(signal.SIGKILL)
            starts.append(threading.Timer(1.0, postgres.start))
            starts[0].start()
        return accuracy(params, epoch)

    assert run(database, TRIALS, curve=curve) == uninterrupted
    starts[0].join()
    said = capsys.readouterr().err
    assert "does not answer; waiting for it." in said
    assert "***" in said


def test_a_trial_whose_end_was_written_and_not_confirmed_has_ended_once(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, lost = searching(), 0
    monkeypatch.setattr(databases, "RETRY_SECONDS", 0.0)
    with open_store(study, database) as store:
        backend: Any = store.optuna_study._storage
        write = backend.set_trial_state_values

        def answer_lost(trial_id: int, state: TrialState, values: Any = None) -> bool:
            nonlocal lost
            done: bool = write(trial_id, state, values)
            if state is TrialState.COMPLETE and not lost:
                lost += 1
                gone = OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))
                raise StorageInternalError("") from gone
            return done

        monkeypatch.setattr(backend, "set_trial_state_values", answer_lost)
        run_analytic(study, store, 3)
        assert lost == 1
        assert [trial["number"] for trial in told(store)] == [0, 1, 2]


# -- several processes ---------------------------------------------------------------------------------------------


class Worker:
    """A process of `tests.analytic_worker`."""

    def __init__(self, url: str, machine: str = "here", lease: float = LEASE, pause: float = 0.0) -> None:
        arguments = [url, machine, str(lease), str(pause)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.analytic_worker", *arguments],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def do(self, order: object) -> None:
        assert self.process.stdin is not None
        print(order, file=self.process.stdin, flush=True)

    def heard(self, start: str) -> str:
        """The next line that begins so."""
        assert self.process.stdout is not None
        before = []
        for line in self.process.stdout:
            if line.startswith(start):
                return line.strip()
            before.append(line)
        raise AssertionError("".join(before))

    def end(self) -> None:
        """Let it come to its own end. Asserts that nothing went wrong."""
        out, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode == 0, out


Start = Callable[..., Worker]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts workers, and ends those that are left."""
    workers: list[Worker] = []

    def begin(*arguments: Any, **options: Any) -> Worker:
        workers.append(Worker(*arguments, **options))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


def numbers(url: str) -> list[int]:
    """The trials' numbers. Asserts that all have ended, with everything that belongs to them."""
    with read_store("demo", url) as store:
        trials = store.optuna_study.get_trials()
        assert all(trial.state.is_finished() for trial in trials)
        assert all({"epochs", "outcome", "seconds"} <= trial.user_attrs.keys() for trial in trials)
        assert store.active_workers() == {}
        return [trial.number for trial in trials]


@pytest.mark.slow
def test_eight_processes_make_one_study_and_race_for_its_last_trials(database: str, start: Start) -> None:
    workers = [start(database) for _ in range(8)]
    for worker in workers:
        worker.heard("ready")
    for worker in workers:  # tables and study are made by all of them at once
        worker.do("open")
    assert len({worker.heard("opened") for worker in workers}) == 1
    assert len(query(database, "SELECT 1 FROM studies")) == 1
    assert len(query(database, "SELECT 1 FROM study_user_attributes WHERE key IN ('uid', 'definition')")) == 2
    for trials in (3, 4, 5, 6, 30):
        for worker in workers:
            worker.do(trials)
        for worker in workers:
            worker.heard(f"done {trials}")
        assert numbers(database) == list(range(trials))
    for worker in workers:
        worker.end()


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of this process last two seconds, as those of the workers."""
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", leases.RENEWAL_SECONDS)
    monkeypatch.setattr(opening, "Leases", opening.Leases)
    patient(LEASE)


def taken_up(store: Store, trials: int) -> storage.Asked:
    """The trial that is left, as soon as it may be taken."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(NoTrialFree):
            return store.ask(searching(), at_most=trials)
        assert time.monotonic() < end, "the lease does not run out"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("short_leases")
def test_the_trial_of_a_killed_worker_is_taken_up_when_its_lease_has_run_out(
    uninterrupted: list[dict[str, Any]], database: str, start: Start
) -> None:
    worker = start(database, "elsewhere", pause=0.2)
    worker.do("open")
    worker.do(TRIALS)
    worker.heard("trial 0 epoch 3")
    worker.process.kill()
    study = searching()
    with open_store(study, database) as store:
        assert list(store.active_workers()) == ["trial-0"]
        asked = taken_up(store, 1)
        assert (asked.number, asked.resumed) == (0, True)
        evaluate(study, store, asked)
        run_analytic(study, store, TRIALS)
        assert told(store) == uninterrupted


@pytest.mark.slow
@pytest.mark.usefixtures("short_leases")
def test_a_worker_that_comes_back_late_finds_its_trial_taken(
    uninterrupted: list[dict[str, Any]], database: str, start: Start
) -> None:
    worker = start(database, "elsewhere", pause=0.2)
    worker.do("open")
    worker.do(3)
    worker.heard("trial 0 epoch 3")
    os.kill(worker.process.pid, signal.SIGSTOP)
    study = searching()
    with open_store(study, database) as store:
        asked = taken_up(store, 1)
        assert (asked.number, asked.resumed) == (0, True)
        os.kill(worker.process.pid, signal.SIGCONT)
        assert worker.heard("lost") == "lost trial-0"
        evaluate(study, store, asked)
    assert worker.heard("done") == "done 3"
    worker.end()
    with read_store("demo", database) as store:
        assert [trial["number"] for trial in told(store)] == [0, 1, 2]
        assert told(store)[0] == uninterrupted[0]


@pytest.mark.usefixtures("short_leases")
def test_whoever_led_and_stood_still_does_not_open_the_test_set(database: str) -> None:
    with open_store(searching(), database) as first, open_store(searching(), database) as second:
        assert first.lead()
        assert not second.lead()
        led = f"The final run is running in process {os.getpid()} on "
        assert sentences.test_sentence(second).startswith(led)
        assert sentences.test_sentence(first) == "The test set has not been opened.", "it knows what it does"
        first.check_lead()
        assert first._leases is not None
        first._leases._closed.set()  # its thread renews nothing, as when the process stands still
        end = time.monotonic() + PATIENCE_SECONDS
        while not second.lead():
            assert time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(LeaseLost):
            first.check_lead()
        second.check_lead()


@pytest.mark.slow
def test_whoever_led_and_stood_still_does_not_overwrite_the_result(
    database: str, image_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = dataclasses.replace(small_study(image_cache), trials=2)
    with open_store(study, database) as late, open_store(study, database) as next_one:
        overtaken(study, late, next_one, tmp_path, monkeypatch, "record_files")


def test_a_lock_that_was_lost_makes_no_trial_too_many(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has ended the transaction of a process that stood still, and another one took the last trial."""
    study = searching()
    with open_store(study, database) as late, open_store(study, database) as other:
        backend: Any = late.optuna_study._storage
        create = backend.create_new_trial
        run_analytic(study, other, 2)
        ask = other.ask

        def after_standing_still(*arguments: Any) -> int:
            monkeypatch.setattr(other._leases, "exclusive", contextlib.nullcontext)
            assert ask(study, at_most=3).number == 2
            number: int = create(*arguments)
            return number

        monkeypatch.setattr(backend, "create_new_trial", after_standing_still)
        with pytest.raises(NoTrialFree):
            late.ask(study, at_most=3)
        assert other.counts()["running"] == 1
        assert len(other.trials()) == 3


# -- looking -------------------------------------------------------------------------------------------------------


def test_looking_into_an_empty_database_makes_no_tables(database: str) -> None:
    assert not opening.exists("demo", database)
    with pytest.raises(databases.InputError, match="holds no study named 'demo'"), read_store("demo", database):
        pass
    assert query(database, "SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []


def test_the_settings_of_a_connection_in_the_url_stay(database: str) -> None:
    """A study in a schema of its own."""
    query(database, "CREATE SCHEMA garden")
    url = f"{database}?options=-csearch_path%3Dgarden&connect_timeout=3"
    study = searching()
    with open_store(study, url) as store:
        run_analytic(study, store, 1)
    assert opening.exists("demo", url)
    assert not opening.exists("demo", database)
    assert databases._connect_args(url) == {
        "application_name": "harness",
        "keepalives_idle": 30,
        "tcp_user_timeout": 60_000,
        "options": "-csearch_path=garden -c idle_in_transaction_session_timeout=30s",
    }
