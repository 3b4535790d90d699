"""Describe the machine of a measurement, and whether anything else ran on it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from harness.base.environment import processor
from harness.base.mounts import MOUNTS, file_system

NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in the user's, too
STAT = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")


def describe() -> str:
    """Processor, cores, threads and versions."""
    name = processor()
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision", "optuna", "mlflow"))
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {versions}"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def kind() -> str:
    """The kind of machine: what a ratio on one says about another holds for the same kind alone.

    Writing a database costs nothing where temporary files are in memory.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = "".join(f", {key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    disk = file_system(Path(tempfile.gettempdir()).resolve(), MOUNTS.read_text()) if MOUNTS.exists() else None
    return f"{processor()}{numbers}, {os.cpu_count()} cores, temporary files on {disk or 'an unknown file system'}"


class Others:
    """What other processes, and other virtual machines, have taken of the processor since this was made."""

    def __init__(self) -> None:
        self._began, self._used = time.monotonic(), _used_by_others()

    def cores(self) -> float | None:
        """How many cores they kept busy on average; None where that cannot be seen (it takes Linux's /proc/stat).

        Children of this process are others until they have been waited for.
        """
        used = _used_by_others()
        if used is None or self._used is None:
            return None
        return max(0.0, used - self._used) / (time.monotonic() - self._began)


def _used_by_others() -> float | None:
    """Seconds of all processors since the machine's start, without those of this process and its children."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0]
    except FileNotFoundError:
        return None
    ticks = dict(zip(STAT, map(int, first.split()[1:]), strict=False))
    busy = sum(count for name, count in ticks.items() if name not in NOT_BUSY) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])
