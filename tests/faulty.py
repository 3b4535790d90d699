"""What the tests of faults share: a study of milliseconds, the command line in this process, and small disks."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from harness.cli.commands import main
from harness.config.contracts import Backbone
from harness.config.events import Event
from harness.config.study import Study
from harness.data import splits as tensors
from harness.final.retrain import Context
from harness.garden.dataset import Garden
from harness.models.backbone import with_head
from harness.report.overview import digest
from harness.store.opening import open_store, read_store
from harness.store.store import Store
from harness.study.stages import run
from harness.tracking.mlflow import MLflowTracker
from harness.training.assemble import decide_runtime
from tests.conftest import make_study

STUDY_FILE = "from tests.faulty import small_study\n\nSTUDY = small_study('data/cache')\n"


class Died(BaseException):
    """The process is gone at this point; nothing in a trial catches it."""


@dataclass(frozen=True, kw_only=True)
class Pebble(Backbone):
    """Two convolutions and a head. It has neither BatchNorm nor dropout, so parts of a batch add up to the batch."""

    hidden: tuple[int, ...] = (16,)
    dropout: float = 0.0

    def check(self, image_size: int) -> None:
        """It takes any size."""

    def build(self, classes: int, image_size: int) -> nn.Module:
        return with_head(_Pebble(classes), self.hidden, self.dropout, classes)

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return ["stem.", "blocks.0.", "classifier."]

    def fingerprint(self) -> str:
        return "none"


@dataclass(frozen=True, kw_only=True)
class Unhurried(Pebble):
    """A Pebble that rests before each training step, so that a signal finds it at work."""

    def build(self, classes: int, image_size: int) -> nn.Module:
        model = super().build(classes, image_size)
        model.register_forward_pre_hook(lambda module, _: time.sleep(0.1) if module.training else None)
        return model


class _Pebble(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 16, 2, stride=2)])
        self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(16, classes))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks[0](self.stem(images).relu())
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def small_study(cache: Path | str, **changes: Any) -> Study:
    """The study of `conftest.make_study` on images of 16 pixels with a Pebble; fields of its training in `changes`."""
    study = make_study(cache)
    data = Garden(train_per_class=2, val_per_class=2, test_per_class=2, image_size=16, stored_size=18, cache=str(cache))
    train = dataclasses.replace(study.train, **{"data": data, "backbone": Pebble()} | changes)
    return dataclasses.replace(study, train=train)


def everything(store: Store) -> tuple[Any, ...]:
    """The digest, and what every epoch of every trial came to: more than the digest says about the way there."""
    epochs = [[(each.lr, each.train, each.val) for each in trial.epochs] for trial in store.trials()]
    return digest(store), epochs


def complete(
    study: Study,
    place: Path,
    tracker: MLflowTracker | None = None,
    *,
    at: Callable[[Event], None] = lambda event: None,
    look: Callable[[Store], Any] = everything,
) -> Any:
    """Run here whatever the study in `place` lacks, calling `at` at every event; returns what `look` sees."""
    for loaded in (tensors._load, tensors.load_train_and_val):
        loaded.cache_clear()  # as a new process would
    with open_store(study, f"sqlite:///{place}/tiny.db") as store:
        if tracker is not None:
            tracker.start(study, store, {})
        runtime = decide_runtime(study.train, None)
        context = Context(study=study, store=store, runtime=runtime, checkpoints=place / "tiny.checkpoints")
        for event in run(context, place / "tiny.model"):
            if tracker is not None:
                tracker.show(event)
            at(event)
        return look(store)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """`run --study tiny` in this process, in a folder of its own with the study's file."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self._capsys = place, capsys
        (place / "studies").mkdir(exist_ok=True)

    def run(self, *arguments: str) -> Ended:
        (self.place / "studies" / "tiny.py").write_text(STUDY_FILE)
        self._capsys.readouterr()
        code = main(["run", "--study", "tiny", *arguments])
        out, err = self._capsys.readouterr()
        return Ended(code, out, err)

    def stored(self) -> tuple[int, Any]:
        """How many trials are finished, and all that they came to."""
        with read_store("tiny", f"sqlite:///{self.place}/studies/tiny.db") as store:
            return store.finished(), everything(store)


class Disk:
    """A file system of a few kilobytes, mounted on a folder."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(mounting, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("a small disk needs `mount`")
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.folder)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Disk]:
    """Skips the test when nothing can be mounted (it takes root on Linux)."""
    disk = Disk(folder, kilobytes)
    try:
        yield disk
    finally:
        disk.unmount()


def images(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """A seeded batch of standard normal pixels, and labels of 16 classes."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 16


def one_sentence(text: str) -> bool:
    """Whether a message on stderr is one for a person: a single `error:` line and no traceback."""
    return text.count("error: ") == 1 and "Traceback" not in text and len(text.strip().splitlines()) == 1
