"""Joining a Ray cluster: what is refused, and what its workers ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.base.errors import Halt, InputError
from harness.store.opening import open_store
from harness.workers.ray_cluster import Needs
from harness.workers.worker import WorkerConfig, opened
from tests.conftest import PROJECT
from tests.faulty import CommandLine
from tests.refusal import assert_refused
from tests.small import study_in

pytest.importorskip("ray", reason="Ray is not installed")
from ray._private.utils import write_ray_address

from harness.workers.ray_head import Arrived
from harness.workers.ray_workers import RayWorkers


def order_in(place: Path, url: str) -> WorkerConfig:
    return WorkerConfig(
        file=place / "studies" / "tiny.py",
        settings=(),
        data_root=None,
        device=None,
        trials=3,
        url=url,
        checkpoints=place / "tiny.checkpoints",
    )


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


def test_the_address_is_what_ray_takes_for_auto_too(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    words = ["No Ray cluster answers at RAY_ADDRESS 127.0.0.1:9"]
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--device", "cpu", "--engine", "ray"], words)


def test_a_cluster_of_this_machine_that_died_without_ray_stop(
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Ray keeps its address in a file, and would try it for minutes. Nodes that run here for others are not seen."""
    place = tmp_path_factory.mktemp("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
    (place / "ray").mkdir()
    arguments = ["run", "--study", "demo", "--device", "cpu", "--engine", "ray", "--ray-address", "auto"]
    assert_refused(workspace, capsys, arguments, ["No Ray cluster runs on this machine"])
    write_ray_address("127.0.0.1:9")
    words = ["The last Ray cluster of this machine, at 127.0.0.1:9, does not answer", "`ray stop`"]
    assert_refused(workspace, capsys, arguments, words)


@pytest.mark.slow
def test_a_finished_study_needs_no_cluster_but_an_address(line: CommandLine) -> None:
    assert line.run("--trials", "1").code == 0
    ray_at = ("--trials", "1", "--engine", "ray", "--ray-address")
    refused = line.run(*ray_at, "ray://127.0.0.1:10001")
    assert refused.code == 2
    assert "--ray-address 'ray://127.0.0.1:10001' is neither auto nor HOST:PORT" in refused.err
    assert line.run(*ray_at, "127.0.0.1:9").out.startswith("Nothing is missing")


def test_workers_without_a_place_do_not_shorten_the_time_that_is_left(tmp_path: Path) -> None:
    order = order_in(tmp_path, "")

    def at_once(workers: int, places: int) -> int:
        needs = Needs(workers=workers, cpus=1, gpus=0, places=places)
        return RayWorkers(order, None, needs).at_once  # type: ignore[arg-type]

    assert [at_once(20, 8), at_once(2, 8), at_once(4, 0)] == [8, 2, 1]


def test_a_node_that_takes_many_workers_along_is_outlived_and_a_worker_that_dies_each_time_is_not(
    tmp_path: Path, image_cache: Path
) -> None:
    study, url = study_in(tmp_path, image_cache)
    with open_store(study, url) as store:
        workers = RayWorkers(order_in(tmp_path, url), store, Needs(workers=8, cpus=1, gpus=0, places=16))
        for number in range(8):
            assert list(workers._heard(Arrived(number, "another node", f"elsewhere/pid:[1]/{number} a"))) == []
        again = Arrived(3, "another node", "elsewhere/pid:[1]/9 b")
        assert [list(workers._heard(again)) for _ in range(2)] == [[], []]
        with pytest.raises(Halt, match="Workers die repeatedly"):
            list(workers._heard(again))


def test_wrong_engines(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--engine", "dask"], ["invalid choice: 'dask'"])
    words = ["--ray-address needs --engine ray"]
    assert_refused(workspace, capsys, ["run", "--study", "demo", "--ray-address", "auto"], words)


@pytest.mark.slow
def test_ray_that_is_not_installed_is_named(tmp_path: Path, image_cache: Path) -> None:
    """A Python that does not find it; the rest of the packages are there."""
    study_in(tmp_path, image_cache)
    code = "\n".join(
        [
            "import importlib.util, sys",
            "find = importlib.util.find_spec",
            "importlib.util.find_spec = lambda name, package=None: None if name == 'ray' else find(name, package)",
            "from harness.cli.commands import process",
            "process(['run', '--study', 'tiny', '--engine', 'ray'])",
        ]
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'error: --engine ray needs Ray; install it with pip install -e ".[ray]".\n'
    assert not (tmp_path / "studies" / "tiny.db").exists()


@pytest.mark.slow
def test_a_worker_with_other_versions_is_refused(tmp_path: Path, image_cache: Path) -> None:
    study, url = study_in(tmp_path, image_cache)
    order = order_in(tmp_path, url)
    with open_store(study, url) as store:
        store.set_attribute("versions", {"python": "3.11.0", "optuna": "4.0"})
        with pytest.raises(InputError, match=r"optuna was 4\.0, is .* here"), opened(order):
            pass
