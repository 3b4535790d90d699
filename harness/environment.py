"""What a number was computed with: versions, device, threads, and the commit of this code."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed and kept."""
    packages = ("torch", "torchvision", "optuna", "mlflow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def environment(device: str) -> dict[str, str]:
    """All that may change a trained number's last bits, and the code's commit. `device` is a torch device type."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    relevant = {key: value for key, value in versions().items() if key in ("torch", "torchvision")}
    return {**relevant, "device": name, "threads": str(torch.get_num_threads()), "commit": git_commit()}


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def git_commit() -> str:
    """The commit of this code, with "+changes" if the working tree differs, or "unknown"."""
    where = Path(__file__).resolve().parent.parent
    try:
        commands = ["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]
        commit, changes = (
            subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + ("+changes" if changes.strip() else "")
