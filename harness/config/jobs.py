"""Jobs of a coordinator, and its workers' protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from harness.config.events import Event, Kind


@dataclass(frozen=True)
class Search:
    """Evaluate trials until the study has enough of them."""


@dataclass(frozen=True)
class Train:
    """Retrain a trial's configuration (`harness.final.retrain`); the trained weights stay in the checkpoint."""

    kind: Kind
    trial: int
    seed_number: int


Job = Search | Train


class Workers(Protocol):
    """Protocol of workers: processes of this machine (`harness.workers.pool`) or of a cluster."""

    @property
    def at_once(self) -> int:
        """The number of workers, and so of parallel trainings."""
        ...

    def search(self) -> Iterator[Event]:
        """Evaluate the trials that the study lacks, yielding events."""
        ...

    def train(self, jobs: Sequence[Train]) -> Iterator[Event]:
        """Run these jobs, yielding events; on success, the coordinator then has each checkpoint."""
        ...
