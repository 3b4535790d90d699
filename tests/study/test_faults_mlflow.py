"""MLflow killed, hanging, locked and full, for real; the study goes on, and MLflow has everything afterwards."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.cli.commands import main
from harness.config.events import EpochEnded, Event, TrialEnded, TrialStarted
from harness.config.study import Study
from harness.store.store import Store
from harness.tracking.expected import expected_runs
from harness.tracking.mlflow import MLflowTracker
from harness.tracking.places import local_tracker
from tests.faulty import CommandLine, complete, everything, one_sentence, small_disk, small_study
from tests.mlflow_server import Proxy, Server
from tests.patience import PATIENCE_SECONDS
from tests.small import study_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def study(image_cache: Path) -> Study:
    return small_study(image_cache)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other sooner than in a study of hours, and give up sooner."""
    monkeypatch.setattr("harness.tracking.outbox.FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("harness.tracking.outbox.GATHERING_SECONDS", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # on a busy machine a server answers after seconds


def assert_whole(uri: str, study: Study, store: Store) -> None:
    """MLflow has one run a trial and seed with every value once, and none that is open or too many."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    query = f"tags.`harness.study_uid` = '{store.uid}'"
    runs = client.search_runs([experiment], query, max_results=1000)
    keys = [run.data.tags["harness.key"] for run in runs]
    expected = expected_runs(study, store)
    assert sorted(keys) == sorted(["study", *(each.key for each in expected)])
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_key = dict(zip(keys, runs, strict=True))
    for each in expected:
        run = by_key[each.key]
        assert run.data.params
        for name, values in each.series().items():
            history = client.get_metric_history(run.info.run_id, name)
            assert [(metric.step, metric.value) for metric in history] == values, (each.key, name)


def look(uri: str, study: Study) -> Callable[[Store], Any]:
    def found(store: Store) -> Any:
        assert_whole(uri, study, store)
        return everything(store)

    return found


def when(kind: type[Event], number: int, act: Callable[[], None]) -> Callable[[Event], None]:
    """Call `act` at the first event of this kind about this trial."""
    done = False

    def at(event: Event) -> None:
        nonlocal done
        if not done and isinstance(event, kind) and event.number == number:
            done = True
            act()

    return at


def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for what the tracker's thread does by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def ended(tracker: MLflowTracker, state: str = "complete") -> bool:
    return tracker.finish({}, [], state)


# -- a server ------------------------------------------------------------------------------------------------------


def test_a_server_killed_and_started_again_has_everything_once(
    server: Server, study: Study, tmp_path: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, said = MLflowTracker(server.uri, None), ""

    def noticed() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "does not accept entries" in said

    def start() -> None:
        until(noticed)
        server.start()

    killed, back = when(EpochEnded, 0, server.kill), when(TrialStarted, 2, start)

    def at(event: Event) -> None:
        killed(event)
        back(event)

    def finished(store: Store) -> Any:
        assert ended(tracker)
        return look(server.uri, study)(store)

    assert complete(study, tmp_path, tracker, at=at, look=finished) == undisturbed
    said += capsys.readouterr().err
    assert len(said.splitlines()) == 2, said
    assert "does not accept entries" in said.splitlines()[0]
    assert "answers again; writing the missed entries" in said.splitlines()[1]


def test_a_server_that_never_comes_back_is_filled_up_by_the_same_command(
    server: Server, study: Study, line: CommandLine, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.store import opening
    from harness.study import stages as studies

    kill = when(TrialEnded, 0, server.kill)
    run = studies.run

    def killing(*arguments: Any) -> Iterator[Event]:
        for event in run(*arguments):
            kill(event)
            yield event

    monkeypatch.setattr("harness.study.stages.run", killing)
    first = line.run("--tracking-uri", server.uri)
    assert first.code == 0, first
    assert f"MLflow at {server.uri} is incomplete; run the same command when it is back." in first.out
    assert len(first.err.splitlines()) == 1, first.err
    while_away = line.run("--tracking-uri", server.uri)
    assert while_away.code == 0, "a study that has begun goes on without MLflow"
    assert len(while_away.err.splitlines()) == 1, while_away.err
    assert "epoch 1" not in while_away.out
    server.start()
    again = line.run("--tracking-uri", server.uri)
    assert again.code == 0, again
    assert again.err == ""
    assert "epoch 1" not in again.out
    assert "Nothing is missing" in line.run("--tracking-uri", server.uri).out
    with opening.read_store("tiny", f"sqlite:///{line.place}/studies/tiny.db") as store:
        assert look(server.uri, study)(store) == undisturbed


@pytest.mark.parametrize("after", [EpochEnded, TrialEnded], ids=["in a trial", "between two"])
def test_a_server_that_hangs_is_not_waited_for(
    after: type[Event],
    server: Server,
    study: Study,
    tmp_path: Path,
    undisturbed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # whoever waited for an answer would wait for ever
    tracker = MLflowTracker(server.uri, None)

    def finished(store: Store) -> Any:
        server.signal(signal.SIGCONT)
        assert ended(tracker)
        return look(server.uri, study)(store)

    try:
        at = when(after, 0, lambda: server.signal(signal.SIGSTOP))
        found = complete(study, tmp_path, tracker, at=at, look=finished)
    finally:
        server.signal(signal.SIGCONT)
    assert found == undisturbed


@pytest.mark.parametrize("after", [EpochEnded, TrialEnded], ids=["a metric", "a new run"])
def test_what_the_server_took_is_not_written_twice_when_its_answer_is_lost(
    after: type[Event], proxy: Proxy, study: Study, tmp_path: Path, undisturbed: Any
) -> None:
    tracker = MLflowTracker(proxy.uri, None)

    def lose() -> None:
        tracker.flush()  # so that it is what comes next whose answer is lost
        proxy.lost = 2

    def finished(store: Store) -> Any:
        until(tracker.flush)
        assert ended(tracker)
        assert proxy.lost == 0
        return look(proxy.uri, study)(store)

    assert complete(study, tmp_path, tracker, at=when(after, 0, lose), look=finished) == undisturbed


@pytest.mark.parametrize("after", [EpochEnded, TrialEnded], ids=["a metric", "a new run"])
def test_what_the_server_takes_late_is_not_there_twice_in_the_end(
    after: type[Event], proxy: Proxy, study: Study, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # after which nobody waits for the answer
    tracker = MLflowTracker(proxy.uri, None)

    def delay() -> None:
        tracker.flush()
        proxy.late = 1

    def deliver() -> None:
        until(tracker.flush)
        for each in proxy.deliveries:
            each.start()
            each.join()

    delayed, delivered = when(after, 0, delay), when(TrialEnded, 2, deliver)

    def at(event: Event) -> None:
        delayed(event)
        delivered(event)

    def finished(store: Store) -> Any:
        assert ended(tracker)
        assert len(proxy.deliveries) == 1
        return look(proxy.uri, study)(store)

    assert complete(study, tmp_path, tracker, at=at, look=finished) == undisturbed


# -- a local database ------------------------------------------------------------------------------------------------


def test_a_database_locked_for_longer_than_mlflow_waits_does_not_delay_the_study(
    study: Study, tmp_path: Path, mlruns: Path, undisturbed: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("harness.tracking.outbox.FIRST_PAUSE_SECONDS", 60.0)  # the rest of the study is told at its end
    tracker = local_tracker(mlruns)
    said = ""

    def noticed() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "does not accept entries" in said

    with closing(sqlite3.connect(mlruns / "mlflow.db", isolation_level=None)) as other:

        def lock() -> None:
            other.execute("BEGIN EXCLUSIVE")

        def finished(store: Store) -> Any:
            assert not noticed(), "the study waited for the 20 s after which MLflow gives up"
            until(noticed)
            other.execute("ROLLBACK")
            assert ended(tracker)
            return look(tracker.uri, study)(store)

        found = complete(study, tmp_path, tracker, at=when(EpochEnded, 0, lock), look=finished)
    assert found == undisturbed
    said += capsys.readouterr().err
    assert "(sqlite3.OperationalError) database is locked). The study goes on, and writes them later." in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 2


def test_a_full_disk_of_mlflow_does_not_stop_the_study(
    line: CommandLine, study: Study, empty_mlflow: Path, undisturbed: Any
) -> None:
    from harness.store.opening import read_store

    mlruns = line.place / "mlruns"
    size = empty_mlflow.stat().st_size // 1024 + 200
    with small_disk(mlruns, size) as disk:
        shutil.copy(empty_mlflow, mlruns / "mlflow.db")
        first = line.run()
        assert first.code == 0, first
        assert "is incomplete; run the same command when it is back." in first.out
        assert "The study goes on, and writes them later." in first.err
        assert len(first.err.splitlines()) == 1, first.err
        disk.resize(4 * 16_384)
        again = line.run()
        assert again.code == 0, again
        assert again.err == ""
        assert "epoch 1" not in again.out
        uri = f"sqlite:///{mlruns}/mlflow.db"
        with read_store("tiny", f"sqlite:///{line.place}/studies/tiny.db") as store:
            assert look(uri, study)(store) == undisturbed
        assert "Nothing is missing" in line.run().out


def test_no_room_for_mlflows_database_is_said_before_anything_is_begun(line: CommandLine) -> None:
    mlruns = line.place / "mlruns"
    with small_disk(mlruns, 200) as disk:
        ended = line.run()
        assert ended.code == 1, ended
        assert one_sentence(ended.err), ended.err
        assert "mlruns" in ended.err
        assert "make room" in ended.err
        assert [each.name for each in mlruns.iterdir()] == ["mlflow.db.lock"]
        assert not (line.place / "studies" / "tiny.db").exists()
        disk.resize(4 * 16_384)
        assert line.run("--trials", "1").code == 0


@pytest.mark.parametrize("content", [b"", b"this is no database " * 100], ids=["empty", "garbage"])
def test_a_finished_study_beside_a_damaged_database_of_mlflow(
    content: bytes,
    tmp_path: Path,
    image_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study_in(tmp_path, image_cache)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--study", "tiny", "--trials", "1"]) == 0
    file = tmp_path / "mlruns" / "mlflow.db"
    file.write_bytes(content)
    for trials in ("1", "2"):  # finished, and unfinished
        code = main(["run", "--study", "tiny", "--trials", trials])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        if content:
            assert (code, file.read_bytes()) == (2, content)
            assert str(file) in said
        else:
            assert code == 0, said
