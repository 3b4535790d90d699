"""Measure what checkpoints cost: their share of a whole demo study, and the time of one for each model.

    python -m benchmarks.checkpoint_cost [--trials 8]

Times every call of Checkpoint.save and Checkpoint.after_batch within one study, because the noise between two whole
studies is larger than the cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from harness.cli.commands import main as command
from harness.config import find as catalogue
from harness.training.assemble import assemble
from harness.training.checkpoint import Checkpoint
from harness.training.step import Runtime


class Spent:
    """Seconds in the methods of Checkpoint that run during a study, and how many files they wrote."""

    seconds = 0.0
    files = 0
    inside = False


def timed(name: str) -> None:
    """Count the time of a method of Checkpoint from now on; a save within a check is counted once."""
    inner = getattr(Checkpoint, name)

    def outer(self: Checkpoint) -> None:
        Spent.files += name == "save"
        if Spent.inside:
            inner(self)
            return
        Spent.inside, start = True, time.perf_counter()
        inner(self)
        Spent.inside = False
        Spent.seconds += time.perf_counter() - start

    setattr(Checkpoint, name, outer)


def share(trials: int, checkpoint_seconds: float) -> str:
    Spent.seconds, Spent.files = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        places = ["--storage", f"sqlite:///{folder}/study.db", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
        setting = ["--set", f"checkpoint_seconds={checkpoint_seconds}"]
        code = command(["run", "--study", "demo", "--trials", str(trials), *setting, *places])
        seconds = time.perf_counter() - start
    assert code == 0
    return (
        f"checkpoint_seconds={checkpoint_seconds:g}: {Spent.files} files, {Spent.seconds:.2f} s of {seconds:.1f} s = "
        f"{100 * Spent.seconds / seconds:.2f} %"
    )


def one_file(study: str, repetitions: int = 5) -> str:
    found = catalogue.find(study)
    config: Any = found.study.train
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, pretrained=False))
    drawn: Any = catalogue.find("demo").study.located(found.home, None, None).train.data
    size = config.data.image_size
    drawn = dataclasses.replace(drawn, image_size=size, stored_size=max(size, drawn.stored_size), limit=32)
    config = dataclasses.replace(config, data=drawn)
    runtime = Runtime(device=torch.device("cpu"), bf16=False, channels_last=False)
    training = assemble(config, runtime, 0)
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()  # now the optimizer has its moments
    training.progress.step = 1
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder) / "one.safetensors", {}, training, {})
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            checkpoint.save()
            times.append(time.perf_counter() - start)
        size = checkpoint.path.stat().st_size / 1e6
    return (
        f"{type(config.backbone).__name__}: {size:.0f} MB, {statistics.median(times):.2f} s "
        f"({min(times):.2f} to {max(times):.2f}, n = {repetitions})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    trials = parser.parse_args().trials
    print(describe())
    files = [one_file(study) for study in ("demo", "flowers102")]
    timed("save")
    timed("after_batch")
    print(*files, *(share(trials, seconds) for seconds in (60.0, 1.0)), sep="\n")


if __name__ == "__main__":
    main()
