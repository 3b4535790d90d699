"""What a measurement was made on, in one line."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from harness.environment import processor


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
