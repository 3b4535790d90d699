"""A real Ray cluster of several nodes on this machine, and studies that run on it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.base.keys import trial_key
from harness.config.find import PROJECT
from harness.store.opening import read_store
from tests.forked import Process
from tests.patience import PATIENCE_SECONDS

OBJECT_STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MiB
TASK = "ray::tiny worker"  # what its process is called
# Its backbone is defined in the study's file, which workers must have loaded before they can be told of it.
STUDY_FILE = """
import dataclasses
import time
from dataclasses import dataclass

from harness.config.train import FinalConfig
from tests.faulty import Pebble, small_study


@dataclass(frozen=True, kw_only=True)
class Slow(Pebble):
    def build(self, classes, image_size):
        model = super().build(classes, image_size)
        forward = model.forward

        def slow(images):
            if model.training:
                time.sleep(0.1)
            return forward(images)

        model.forward = slow
        return model


STUDY = dataclasses.replace(
    small_study("data/cache", backbone=Slow(), epochs=4),
    name="tiny",
    trials=5,
    final=FinalConfig(seeds=1, publish=False, compare_base=False),
)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no workers; tests add nodes."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    handler = signal.getsignal(signal.SIGTERM)  # Ray takes it for itself
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets lie in it, whose paths must be short
    # `Cluster` writes its address into RAY_TMPDIR/ray, and makes no folder for it. By default that is one which only
    # `ray start` makes; and a Ray of this machine's user would be forgotten by its own commands.
    (place / "ray").mkdir()
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(place))
        patch.setenv("RAY_worker_niceness", "0")  # by default 15: beside a busy process they get 3 % of a core
        cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": str(place / "ray")})
        try:
            yield cluster
        finally:
            cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def nodes(cluster: Any, count: int, num_cpus: int = 1, num_gpus: int = 0) -> Iterator[list[Any]]:
    added = []
    try:
        for _ in range(count):
            node = cluster.add_node(num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=OBJECT_STORE)
            added.append(node)
        cluster.wait_for_nodes()
        yield added
    finally:
        for node in added:
            if node in cluster.worker_nodes:
                # Else it takes Ray 13 s to notice.
                cluster.remove_node(node, allow_graceful=True)
        cluster.wait_for_nodes()  # until Ray knows that they are gone


def tasks(nodes: Sequence[Any]) -> list[int]:
    """The PIDs of the processes on these nodes that are at a worker's task."""
    raylets = [str(each.process.pid) for node in nodes for each in node.all_processes["raylet"]]
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", ",".join(raylets)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if TASK in line]


def working(url: str, nodes: Sequence[Any]) -> Any:
    """A node at work on a trial, one with an epoch first: by the parent of the process that holds the trial."""
    raylets = {each.process.pid: node for node in nodes for each in node.all_processes["raylet"]}
    with read_store("tiny", url) as store:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            begun = {trial_key(trial.number) for trial in store.trials() if trial.curve}
            for key, owner in sorted(store.active_workers().items(), key=lambda each: each[0] not in begun):
                status = Path("/proc", owner.rpartition("/")[2].partition(" ")[0], "status")
                parent = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid")]
                if key.startswith("trial") and int(parent[0]) in raylets:
                    return raylets[int(parent[0])]
            time.sleep(0.02)
    raise AssertionError("no trial was begun")


class Command:
    """`run_study.py --engine ray` in a folder, line by line."""

    def __init__(self, place: Path, address: str, *arguments: str) -> None:
        (place / "studies").mkdir(exist_ok=True)
        (place / "studies" / "tiny.py").write_text(STUDY_FILE)
        command = [str(PROJECT / "run_study.py"), "--study", "tiny", "--engine", "ray", "--ray-address", address]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        self.said = ""
        self.process = Process([*command, *arguments], cwd=place, env=environment)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def until(self, words: str) -> None:
        for line in self.process.stdout:
            self.said += line
            if words in line:
                return
        raise AssertionError(f"{words!r} was not said:\n{self.said}")

    def end(self) -> int:
        self.said += self.process.communicate()[0]
        return self.process.wait()


def url_in(place: Path) -> str:
    return f"sqlite:///{place}/studies/tiny.db"


def check_whole(place: Path, trials: int, url: str | None = None) -> None:
    """Exactly that many results, nothing running, one final run, one MLflow run a trial, and a silent doctor."""
    with read_store("tiny", url or url_in(place)) as store:
        assert [(trial.number, trial.state) for trial in store.trials()] == [(n, "complete") for n in range(trials)]
        assert store.has_final()
        assert len(store.ledger()) == 2  # one opening of the test set and its result
        assert store.active_workers() == {}
    database = sqlite3.connect(place / "mlruns" / "mlflow.db")
    query = "SELECT name FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'harness.kind' AND tags.value = 'trial'"
    names = Counter(name for (name,) in database.execute(query))
    database.close()
    assert len(names) == trials, names
    assert set(names.values()) == {1}, names
    assert not (place / "studies" / "tiny.checkpoints").exists()
    doctor = Process(["-m", "harness", "doctor", "tiny", *(["--storage", url] if url else [])], cwd=place)
    said, _ = doctor.communicate()
    assert doctor.returncode == 0, said
    assert said.startswith("Storage, MLflow, checkpoints and processes agree"), said
