"""A worker: a process that trains what its coordinator asks for, and tells it what happens.

It opens the study from its file, as the coordinator did, and writes results into the storage itself. Events and what
MLflow is to know go to the coordinator, which shows them and is the only one on its machine that writes MLflow.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import interrupt
from harness.environment import versions
from harness.errors import INTERRUPTED, Halt, InputError
from harness.jobs import Job, Search
from harness.results import EpochResult, Event, Reached, TrialStarted

if TYPE_CHECKING:
    from harness.config import Study, TrainConfig
    from harness.retraining import Place
    from harness.storage import Store
    from harness.tracking import RunLog, Tracker

ORPHAN_SECONDS = 120.0  # for the batch under way and its checkpoint


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker must know to open the study as its coordinator did."""

    file: Path
    settings: tuple[str, ...]
    data_root: str | None
    device: str | None
    trials: int
    url: str
    checkpoints: Path

    def study(self) -> Study:
        from harness import catalogue

        found = catalogue.find(str(self.file))
        study = found.study.with_settings(self.settings).located(found.home, self.data_root, self.device)
        return dataclasses.replace(study, trials=self.trials)


@dataclass(frozen=True)
class Told:
    """What a run in MLflow is told: a method of `tracking.RunLog`, or "open", and its arguments."""

    key: str
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Done:
    """The job has come to its end."""


@dataclass(frozen=True)
class Stopped:
    """The job cannot go on, and no other worker could do better."""

    error: Exception


Message = Event | Told | Done | Stopped


class Teller:
    """A tracker that passes on what it is told."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> RunLog:
        self._tell(Told(key, "open", (config, dict(tags))))
        return _Run(self._tell, key)

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """The coordinator's business, as is what follows."""

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> bool:
        return True

    def leave(self) -> bool:
        return True

    def interrupt(self) -> None:
        """The coordinator knows what is open."""


@dataclass(frozen=True)
class _Run:
    tell: Callable[[Message], None]
    key: str

    def epoch(self, result: EpochResult) -> None:
        self.tell(Told(self.key, "epoch", (result,)))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.tell(Told(self.key, "metrics", (dict(values), step)))

    def text(self, content: str, name: str) -> None:
        self.tell(Told(self.key, "text", (content, name)))

    def end(self, state: str) -> None:
        self.tell(Told(self.key, "end", (state,)))


class Listener:
    """The coordinator's side of `Teller`."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._runs: dict[str, RunLog] = {}

    def hear(self, told: Told) -> None:
        if told.method == "open":
            self._runs[told.key] = self._tracker.run(told.key, *told.arguments)
        else:
            getattr(self._runs[told.key], told.method)(*told.arguments)


def do(job: Job, place: Place, tell: Callable[[Message], None]) -> None:
    """Do a job to its end. What stops it for good is told too."""
    from harness.study import TooManyFailures

    try:
        with closing(_events(job, place)) as events:
            for event in events:
                tell(portable(event))
    except (TooManyFailures, Halt, InputError) as error:
        tell(Stopped(error))
    else:
        tell(Done())


def _events(job: Job, place: Place) -> Generator[Event, None, None]:
    from harness.retraining import Retraining
    from harness.study import search

    if isinstance(job, Search):
        yield from search(place.study, place.store, place.tracker, place.runtime, place.checkpoints)
    else:
        trial = next(each for each in place.store.trials() if each.number == job.trial)
        yield from Retraining(place, job.kind, trial, job.seed_number).train()


def portable(event: Event) -> Event:
    """An event that can be sent: of a training's progress, how far it is."""
    if isinstance(event, TrialStarted):
        return dataclasses.replace(event, progress=Reached.of(event.progress))
    return event


@contextmanager
def opened(order: Order, tracker: Tracker) -> Iterator[Place]:
    """The study as this worker sees it. Raises InputError when it is not the study that was begun."""
    from harness.opening import open_store

    study = order.study()
    with open_store(study, order.url, joining=True) as store:
        yield place_of(order, study, store, tracker)


def place_of(order: Order, study: Study, store: Store, tracker: Tracker) -> Place:
    """What a worker needs. Raises InputError when it would compute with other versions than its coordinator."""
    from harness.checkpoint import differences
    from harness.experiment import decide_runtime
    from harness.retraining import Place

    if differing := differences(store.attribute("versions") or {}, versions()):
        raise InputError(f"This study is computed elsewhere with other versions: {differing} here; install the same.")
    runtime = decide_runtime(study.train, store.attribute("runtime"))
    return Place(study=study, store=store, tracker=tracker, runtime=runtime, checkpoints=order.checkpoints)


def work(order: Order, line: connection.Connection) -> None:
    """The main function of a worker's process: do what comes over the line, until nothing more comes."""
    tell = functools.partial(_send, line)
    try:
        interrupt.install(quiet=True)
        _end_with_coordinator()
        with opened(order, Teller(tell)) as place:
            while (job := line.recv()) is not None:
                do(job, place, tell)
    except (Halt, InputError) as error:
        tell(Stopped(error))
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(INTERRUPTED)  # all is in the storage and the checkpoints; the coordinator says what there is to say


def _send(line: connection.Connection, message: Message) -> None:
    with interrupt.undivided():  # a message that is cut in two cannot be read
        line.send(message)


def _end_with_coordinator() -> None:
    """Stop as after Ctrl-C when the coordinator is gone; nobody else would stop this process."""
    coordinator = parent_process()
    assert coordinator is not None

    def watch() -> None:
        connection.wait([coordinator.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(ORPHAN_SECONDS)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="coordinator", daemon=True).start()
