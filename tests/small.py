"""A backbone and a study of milliseconds, for tests of what surrounds a training."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from torch import nn

from harness.cli.commands import main
from harness.config.contracts import Backbone
from harness.config.study import Study
from tests.conftest import make_study


@dataclass(frozen=True, kw_only=True)
class SmallNet(Backbone):
    """Everything that has a state: convolutions, BatchNorm, dropout; no depth takes more than a moment."""

    hidden: tuple[int, ...] = (16,)
    dropout: float = 0.3

    def check(self, image_size: int) -> None:
        """Takes all."""

    def build(self, classes: int, image_size: int) -> nn.Module:
        head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        width = 6
        for each in self.hidden:
            head += [nn.Linear(width, each), nn.ReLU(), nn.Dropout(self.dropout)]
            width = each
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            nn.Sequential(*head, nn.Linear(width, classes)),
        )

    def depths(self, by: Literal["block", "layer"]) -> list[str]:
        return ["0.", "1.", "2."]

    def fingerprint(self) -> str:
        return "none"


def small_study(cache: Path | str) -> Study:
    """The tests' tiny study with the small net."""
    study = make_study(cache)
    return dataclasses.replace(study, train=dataclasses.replace(study.train, backbone=SmallNet()))


def study_in(folder: Path, cache: Path) -> tuple[Study, str]:
    """Write the small study's file into a folder as a user has one; returns the study and its database's URL."""
    (folder / "studies").mkdir()
    (folder / "studies" / "tiny.py").write_text(
        f"from tests.small import small_study\n\nSTUDY = small_study({str(cache)!r})\n"
    )
    return small_study(cache), f"sqlite:///{folder}/studies/tiny.db"


def copied(finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a folder's studies in `place`, which becomes the working directory."""
    shutil.copytree(finished / "studies", place / "studies")
    monkeypatch.chdir(place)
    return place


Run = Callable[..., tuple[int, str, str]]  # of arguments; gives the exit code, stdout and stderr


def command(name: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command on the study "tiny", in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main([name, "tiny", *arguments])
        except SystemExit as ended:  # argparse's own way
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
