"""Studies whose workers are tasks on a Ray cluster: a real one, of several nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.database import connect, dispose
from harness.errors import InputError
from harness.leases import LeaseLost, Leases, make_table
from harness.opening import open_store, read_store
from harness.worker import Order, opened
from tests.conftest import PROJECT
from tests.refusal import assert_refused
from tests.small import study_in

ray = pytest.importorskip("ray", reason="Ray is not installed")

OBJECT_STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MiB
PATIENCE_SECONDS = 150
# Its backbone is defined in the study's file, which workers must have loaded before they can be told of it.
STUDY_FILE = """
import dataclasses
import time
from dataclasses import dataclass

from harness.config import FinalConfig
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
    final=FinalConfig(seeds=2, publish=False, compare_base=False),
)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no workers; tests add nodes."""
    from ray.cluster_utils import Cluster

    handler = signal.getsignal(signal.SIGTERM)  # Ray takes it for itself
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it, whose paths must be short
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": False, "temp_dir": place}
    cluster = Cluster(initialize_head=True, head_node_args=head)
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
                cluster.remove_node(node, allow_graceful=False)
        cluster.wait_for_nodes()  # until Ray knows that they are gone


def working(place: Path, nodes: list[Any]) -> Any:
    """The first of the nodes that is found at work on a trial: by the parent of the process that holds it."""
    raylets = {each.process.pid: node for node in nodes for each in node.all_processes["raylet"]}
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            for key, owner in store.at_work().items():
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
        command = [sys.executable, str(PROJECT / "run_study.py"), "--study", "tiny", "--engine", "ray"]
        self.said = ""
        self.process = subprocess.Popen(
            [*command, "--ray-address", address, *arguments],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if words in line:
                return
        raise AssertionError(f"{words!r} was not said:\n{self.said}")

    def end(self) -> int:
        self.said += self.process.communicate(timeout=PATIENCE_SECONDS)[0]
        return self.process.returncode


def check_whole(place: Path, trials: int) -> None:
    """Exactly that many results, nothing running, one final run, one MLflow run a trial, and a silent doctor."""
    with read_store("tiny", f"sqlite:///{place}/studies/tiny.db") as store:
        assert [(trial.number, trial.state) for trial in store.trials()] == [(n, "complete") for n in range(trials)]
        assert store.has_final()
        assert len(store.ledger()) == 2  # one opening of the test set and its result
        assert store.at_work() == {}
    database = sqlite3.connect(place / "mlruns" / "mlflow.db")
    query = "SELECT name FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'harness.kind' AND tags.value = 'trial'"
    names = Counter(name for (name,) in database.execute(query))
    database.close()
    assert len(names) == trials, names
    assert set(names.values()) == {1}, names
    assert not (place / "studies" / "tiny.checkpoints").exists()
    doctor = subprocess.run(
        [sys.executable, "-m", "harness", "doctor", "tiny"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert doctor.stdout.startswith("Storage, MLflow, checkpoints and processes agree"), doctor.stdout


@pytest.mark.slow
def test_a_study_runs_on_three_nodes(cluster: Any, tmp_path: Path, mlruns: Path) -> None:
    with nodes(cluster, 3), Command(tmp_path, cluster.address) as command:
        assert command.end() == 0, command.said
    assert "3 workers" in command.said  # one for each node, as nothing else was asked for
    check_whole(tmp_path, trials=5)


@pytest.mark.slow
def test_a_study_loses_one_of_three_nodes_in_mid_trial_and_nothing_else(
    cluster: Any, tmp_path: Path, mlruns: Path
) -> None:
    with nodes(cluster, 3) as three, Command(tmp_path, cluster.address) as command:
        command.until("3 workers")
        cluster.remove_node(working(tmp_path, three), allow_graceful=False)
        assert command.end() == 0, command.said
    assert "was interrupted" in command.said
    assert "raylet" not in command.said  # what Ray says of it is for its logs
    check_whole(tmp_path, trials=5)


@pytest.mark.slow
def test_ctrl_c_stops_the_tasks_which_write_checkpoints_and_the_same_command_goes_on(
    cluster: Any, tmp_path: Path, mlruns: Path
) -> None:
    with nodes(cluster, 2), Command(tmp_path, cluster.address) as command:
        command.until("epoch 2/4")
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130, command.said
    last = command.said.splitlines()[-2:]
    assert last[0] == "Go on with:"
    assert "--engine ray" in last[1]
    assert "Traceback" not in command.said
    kept = [path.name for path in (tmp_path / "studies" / "tiny.checkpoints").iterdir()]
    assert kept
    assert all(name.startswith("trial-") and name.endswith(".safetensors") for name in kept), kept
    with nodes(cluster, 2), Command(tmp_path, cluster.address) as command:
        assert command.end() == 0, command.said
    assert "goes on in epoch" in command.said or "goes on with" in command.said
    check_whole(tmp_path, trials=5)


@pytest.mark.slow
def test_weights_come_back_from_a_node_that_does_not_share_the_checkpoints(tmp_path: Path, mlruns: Path) -> None:
    """The node sees another folder in the place of the coordinator's: it has a file system of its own there."""
    checkpoints = tmp_path / "studies" / "tiny.checkpoints"
    checkpoints.mkdir(parents=True)
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    script = Path(sys.executable).with_name("ray")
    small = f"--object-store-memory={OBJECT_STORE}"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(PROJECT)}
    begin = [script, "start", "--head", "--port=0", "--num-cpus=0", small, "--include-dashboard=false", "--block"]
    head = subprocess.Popen([*begin, f"--temp-dir={place}"], env=environment, stdout=subprocess.PIPE, text=True)
    node = None
    try:
        assert head.stdout is not None
        address = next(line.split("'")[1] for line in head.stdout if "--address=" in line)
        mount = f"mount -t tmpfs tmpfs {checkpoints} && exec {script} start --address={address} --num-cpus=1 {small}"
        command = ["unshare", "-m", "sh", "-c", f"{mount} --block"]
        node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert node.stdout is not None
        said = next((line for line in node.stdout if "started" in line), None)
        if said is None:
            pytest.skip("a file system of its own for a node takes root on Linux")
        with Command(tmp_path, address, "--trials", "1") as study:
            assert study.end() == 0, study.said
        # The final seeds were trained there, once, and their weights were found here.
        assert study.said.count("final seed 0  epoch 4/4") == study.said.count("final seed 1  epoch 4/4") == 1
        assert "starts again" not in study.said
        check_whole(tmp_path, trials=1)
    finally:
        for process in (node, head):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=30)
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_workers_ask_for_what_the_cluster_has(cluster: Any) -> None:
    """GPUs are what a node says it has; nothing is computed here."""
    code = f"""
import json, sys
from harness.ray_cluster import connect, needs
connect({cluster.address!r})
found = [needs(*each) for each in json.loads(sys.argv[1])]
print(json.dumps([[each.workers, each.cpus, each.gpus, each.places] for each in found]))
"""
    asked = [(None, 1, "cpu"), (2, 1, "cpu"), (20, 1, "cpu"), (None, 2, "cuda"), (1, 1, "cuda")]
    command = [sys.executable, "-c", code, json.dumps(asked)]
    with nodes(cluster, 1, num_cpus=8, num_gpus=2):
        found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [[1, 8, 0, 1], [2, 4, 0, 2], [20, 1, 0, 8], [4, 2, 0.5, 4], [1, 4, 1.0, 2]]
    refused = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert "room for a worker, which takes 1 CPU; all of its nodes have 0 CPUs and 0 GPUs" in refused.stderr


