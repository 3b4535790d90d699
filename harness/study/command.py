"""What a process was asked to do with a study, and who is shown what happens."""

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
    """`study` is that of `found` with what the `options` change of it; `hooks` are called with its events."""

    options: RunOptions
    found: Found
    study: Study
    url: str  # of its database
    console: StudyConsole
    hooks: Sequence[Callable[[Event], object]] = ()

    def beside(self, suffix: str) -> Path:
        """A folder that belongs to the study's results."""
        return self.found.beside(self.url, suffix)

    def say(self, text: str) -> None:
        """A sentence for people, wrapped by their terminal."""
        self.console.print(text, highlight=False, soft_wrap=True)


def content_of(study: Study) -> dict[str, str]:
    """Fingerprints of what a definition only names; the first time, the images are decoded for them."""
    return {"data": prepare(study.train.data), "weights": study.train.backbone.weights()}
