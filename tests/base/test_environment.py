"""What a number was computed with: the cores that a process has, and what is recorded of its device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from harness.base.environment import cores, driver, environment, processor
from harness.tracking.expected import facts
from harness.training import step as engine
from tests.conftest import make_study

# /proc/self/cgroup as it is: of a container (version 2), of a service below a limited slice (version 2), of a container
# that is told the host's path (version 1), of systems without limits (version 1, and both side by side).
CONTAINER = "0::/\n"
SERVICE = "0::/system.slice/batch.slice/study.service\n"
DOCKER = """\
12:pids:/docker/5be0fd1f
5:cpu,cpuacct:/docker/5be0fd1f
2:cpuset:/docker/5be0fd1f
1:name=systemd:/docker/5be0fd1f
"""
BOTH = """\
9:name=systemd:/
4:memory:/process_api/556e5cf2
2:cpuacct:/
1:cpu:/
0::/
"""
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        (CONTAINER, {"cpu.max": "200000 100000\n"}, 2),
        (CONTAINER, {"cpu.max": "150000 100000\n"}, 2),
        (CONTAINER, {"cpu.max": "5000 100000\n"}, 1),
        (CONTAINER, {"cpu.max": "max 100000\n"}, 8),
        (CONTAINER, {"cpu.max": "6400000 100000\n"}, 8),
        (CONTAINER, {}, 8),
        (SERVICE, {"system.slice/batch.slice/cpu.max": "300000 100000\n"}, 3),
        (
            SERVICE,
            {
                "system.slice/batch.slice/study.service/cpu.max": "max 100000\n",
                "system.slice/batch.slice/cpu.max": "700000 100000\n",
                "system.slice/cpu.max": "500000 100000\n",
            },
            5,
        ),
        (DOCKER, {f"cpu/{QUOTA}": "400000\n", f"cpu/{PERIOD}": "100000\n"}, 4),
        (DOCKER, {f"cpu/docker/5be0fd1f/{QUOTA}": "50000\n", f"cpu/docker/5be0fd1f/{PERIOD}": "25000\n"}, 2),
        (DOCKER, {f"cpu/{QUOTA}": "-1\n", f"cpu/{PERIOD}": "100000\n"}, 8),
        (DOCKER, {f"cpu/{QUOTA}": "400000\n"}, 8),
        (BOTH, {f"cpu/{QUOTA}": "-1\n", f"cpu/{PERIOD}": "100000\n"}, 8),
        (BOTH, {f"cpu/{QUOTA}": "100000\n", f"cpu/{PERIOD}": "100000\n"}, 1),
        (None, {}, 8),
        ("", {"cpu.max": "200000 100000\n"}, 8),
    ],
)
def test_a_process_has_the_cores_that_it_may_run_on_and_its_quota_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str], wanted: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    system = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (system if groups is None else {**system, "proc/self/cgroup": groups}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == wanted


def test_this_machine_has_at_least_a_core() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("said", "wanted"), [({}, 1), ({"OMP_NUM_THREADS": "3"}, 3), ({"MKL_NUM_THREADS": "3"}, 3)])
def test_torch_has_as_many_threads_as_there_are_cores_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], wanted: int
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, text in said.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(engine, "cores", lambda: 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        engine.keep_to_cores()
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
            "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)\n"
            "GCC version:  gcc version 12.3.0\n",
            "570.86.15",
        ),
        ("GCC version:  gcc version 12.3.0\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_drivers_version_is_read_where_linux_says_it(tmp_path: Path, text: str | None, wanted: str) -> None:
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert driver(tmp_path / "version") == wanted


def test_on_cuda_the_device_that_is_used_and_what_drives_it_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    here = environment(torch.device("cuda", 3))
    assert here["device"] == "GPU number 3"
    assert here["cuda"] == "13.0"
    assert here["cudnn"] == str(torch.backends.cudnn.version())
    assert "driver" in here
    tags = facts(make_study("cache"), {"device": "cuda"}, here)
    assert tags["hardware.device"] == "GPU number 3"
    assert {f"hardware.{name}" for name in ("cuda", "cudnn", "driver")} <= set(tags)


def test_on_a_cpu_its_name_is_recorded() -> None:
    here = environment(torch.device("cpu"))
    assert here["device"] == processor()
    assert "cuda" not in here
    assert facts(make_study("cache"), {}, here)["hardware.device"] == processor()
