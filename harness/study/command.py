"""A request to run a study: its options, study, console and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.events import Event
from harness.config.find import Found
from harness.config.options import RunOptions
from harness.config.study import Study
from harness.data.splits import prepare
from harness.report.display import StudyConsole


@dataclass(frozen=True, kw_only=True)
class Command:
    """`study` is that of `found`, changed by `options`; `hooks` are called with its events."""

    options: RunOptions
    found: Found
    study: Study
    url: str  # of its database
    console: StudyConsole
    hooks: Sequence[Callable[[Event], object]] = ()

    def beside(self, suffix: str) -> Path:
        """Return a folder of the study's results."""
        return self.found.beside(self.url, suffix)


def content_of(study: Study) -> dict[str, str]:
    """Return fingerprints of the images and weights; the first call decodes the images."""
    weights = ", ".join(each.fingerprint() for each in study.backbones())
    return {"data": prepare(study.train.data, *study.preprocessings()), "weights": weights}
