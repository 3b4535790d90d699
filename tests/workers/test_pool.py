"""Workers of one machine, in real processes: exactly as many results as asked for, whoever dies."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
from mlflow import MlflowClient

from harness.base.errors import InputError
from harness.config.events import Completed
from harness.config.options import RunOptions
from harness.config.train import FinalConfig
from harness.final.test_set import summary
from harness.store import leases
from harness.store.opening import open_store, read_store
from harness.study import start as running
from harness.training import interrupt
from harness.workers.pool import of_use, surroundings
from tests.analytic import NOT_COMPARED, epoch_result
from tests.conftest import PROJECT
from tests.forked import Process
from tests.patience import PATIENCE_SECONDS
from tests.small import study_in

STUDY_FILE = """
import dataclasses

from harness.config.train import FinalConfig
from harness.search.pruners import asha, no_pruning
from harness.search.samplers import grid
from harness.config.space import Choice
from tests.small import small_study

SPACE = {{
    "optim.base_lr": Choice((1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "backbone.dropout": Choice((0.1, 0.3)),
    "optim.weight_decay": Choice({decays}),
}}
study = small_study({cache!r})
train = dataclasses.replace(study.train, epochs={epochs}, checkpoint_seconds=0.1, batch_size=8)
STUDY = dataclasses.replace(
    study,
    train=train,
    space=SPACE,
    sampler=grid(),
    pruner=no_pruning(),
    trials={trials},
    final=FinalConfig(seeds=2, publish=False),
)
"""


class Command:
    """`run_study.py --study tiny` in a folder of its own and a process group of its own."""

    def __init__(self, place: Path, cache: Path, epochs: int = 8, trials: int = 9) -> None:
        self.place, self.count = place, trials
        decays = tuple(0.02 * each for each in range(1, -(-trials // 10) + 1))
        (place / "studies").mkdir(parents=True)
        (place / "studies" / "tiny.py").write_text(
            STUDY_FILE.format(cache=str(cache), epochs=epochs, trials=trials, decays=decays)
        )
        self.url = f"sqlite:///{place}/studies/tiny.db"

    def start(self, *arguments: str) -> Process:
        command = [str(PROJECT / "run_study.py"), "--study", "tiny", *arguments]
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        return Process(command, cwd=self.place, env=environment, start_new_session=True)

    def active_workers(self, count: int) -> tuple[Process, list[int]]:
        """Start with so many workers; the process, and their PIDs as soon as some trials are under way."""
        process = self.start("--workers", str(count))
        return process, self.wait_for_work(process)

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def trials(self) -> list[Any]:
        with read_store("tiny", self.url) as store:
            return store.trials()

    def results(self) -> dict[str, Any]:
        """All that may not depend on who did what when."""
        with read_store("tiny", self.url) as store:
            final = store.attributes().get("final")
            return {
                "trials": [
                    (trial.number, trial.state, trial.params, trial.value, trial.curve) for trial in store.trials()
                ],
                "final": [(each["seed"], each["weights"], each["correct"]) for each in final["per_seed"]],
                "base": final["base"] and [each["weights"] for each in final["base"]["per_seed"]],
            }

    def check(self) -> None:
        """As many results as asked for, one final run, one MLflow run for each, nobody at work, the doctor silent."""
        with read_store("tiny", self.url) as store:
            assert [trial.number for trial in store.trials()] == list(range(self.count))
            assert {trial.state for trial in store.trials()} == {"complete"}
            assert leases.holders(store._engine, store.attributes().get("uid")) == {}  # type: ignore[arg-type]
            assert [line["event"] for line in store.ledger()] == ["opened", "result"]
        client = MlflowClient(tracking_uri=f"sqlite:///{self.place}/mlruns/mlflow.db")
        (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
        runs = client.search_runs([experiment.experiment_id])
        keys = Counter(run.data.tags["harness.key"] for run in runs)
        assert max(keys.values()) == 1
        assert len([key for key in keys if key.startswith("trial-")]) == self.count
        assert {run.info.status for run in runs} == {"FINISHED"}
        doctor = Process(["-m", "harness", "doctor", "tiny"], cwd=self.place)
        said, _ = doctor.communicate()
        assert doctor.returncode == 0, said
        assert f"agree on {self.count} finished trials" in said

    def check_against(self, single: dict[str, Any]) -> None:
        """The same, and what one worker found: a result does not depend on who trains it, or beside whom."""
        self.check()
        assert self.results() == single

    def begun(self) -> int:
        """How many trials have an epoch behind them."""
        file = Path(self.url.removeprefix("sqlite:///"))
        place = f"{file.as_uri()}?mode=ro"  # looking must not make it
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(place, uri=True)) as connection,
        ):
            (count,) = connection.execute("SELECT count(DISTINCT trial_id) FROM trial_intermediate_values").fetchone()
            return int(count)
        return 0

    def wait_for_work(self, process: Process, started: int = 2) -> list[int]:
        """The PIDs of the workers, as soon as some trials are under way."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and process.poll() is None:
            if self.begun() >= started:
                workers = children(process.pid)
                assert len(workers) >= 2
                return workers
            time.sleep(0.1)
        raise AssertionError(f"no trials under way: {process.communicate()[0]}")


def children(pid: int) -> list[int]:
    """The worker processes of a coordinator; not multiprocessing's resource tracker."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: list[int], seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def single(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker finds."""
    command = Command(tmp_path_factory.mktemp("single"), image_cache)
    command.run()
    command.check()
    return command.results()


@pytest.mark.slow
def test_four_workers_give_what_one_gives(single: dict[str, Any], image_cache: Path, tmp_path: Path) -> None:
    command = Command(tmp_path / "four", image_cache)
    output = command.run("--workers", "4")
    command.check_against(single)
    assert "4 workers" in output
    assert "Nothing is missing" in command.run("--workers", "4")


@pytest.mark.slow
def test_killed_workers_are_replaced_and_their_trials_taken_up(
    single: dict[str, Any], image_cache: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "killed", image_cache)
    process, first = command.active_workers(3)
    for pid in first[:2]:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("died (killed by signal 9); starting another.") == 2, output
    command.check_against(single)


@pytest.mark.slow
def test_workers_end_with_their_coordinator_and_the_same_command_goes_on(
    single: dict[str, Any], image_cache: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "killed", image_cache)
    process, workers = command.active_workers(2)
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    output = command.run("--workers", "2")
    command.check_against(single)
    assert "of 9 trials finished" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_all_write_their_checkpoints_and_the_study_goes_on_from_them(
    number: signal.Signals, single: dict[str, Any], image_cache: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path / "stopped", image_cache)
    process, workers = command.active_workers(2)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "Resume with:" in output
    assert "Traceback" not in output
    assert output.count(interrupt.NOTICE) == 1, "of one process, for all"
    wait_until_gone(workers)
    running = [trial.number for trial in command.trials() if trial.state == "running"]
    checkpoints = tmp_path / "stopped" / "studies" / "tiny.checkpoints"
    kept = {path.stem for path in checkpoints.glob("trial-*")}  # that of a trial which has just ended may be among them
    assert not running or kept & {f"trial-{each}" for each in running}
    command.run("--workers", "2")
    command.check_against(single)
    assert not checkpoints.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_stopped_while_its_workers_start_a_study_says_only_how_to_go_on(
    seconds: float, image_cache: Path, tmp_path: Path
) -> None:
    process = Command(tmp_path / "early", image_cache).start("--workers", "2")
    assert any("2 workers" in line for line in process.stdout)
    time.sleep(seconds)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    lines = [line for line in output.splitlines() if line != interrupt.NOTICE]
    assert lines[:2] == ["Interrupted with 0 of 9 trials finished.", "Resume with:"]
    wait_until_gone(workers)


def test_a_study_that_a_process_works_on_is_not_moved_aside(image_cache: Path, tmp_path: Path) -> None:
    """A worker that has lost its coordinator writes on for a while; its file must not go from under it."""
    study, url = study_in(tmp_path, image_cache)
    with open_store(study, url):
        running._check_nobody_at_work(study, url)  # the command itself is named when its study would be moved
    with open_store(study, url, joining=True) as store:
        running._check_nobody_at_work(study, url)
        store.ask(study)
        with pytest.raises(InputError, match=rf"--fresh: process {os.getpid()} on .* wait for its end"):
            running._check_nobody_at_work(study, url)
    running._check_nobody_at_work(study, url)
    running._check_nobody_at_work(study, f"sqlite:///{tmp_path}/none.db")


@pytest.mark.slow
def test_trials_that_fail_in_a_row_stop_all_workers(image_cache: Path, tmp_path: Path) -> None:
    command = Command(tmp_path / "failing", image_cache)
    file = tmp_path / "failing" / "studies" / "tiny.py"
    text = file.read_text() + (
        "\n\nclass Broken(type(train.backbone)):\n"
        "    def build(self, classes, image_size):\n        raise RuntimeError('no such layer')\n\n\n"
        "STUDY = dataclasses.replace(STUDY, train=dataclasses.replace(train, backbone=Broken()))\n"
    )
    file.write_text(text)
    process = command.start("--workers", "2")
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "trials in a row failed, the last one with RuntimeError: no such layer" in output
    assert "Traceback" not in output
    assert len(command.trials()) < 9


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_workers_killed_at_random_lose_nothing_and_do_nothing_twice(image_cache: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    chance, kills, found = random.Random(seed), 0, []
    for number in range(3):
        command = Command(tmp_path / str(number), image_cache, epochs=4, trials=40)
        for _ in range(20):  # starts of the command; a killed coordinator is one that was not its last
            process = command.start("--workers", "3")
            kills += rage(command, process, chance, at_most=8)
            if process.returncode == 0:
                break
        command.check()
        found.append(command.results())
    assert found[0] == found[1] == found[2]
    assert kills >= 20


def rage(command: Command, process: Process, chance: random.Random, at_most: int) -> int:
    """Kill workers, and now and then their coordinator, at random moments; returns how many before it ended."""
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.communicate()[0]), daemon=True)
    reader.start()
    kills = 0
    while process.poll() is None:
        time.sleep(chance.uniform(0.3, 2.5))
        workers = children(process.pid)
        if kills == at_most or not workers or not command.begun():
            continue
        victim = process.pid if chance.random() < 0.15 else chance.choice(workers)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            kills += 1
        if victim == process.pid:
            wait_until_gone(workers)
    reader.join()
    print(process.returncode, said[0][-1500:])
    return kills


DEADLY = """
import os
import signal
from multiprocessing import parent_process

from tests.small import SmallNet


class Deadly(SmallNet):
    def build(self, classes, image_size):
        if parent_process() is not None:  # as when memory is short for one worker's model
            os.kill(os.getpid(), signal.SIGKILL)
        return super().build(classes, image_size)


STUDY = dataclasses.replace(STUDY, train=dataclasses.replace(STUDY.train, backbone=Deadly()))
"""


@pytest.mark.slow
def test_workers_that_die_each_time_end_the_command(image_cache: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, image_cache)
    with (tmp_path / "studies" / "tiny.py").open("a") as file:
        file.write(DEADLY)
    process = command.start("--workers", "2")
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "starting another" in output
    assert "error: Workers die repeatedly (killed by signal 9)" in output
    assert "Resume with:" in output
    assert "Traceback" not in output


def test_workers_that_would_have_nothing_to_do_are_not_started(image_cache: Path, tmp_path: Path) -> None:
    study, url = study_in(tmp_path, image_cache)
    final = FinalConfig(seeds=2, compare_base=True, publish=False)
    two, nine = (dataclasses.replace(study, trials=count, final=final) for count in (2, 9))
    with open_store(two, url) as store:
        assert of_use(8, nine, store, False) == 8
        assert of_use(8, two, store, False) == 4, "two seeds of the best and of the base"
        for _ in range(2):
            store.tell(store.ask(two), Completed(value=0.5), [epoch_result(1, 0.3), epoch_result(2, 0.5)], 1.0)
        seeds = [{"seed": 0, "correct": 5, "total": 8, "accuracy": 0.625, "loss": 1.0, "weights": "", "epochs": []}]
        store.set_attribute(
            "final", summary(seeds) | {"trial": 0, "fit_on": "train", "test_openings": 1} | NOT_COMPARED
        )
        assert of_use(8, nine, store, False) == 7
        assert of_use(8, two, store, False) == 1
        assert of_use(8, two, store, True) == 4, "the test set is opened again"
        assert of_use(1, nine, store, False) == 1


def test_the_cores_are_divided_among_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("harness.workers.pool.cores", lambda: 8)
    assert surroundings(3, 1, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    assert surroundings(16, 1, "cpu") == [{"OMP_NUM_THREADS": "1"}] * 16
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert surroundings(2, 1, "cpu") == [{"OMP_NUM_THREADS": "5"}] * 2


def test_workers_do_not_share_a_gpu_that_is_named() -> None:
    two = RunOptions(workers=2)
    with pytest.raises(InputError, match=r"--device cuda:1 names one GPU.*CUDA_VISIBLE_DEVICES"):
        running._with_workers(two, "cuda:1", "cuda")


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_workers_cannot_share_a_gpu_where_there_is_none(engine: Literal["processes", "ray"]) -> None:
    four = RunOptions(engine=engine, workers=4, workers_per_gpu=2, ray_address="nowhere:1")
    with pytest.raises(InputError, match=r"--workers-per-gpu 2 .* computed on cpu; omit the option"):
        running._with_workers(four, "auto", "cpu")


def test_each_worker_has_a_gpu_of_its_own_unless_they_are_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert surroundings(2, 1, "cuda") == [
        {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "4"},
        {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "7"},
    ]
    shared = [each["CUDA_VISIBLE_DEVICES"] for each in surroundings(4, 2, "cuda")]
    assert shared == ["4", "4", "7", "7"]
    with pytest.raises(InputError, match=r"--workers 3 needs 3 GPUs .* there are 2; give fewer --workers"):
        surroundings(3, 1, "cuda")
