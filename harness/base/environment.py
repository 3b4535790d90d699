"""The environment of a result: versions, device, cores, threads, and the commit of this code."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HARDWARE = ("device", "cuda", "cudnn", "driver")  # keys of `hardware`


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    packages = ("torch", "torchvision", "optuna", "mlflow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def environment(device: torch.device) -> dict[str, str]:
    """Return all that may change the last bits of a result on this device, and the code's commit."""
    import torch

    relevant = {key: value for key, value in versions().items() if key in ("torch", "torchvision")}
    return {**relevant, **hardware(device), "threads": str(torch.get_num_threads()), "commit": git_commit()}


def hardware(device: torch.device) -> dict[str, str]:
    """The device's name; on CUDA also the versions of CUDA (or ROCm), cuDNN and the driver."""
    import torch

    if device.type != "cuda":
        return {"device": processor()}
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": driver(),
    }


def driver(known: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of Nvidia's driver, which torch does not report; "unknown" if not found."""
    text = known.read_text() if known.is_file() else ""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(\.\d+)*)\s", text, re.MULTILINE)
    return found[1] if found else "unknown"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores this process may use, limited by CPU affinity and a container's quota.

    `root` is the root of the file system.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(math.ceil(quota) for quota in _quotas(root))])


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in cores, of each limited control group of this process and of its parents.

    A container may see its own group as the root, although /proc gives the host's path to it.
    """
    known = root / "proc/self/cgroup"
    for line in known.read_text().splitlines() if known.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # no controllers: version 2
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            place = top / group.relative_to("/")
            files = [place / "cpu.max"], [place / "cpu.cfs_quota_us", place / "cpu.cfs_period_us"]
            for each in files:
                text = " ".join(file.read_text() for file in each if os.access(file, os.R_OK))
                if limit := re.fullmatch(r"([1-9]\d*)\s+([1-9]\d*)\s*", text):  # else "max" or -1: no limit
                    yield int(limit[1]) / int(limit[2])


@cache
def git_commit() -> str:
    """Return this code's commit, with "+changes" if the working tree differs, or "unknown"."""
    where = Path(__file__).resolve().parents[2]
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
