"""Several commands on one PostgreSQL and one MLflow server are one study."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.store.opening import read_store
from harness.tracking.client import KEY, STUDY
from tests.conftest import PROJECT
from tests.forked import Process
from tests.mlflow_server import Server
from tests.postgres import PASSWORD, PostgreSQL

pytestmark = pytest.mark.slow

STUDY_FILE = "from tests.faulty import small_study\n\nSTUDY = small_study('data/cache'{changes})\n"


@pytest.fixture(scope="module")
def mlflow(postgres: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An MLflow server with its database on the same PostgreSQL."""
    server = Server(tmp_path_factory.mktemp("mlflow"), postgres.create())
    server.start()
    yield server
    server.kill()


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts commands of the harness in a folder, each in a process group of its own; ends those that are left."""
    processes: list[Process] = []

    def begin(folder: Path, *arguments: str, changes: str = "") -> Process:
        (folder / "studies").mkdir(parents=True, exist_ok=True)
        (folder / "studies" / "tiny.py").write_text(STUDY_FILE.format(changes=changes))
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        process = Process(arguments, cwd=folder, env=environment, start_new_session=True)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def output(process: Process) -> str:
    """What a command said in all. Asserts that it ended well."""
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "Traceback" not in out
    return out


def assert_one_study(database: str, tracking_uri: str, trials: int, seeds: int = 1) -> None:
    """Exactly so many trials, one final run, one finished run in MLflow for each."""
    with read_store("tiny", database) as store:
        found = store.optuna_study.get_trials()
        assert [trial.number for trial in found] == list(range(trials))
        assert all(trial.state.is_finished() for trial in found)
        assert [line["event"] for line in store.ledger()] == ["opened", "result"]
        assert store.has_final()
        assert store.attributes().get("published") == trials
        uid = store.attributes().get("uid")
        expected = {STUDY, *(f"trial-{trial.number}" for trial in found)}
        expected |= {f"final-seed-{seed}-of-trial-{store.attributes()['final']['trial']}" for seed in range(seeds)}
    runs = [run for run in runs_on(tracking_uri) if run.data.tags["harness.study_uid"] == uid]
    keys = Counter(run.data.tags[KEY] for run in runs)
    assert {key: count for key, count in keys.items() if not key.startswith("base-")} == dict.fromkeys(expected, 1)
    assert [run.data.tags[KEY] for run in runs if run.info.status == "RUNNING"] == []


def runs_on(tracking_uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=1000))


def places(database: str, mlflow: Server) -> list[str]:
    return ["--storage", database, "--tracking-uri", mlflow.uri]


def run_tiny(database: str, mlflow: Server, trials: int, *more: str) -> list[str]:
    command = [str(PROJECT / "run_study.py"), "--study", "tiny", "--trials", str(trials)]
    return [*command, *places(database, mlflow), *more]


def doctor(start: Start, folder: Path, database: str, mlflow: Server) -> str:
    return output(start(folder, "-m", "harness", "doctor", "tiny", *places(database, mlflow)))


def test_two_commands_at_the_same_time_are_one_study(
    database: str, mlflow: Server, tmp_path: Path, start: Start
) -> None:
    commands = [start(tmp_path, *run_tiny(database, mlflow, 8)) for _ in range(2)]
    said = [output(each) for each in commands]
    assert_one_study(database, mlflow.uri, 8)
    assert sum("final seed 0  epoch 2/2" in each for each in said) == 1
    assert all(PASSWORD not in each and "8 of 8 trials" not in each.splitlines()[0] for each in said)
    assert "agree on 8 finished trials" in doctor(start, tmp_path, database, mlflow)
    again = output(start(tmp_path, *run_tiny(database, mlflow, 8)))
    assert again.startswith("Nothing is missing")


def test_a_command_that_asks_for_fewer_trials_does_not_open_the_test_set_while_another_wants_more(
    database: str, mlflow: Server, tmp_path: Path, start: Start
) -> None:
    more = start(tmp_path, *run_tiny(database, mlflow, 10))
    more.stdout.readline()  # it has begun
    fewer = start(tmp_path, *run_tiny(database, mlflow, 2))
    output(fewer)
    output(more)
    assert_one_study(database, mlflow.uri, 10)


def test_two_machines_with_two_workers_each_are_one_study(
    database: str, mlflow: Server, tmp_path: Path, start: Start
) -> None:
    """They share no folder: the final model is where the final run was."""
    folders = [tmp_path / name for name in ("one", "two")]
    commands = [start(folder, *run_tiny(database, mlflow, 12, "--workers", "2")) for folder in folders]
    said = [output(each) for each in commands]
    assert_one_study(database, mlflow.uri, 12)
    led = [folder for folder, each in zip(folders, said, strict=True) if "final seed 0  epoch 2/2" in each]
    assert len(led) == 1
    assert [folder for folder in folders if (folder / "studies" / "tiny.model").exists()] == led
    assert "agree on 12 finished trials" in doctor(start, led[0], database, mlflow)


def test_machines_with_an_mlflow_of_their_own_have_all_runs_at_the_end(
    database: str, tmp_path: Path, start: Start
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    words = [str(PROJECT / "run_study.py"), "--study", "tiny", "--trials", "6", "--storage", database]
    for command in [start(folder, *words) for folder in folders]:
        output(command)
    for folder in folders:
        assert_one_study(database, f"sqlite:///{folder}/mlruns/mlflow.db", 6)


def test_a_machine_that_dies_loses_nothing(database: str, mlflow: Server, tmp_path: Path, start: Start) -> None:
    one = start(tmp_path, *run_tiny(database, mlflow, 12, "--workers", "2"))
    other = start(tmp_path, *run_tiny(database, mlflow, 12))
    for line in one.stdout:
        if "epoch 1/2" in line:
            break
    os.killpg(one.pid, signal.SIGKILL)
    output(other)
    assert_one_study(database, mlflow.uri, 12)
    assert "agree on 12 finished trials" in doctor(start, tmp_path, database, mlflow)
