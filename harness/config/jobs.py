"""What a coordinator has others do, and who they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from harness.config.events import Event, Kind


@dataclass(frozen=True)
class Search:
    """Evaluate trials until the study has as many as it asks for."""


@dataclass(frozen=True)
class Train:
    """Train a trial's configuration again (`harness.final.retrain`); the trained weights stay in the checkpoint."""

    kind: Kind
    trial: int
    seed_number: int


Job = Search | Train


class Workers(Protocol):
    """Who works for a coordinator: processes of this machine (`harness.workers.pool`), or of a cluster."""

    @property
    def at_once(self) -> int:
        """How many there is room for, and so how many train side by side."""
        ...

    def search(self) -> Iterator[Event]:
        """Have the trials evaluated that the study lacks, yielding what happens."""
        ...

    def train(self, jobs: Sequence[Train]) -> Iterator[Event]:
        """Have these trained; each one's checkpoint lies with the coordinator's afterwards, if all went well."""
        ...
