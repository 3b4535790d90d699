"""Two commands on one PostgreSQL whose workers are killed at random; `tests.workers.test_pool` has those on SQLite."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.base.errors import InputError
from harness.base.processes import in_words
from harness.store.database import check_database as has_tables
from harness.store.opening import read_store
from tests.conftest import PROJECT
from tests.mlflow_server import Server
from tests.postgres import PostgreSQL
from tests.study.test_postgres_commands import assert_one_study
from tests.workers.test_pool import Command, children, rage

pytestmark = pytest.mark.chaos

TRIALS, STUDIES, KILLS = 40, 3, 4  # kills at most of each start of a command
STARTS = 20  # of a command; one that was killed is started again


class Machine(Command):
    """The command in a folder of its own, on a storage and an MLflow that are others' too."""

    def __init__(self, place: Path, cache: Path, database: str, server: Server) -> None:
        super().__init__(place, cache, epochs=4, trials=TRIALS)
        self.started: list[subprocess.Popen[str]] = []
        self.url, self.places = database, ["--storage", database, "--tracking-uri", server.uri]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        self.started.append(super().start(*self.places, *arguments))
        return self.started[-1]

    def end(self) -> None:
        """End what a failed test has left."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def begun(self) -> int:
        """How many trials this machine's own workers are at: one that still starts has nothing to lose."""
        if not has_tables(self.url):
            return 0
        with contextlib.suppress(InputError), read_store("tiny", self.url) as store:  # there may be no study yet
            mine = {f"{pid} on {socket.gethostname()}" for pid in children(self.started[-1].pid)}
            return sum(in_words(owner) in mine for owner in store.active_workers().values())
        return 0

    def has_model(self) -> bool:
        return (self.place / "studies" / "tiny.model" / "model.json").is_file()

    def doctor(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "harness", "doctor", "tiny", *self.places],
            cwd=self.place,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def server(postgres: PostgreSQL, tmp_path: Path) -> Iterator[Server]:
    """An MLflow server with its database on the same PostgreSQL."""
    started = Server(tmp_path, postgres.create())
    started.start()
    yield started
    started.kill()


def survive(machine: Machine, seed: str, kills: list[int]) -> None:
    """Start the command until it comes to its end, killing workers and now and then the command itself."""
    chance = random.Random(seed)
    for _ in range(STARTS):
        process = machine.start("--workers", "2")
        kills.append(rage(machine, process, chance, KILLS))
        if process.returncode == 0:
            return


@pytest.mark.timeout(1800)
def test_two_commands_whose_workers_are_killed_at_random_lose_nothing_and_do_nothing_twice(
    postgres: PostgreSQL,
    server: Server,
    image_cache: Path,
    tmp_path: Path,
) -> None:
    """They share no folder, so a trial that the other takes up begins anew."""
    seed = os.environ.get("CHAOS_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    kills: list[int] = []
    found = []
    for number in range(STUDIES):
        database = postgres.create()
        machines = [Machine(tmp_path / f"{number}-{name}", image_cache, database, server) for name in ("one", "two")]
        try:
            with ThreadPoolExecutor() as both:
                done = [
                    both.submit(survive, machine, f"{seed} {number} {machine.place.name}", kills)
                    for machine in machines
                ]
                for each in done:
                    each.result()
        finally:
            for machine in machines:
                machine.end()
        assert_one_study(database, server.uri, TRIALS, seeds=2)
        assert {trial.state for trial in machines[0].trials()} == {"complete"}
        said = [each.doctor() for each in machines if each.has_model()]
        assert said
        assert all(f"agree on {TRIALS} finished trials." in each.stdout for each in said), [
            each.stdout for each in said
        ]
        found.append(machines[0].results())
        print(f"study {number}: {sum(kills)} kills so far in {len(kills)} starts")
    assert all(each == found[0] for each in found)
    assert sum(kills) >= 20