ADDRESSES = {
    "nobody there": ("127.0.0.1:9", ["No Ray cluster answers at --ray-address 127.0.0.1:9", "ray start --head"]),
    "an unknown host": ("db.invalid:6379", ["No Ray cluster answers at --ray-address db.invalid:6379"]),
    "Ray's client": ("ray://127.0.0.1:10001", ["neither auto nor HOST:PORT"]),
    "no port": ("head", ["neither auto nor HOST:PORT"]),
    "a port that cannot be": ("head:99999", ["neither auto nor HOST:PORT"]),
    "nothing": ("", ["it is empty"]),
}


@pytest.mark.parametrize("address", ADDRESSES, ids=ADDRESSES.keys())
def test_a_cluster_that_is_not_there(address: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, words = ADDRESSES[address]
    arguments = ["run", "--study", "demo", "--device", "cpu", "--engine", "ray", "--ray-address", given]
    assert_refused(workspace, capsys, arguments, words)


def test_wrong_engines(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--engine", "dask"], ["invalid choice: 'dask'"])
    words = ["--ray-address names a cluster for --engine ray"]
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--ray-address", "auto"], words)


def test_ray_that_is_not_installed_is_named(tmp_path: Path, image_cache: Path) -> None:
    """A Python that does not find it; the rest of the packages are there."""
    study_in(tmp_path, image_cache)
    code = "\n".join(
        [
            "import importlib.util, sys",
            "find = importlib.util.find_spec",
            "importlib.util.find_spec = lambda name, package=None: None if name == 'ray' else find(name, package)",
            "from harness.cli import process",
            "process(['run', '--study', 'tiny', '--engine', 'ray'])",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'error: --engine ray needs Ray; install it with pip install -e ".[ray]".\n'
    assert not (tmp_path / "studies" / "tiny.db").exists()


def test_a_worker_with_other_versions_is_refused(tmp_path: Path, image_cache: Path) -> None:
    study, url = study_in(tmp_path, image_cache)
    order = Order(
        file=tmp_path / "studies" / "tiny.py",
        settings=(),
        data_root=None,
        device=None,
        trials=3,
        url=url,
        checkpoints=tmp_path / "tiny.checkpoints",
    )
    with open_store(study, url) as store:
        store.set_attribute("versions", {"python": "3.11.0", "optuna": "4.0"})
        with pytest.raises(InputError, match=r"optuna was 4\.0, is .* here"), opened(order, None):  # type: ignore[arg-type]
            pass


def test_who_falls_silent_loses_what_another_process_holds_for_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    storage = connect(url)
    make_table(storage.engine)
    leases = Leases(storage.engine, "0123456789abcdef", tmp_path / "study.db", seconds=1.0)
    silent, living = leases.of("elsewhere/pid:[1]/7 a"), leases.of("elsewhere/pid:[1]/8 b")
    assert silent.claim("trial-0")
    assert living.claim("trial-1")
    for _ in range(3):
        time.sleep(0.5)
        living.renew()
    assert leases.claim("trial-0")
    assert not leases.claim("trial-1")
    living.check("trial-1")
    with pytest.raises(LeaseLost):
        silent.check("trial-0")
    leases.dismiss(living.owner)
    assert leases.claim("trial-1")
    leases.close()
    dispose(storage)
