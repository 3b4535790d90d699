"""What a measurement was made on, in one line."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def describe() -> str:
    """Processor, cores, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    if torch.cuda.is_available():
        processor += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "optuna", "mlflow"))
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {versions}"
    )
