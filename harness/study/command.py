"""A request to run a study: its options, study, console and callbacks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.events import Event
from harness.config.find import Found
from harness.config.options import RunOptions
from harness.config.study import Study
from harness.report.display import StudyConsole
from harness.workers.wire import KEY_VARIABLE


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

    def key_file(self) -> Path:
        """Return the file of the key that workers on other machines have, too."""
        given = self.options.key_file or os.environ.get(KEY_VARIABLE)
        return Path(given) if given else self.beside(".key")
