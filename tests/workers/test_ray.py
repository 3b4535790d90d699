"""Studies whose workers are tasks on a Ray cluster: a real one, of several nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from harness.store.database import connect, dispose
from harness.store.leases import LeaseLost, Leases, make_table
from tests.conftest import PROJECT
from tests.patience import PATIENCE_SECONDS
from tests.ray_nodes import OBJECT_STORE, Command, check_whole, nodes, tasks, url_in, working
from tests.workers.test_pool import wait_until_gone

ray = pytest.importorskip("ray", reason="Ray is not installed")


def test_a_study_runs_on_one_node(cluster: Any, tmp_path: Path, mlruns: Path) -> None:
    with nodes(cluster, 1), Command(tmp_path, cluster.address, "--trials", "1") as command:
        assert command.end() == 0, command.said
    assert "Asking Ray for 1 worker, 1 CPU each" in command.said
    check_whole(tmp_path, trials=1)


@pytest.mark.slow
def test_a_study_loses_one_of_three_nodes_in_mid_trial_and_nothing_else(
    cluster: Any, tmp_path: Path, mlruns: Path
) -> None:
    with nodes(cluster, 3) as three, Command(tmp_path, cluster.address) as command:
        command.until("3 workers")
        cluster.remove_node(working(url_in(tmp_path), three), allow_graceful=False)
        assert command.end() == 0, command.said
    assert "Asking Ray for 3 workers, 1 CPU each" in command.said  # one for each node, as nothing else was asked for
    assert "was interrupted" in command.said
    assert "raylet" not in command.said  # what Ray says of it is for its logs
    check_whole(tmp_path, trials=5)


@pytest.mark.slow
def test_a_study_in_postgresql_loses_one_of_two_nodes_in_mid_trial_and_nothing_else(
    cluster: Any, database: str, tmp_path: Path, mlruns: Path
) -> None:
    with nodes(cluster, 2) as two, Command(tmp_path, cluster.address, "--storage", database) as command:
        command.until("epoch 1/4")
        cluster.remove_node(working(database, two), allow_graceful=False)
        assert command.end() == 0, command.said
    assert "Asking Ray for 2 workers" in command.said
    assert "was interrupted" in command.said
    check_whole(tmp_path, trials=5, url=database)


@pytest.mark.slow
def test_ctrl_c_stops_the_tasks_which_write_checkpoints_and_the_same_command_goes_on(
    cluster: Any, tmp_path: Path, mlruns: Path
) -> None:
    with nodes(cluster, 2), Command(tmp_path, cluster.address) as command:
        command.until("epoch 2/4")
        command.process.send_signal(signal.SIGINT)
        assert command.end() == 130, command.said
    last = command.said.splitlines()[-2:]
    assert last[0] == "Resume with:"
    assert "--engine ray" in last[1]
    assert "Traceback" not in command.said
    kept = [path.name for path in (tmp_path / "studies" / "tiny.checkpoints").iterdir()]
    assert kept
    assert all(name.startswith("trial-") and name.endswith(".safetensors") for name in kept), kept
    with nodes(cluster, 2), Command(tmp_path, cluster.address) as command:
        assert command.end() == 0, command.said
    assert "resumes in epoch" in command.said or "resumes with" in command.said
    check_whole(tmp_path, trials=5)


@pytest.mark.slow
def test_a_killed_coordinator_takes_its_workers_along_and_leaves_nothing_but_checkpoints(
    cluster: Any, tmp_path: Path, mlruns: Path
) -> None:
    checkpoints = tmp_path / "studies" / "tiny.checkpoints"
    with nodes(cluster, 2) as two:
        with Command(tmp_path, cluster.address, "--set", "checkpoint_seconds=0.1") as command:
            command.until("epoch 2/4")
            workers = tasks(two)
            assert len(workers) == 2
        wait_until_gone(workers)
        assert {path.stem.partition("-")[0] for path in checkpoints.iterdir()} <= {"trial"}
        with Command(tmp_path, cluster.address, "--set", "checkpoint_seconds=0.1") as command:
            assert command.end() == 0, command.said
    check_whole(tmp_path, trials=5)


@pytest.mark.slow
def test_weights_come_back_from_a_node_that_does_not_share_the_checkpoints(tmp_path: Path, mlruns: Path) -> None:
    """The node sees another folder in the place of the coordinator's: it has a file system of its own there."""
    checkpoints = tmp_path / "studies" / "tiny.checkpoints"
    checkpoints.mkdir(parents=True)
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it, whose paths must be short
    script = Path(sys.executable).with_name("ray")
    small = f"--object-store-memory={OBJECT_STORE}"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(PROJECT)}
    environment |= {"RAY_TMPDIR": place, "RAY_worker_niceness": "0"}
    begin = [script, "start", "--head", "--port=0", "--num-cpus=0", small, "--include-dashboard=false", "--block"]
    head = subprocess.Popen([*begin, f"--temp-dir={place}/ray"], env=environment, stdout=subprocess.PIPE, text=True)
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
        with Command(tmp_path, address, "--trials", "1", "--set", "final.seeds=2") as study:
            assert study.end() == 0, study.said
        # The final seeds were trained there, once, and their weights were found here.
        assert study.said.count("final seed 0  epoch 4/4") == study.said.count("final seed 1  epoch 4/4") == 1
        assert "restarts" not in study.said
        check_whole(tmp_path, trials=1)
    finally:
        for process in (node, head):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=PATIENCE_SECONDS)
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_workers_ask_for_what_the_cluster_has(cluster: Any) -> None:
    """GPUs are what a node says it has; nothing is computed here."""
    code = f"""
import json, sys
from harness.workers.ray_cluster import connect, needs
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
    assert "room for a worker, which needs 1 CPU; all nodes together have 0 CPUs and 0 GPUs" in refused.stderr
    command[-1] = json.dumps([(2, 1, "cpu")])  # those that are asked for wait for nodes, which an autoscaler may bring
    assert json.loads(subprocess.check_output(command, cwd=PROJECT)) == [[2, 1, 0, 0]]


@pytest.mark.slow
def test_a_cluster_with_other_versions_is_named_with_both(cluster: Any) -> None:
    other = "import ray; ray.__version__ = '2.1.0'"
    code = f"{other}; from harness.workers.ray_cluster import connect; connect({cluster.address!r})"
    refused = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    python = ".".join(map(str, sys.version_info[:3]))
    runs = f"it runs Ray {ray.__version__} and Python {python}, but this machine has Ray 2.1.0 and Python {python}"
    assert f"The Ray cluster at {cluster.address} cannot be joined: {runs}; install" in refused.stderr


def test_who_falls_silent_loses_what_another_process_holds_for_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    storage = connect(url)
    make_table(storage.engine)
    leases = Leases(storage.engine, "0123456789abcdef", tmp_path / "study.db")
    silent, living = leases.of("elsewhere/pid:[1]/7 a"), leases.of("elsewhere/pid:[1]/8 b")
    assert silent.claim("trial-0")
    assert living.claim("trial-1")
    with storage.engine.begin() as connection:  # 60 seconds pass
        connection.execute(sqlalchemy.text("UPDATE harness_leases SET until = until - 60"))
    living.renew()
    assert leases.claim("trial-0")
    assert not leases.claim("trial-1")
    living.check("trial-1")
    with pytest.raises(LeaseLost):
        silent.confirm("trial-0")
    leases.dismiss(living.owner)
    assert leases.claim("trial-1")
    leases.close()
    dispose(storage)
