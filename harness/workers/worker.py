"""A worker: a process that does its coordinator's jobs and sends it events.

It loads the study from its file, as the coordinator does, and writes results to the storage itself. Events go to the
coordinator, which shows them and is the only process on its machine that writes MLflow.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.environment import versions
from harness.base.errors import INTERRUPTED, Halt, InputError
from harness.config.events import Event, TrialStarted
from harness.config.jobs import Job, Search
from harness.training import interrupt

if TYPE_CHECKING:
    from harness.config.study import Study
    from harness.final.retrain import Context
    from harness.store.store import Store

ORPHAN_SECONDS = 120.0  # for the current batch and its checkpoint


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """The settings with which a worker opens the study as its coordinator did."""

    file: Path
    settings: tuple[str, ...]
    data_root: str | None
    device: str | None
    trials: int
    url: str
    checkpoints: Path
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    home: Path | None = None  # None: that of the file

    def study(self) -> Study:
        from harness.config.find import find

        found = find(str(self.file), self.home)
        study = found.study.with_settings(self.settings).located(found.home, self.data_root, self.device)
        return dataclasses.replace(study, trials=self.trials, **self.limits)


@dataclass(frozen=True)
class Done:
    """The job has ended."""


@dataclass(frozen=True)
class Stopped:
    """The job failed, and would fail on any worker."""

    error: Exception


Message = Event | Done | Stopped


def do(
    job: Job, context: Context, tell: Callable[[Message], None], finish: Callable[[], object] = lambda: None
) -> None:
    """Do a job to its end; `tell` its events, then Done or Stopped. `finish` is called before Done."""
    from harness.search.loop import TooManyFailures
    from harness.training.step import free_memory

    try:
        with closing(_events(job, context)) as events:
            for event in events:
                tell(event.sendable() if isinstance(event, TrialStarted) else event)
        finish()
        if context.runtime.device.type != "cpu":
            free_memory(context.runtime.device)  # others may need it
    except (TooManyFailures, Halt, InputError) as error:
        tell(Stopped(error))
    else:
        tell(Done())


def _events(job: Job, context: Context) -> Generator[Event, None, None]:
    from harness.final.retrain import Retraining
    from harness.search.loop import search

    if isinstance(job, Search):
        yield from search(context.study, context.store, context.runtime, context.checkpoints)
    else:
        trial = next(each for each in context.store.trials() if each.number == job.trial)
        yield from Retraining(context, job.kind, trial, job.seed_number).train()


@contextmanager
def opened(config: WorkerConfig) -> Iterator[Context]:
    """Open the study for this worker. Raises InputError if it differs from the stored study."""
    from harness.store.opening import open_store

    study = config.study()
    with open_store(study, config.url, joining=True) as store:
        yield context_of(config, study, store)


def context_of(config: WorkerConfig, study: Study, store: Store) -> Context:
    """Return a worker's context. Raises InputError if its versions differ from the coordinator's."""
    from harness.final.retrain import Context
    from harness.training.assemble import decide_runtime
    from harness.training.checkpoint import differences

    if differing := differences(store.facts().versions, versions()):
        raise InputError(f"This study runs with other versions: {differing} here; install the same versions.")
    runtime = decide_runtime(study.train, store.facts().runtime)
    return Context(study=study, store=store, runtime=runtime, checkpoints=config.checkpoints)


def work(config: WorkerConfig, line: connection.Connection) -> None:
    """Run a worker process: do the jobs from the pipe until it sends None."""
    tell = functools.partial(_send, line)
    try:
        interrupt.install(quiet=True)
        _end_with_coordinator()
        try:
            with opened(config) as context:
                context.check_content()  # images may have changed before this worker replaced another
                while (job := line.recv()) is not None:
                    do(job, context, tell)
        except (Halt, InputError) as error:
            tell(Stopped(error))  # which may be interrupted, too
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        os._exit(INTERRUPTED)  # all is in the storage and the checkpoints; the coordinator prints the messages


def _send(line: connection.Connection, message: Message) -> None:
    with interrupt.undivided():  # a partial message cannot be read
        line.send(message)


def _end_with_coordinator() -> None:
    """Stop as after Ctrl-C if the coordinator dies; no other process would stop this one."""
    coordinator = parent_process()
    assert coordinator is not None

    def watch() -> None:
        connection.wait([coordinator.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(ORPHAN_SECONDS)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="coordinator", daemon=True).start()
