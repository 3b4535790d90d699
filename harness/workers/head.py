"""A study for workers that cannot open its database: the coordinator's side, and theirs.

The head is on the coordinator's machine. It holds a study in SQLite open, which no other machine can do; each worker
has its own leases there, which it must renew. How a worker's calls reach the head is up to `Ask`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

import filelock

from harness.base.errors import Halt, InputError, first_line
from harness.base.files import replace_file, sqlite_file
from harness.base.keys import RETRAINING
from harness.config.jobs import Job, Train
from harness.config.study import Study
from harness.data.splits import content_of
from harness.final.retrain import Context
from harness.store.database import outlast
from harness.store.leases import LeaseLost, renewing
from harness.store.opening import check_definition, open_store
from harness.store.records import StudyFacts
from harness.store.store import Asked, Store
from harness.training import interrupt
from harness.training.checkpoint import SUFFIX, remove
from harness.training.features import keep_features
from harness.workers.worker import Message, Stopped, WorkerConfig, context_of, do

CHECK_SECONDS = 2.0  # between two lease checks of a trial
READ = ("attributes", "trials", "finished", "stop")  # store methods that a worker calls
ON_A_TRIAL = ("check", "is_skipped", "report", "should_prune", "spend", "tell")


class Ask(Protocol):
    """Calls a method of the head, and returns what it returns or raises its error; HeadLost if there is no head."""

    def __call__(self, method: str, *arguments: Any) -> Any: ...


class HeadLost(KeyboardInterrupt):
    """The head has ended, or cannot be reached; its worker stops as after Ctrl-C."""


class Ended(HeadLost):
    """The coordinator needs no workers any more."""


class Replaced(Exception):
    """Another worker has taken this one's place, because it seemed dead."""


class Head:
    """The study's storage, and its checkpoint folder."""

    def __init__(self) -> None:
        self._kept = ExitStack()
        self._store: Store | None = None
        self._stores: dict[str, Store] = {}  # by the worker's name

    def open(self, config: WorkerConfig, place: Path) -> None:
        """Load the study's file, whose classes messages may hold, and open its storage if workers cannot.

        `place` is the coordinator's working directory.
        """
        os.chdir(place)
        self._checkpoints = config.checkpoints
        self._study = config.study()
        if sqlite_file(config.url) is not None:
            self._store = self._kept.enter_context(open_store(self._study, config.url, joining=True))

    def close(self) -> None:
        self._kept.close()

    def enter(self, owner: str) -> None:
        """Register a starting worker."""
        if self._store is not None:
            self._stores[owner] = self._store.of(owner)

    def leave(self, owner: str) -> None:
        """Release an ending worker's leases."""
        store = self._stores.pop(owner, None)
        if store is not None:
            store.leases.close()

    def holds(self, name: str, sha256: str) -> bool:
        """Return whether the coordinator's checkpoint folder has this file with this content."""
        if Path(name).name != name:
            return False
        try:
            return hashlib.sha256((self._checkpoints / name).read_bytes()).hexdigest() == sha256
        except OSError:
            return False

    def keep(self, job: Train, content: bytes) -> None:
        """Write a training's file into the coordinator's checkpoint folder. Raises Halt for a name with a folder."""
        if Path(_file(job)).name != _file(job):
            raise Halt(f"A worker cannot write {_file(job)!r}.")
        replace_file(self._checkpoints / _file(job), content)

    def renew(self, owner: str) -> None:
        store = self._of(owner)
        outlast(store.url, store.leases.renew)

    def call(self, owner: str, method: str, *arguments: Any) -> Any:
        """Call a method of the store for this worker; `ask` gets the study that is open here."""
        if method not in ("ask", *READ, *ON_A_TRIAL):
            raise Halt(f"A worker cannot call {method!r}.")
        study = (self._study,) if method == "ask" else ()
        return getattr(self._of(owner), method)(*study, *arguments)

    def _of(self, owner: str) -> Store:
        if owner not in self._stores:
            raise Replaced
        return self._stores[owner]


class _Served:
    """A proxy of the store through the head, with the methods of `Store` that a worker calls."""

    def __init__(self, ask: Ask, owner: str, url: str) -> None:
        self.url = url
        self._ask, self._owner = ask, owner
        self._checked: dict[int, float] = {}  # trial -> time of its last lease check
        self._looked = 0.0  # time of the last look for a skipped trial

    def __getattr__(self, name: str) -> Any:
        if name not in READ + ON_A_TRIAL:
            raise AttributeError(f"A worker's store has no {name!r}.")
        return functools.partial(self._call, name)

    @property
    def uid(self) -> str:
        return cast(str, self.attributes()["uid"])

    def facts(self) -> StudyFacts:
        return StudyFacts.of(self.attributes())

    def ask(self, study: Study, at_most: int | None = None) -> Asked:
        return cast(Asked, self._call("ask", at_most))

    def check(self, asked: Asked) -> None:
        if time.monotonic() - self._checked.get(asked.number, -CHECK_SECONDS) >= CHECK_SECONDS:
            self._call("check", asked)
            self._checked[asked.number] = time.monotonic()

    def is_skipped(self, asked: Asked) -> bool:
        if time.monotonic() - self._looked < CHECK_SECONDS:
            return False
        self._looked = time.monotonic()
        return bool(self._call("is_skipped", asked))

    def check_lead(self) -> None:
        """Do nothing: the coordinator leads, and workers train for it only."""

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._ask("call", self._owner, method, *arguments)
        except Replaced:
            if method in ON_A_TRIAL:
                raise LeaseLost(self._owner) from None
            raise KeyboardInterrupt from None


@contextmanager
def opened_through(ask: Ask, owner: str, config: WorkerConfig) -> Iterator[Context]:
    """Open the study through the head; a thread renews this worker's leases there.

    Raises InputError if study, versions or data set differ from those of the coordinator.
    """
    closed = threading.Event()

    def renew() -> None:
        with suppress(HeadLost, Replaced, Halt):  # the trial's own calls raise it too
            ask("renew", owner)

    renewing(renew, closed).start()
    try:
        study, store = config.study(), cast(Store, _Served(ask, owner, config.url))
        check_definition(study, store, None)
        context = context_of(config, study, store)
        prepare(context)
        yield context
    finally:
        closed.set()


def prepare(context: Context) -> None:
    """Create the files that all workers of this machine need, once. Raises InputError if images or weights differ."""
    study = context.study
    name = hashlib.sha256(str(study.train.data.cache).encode()).hexdigest()[:16]
    with filelock.FileLock(Path(tempfile.gettempdir()) / f"harness-{os.getuid()}-{name}.lock"):
        here, begun = content_of(study), context.store.facts().definition or {}
        for name, what in (("data", "data set"), ("weights", "pretrained weights")):
            if begun.get(f"content of {name}") not in (None, here[name]):
                raise InputError(f"The {what} here differs from the study's; copy the study's to this machine.")
        keep_features(study.train, context.runtime, with_validation=study.final.fit_on == "train+val")


def do_through(ask: Ask, owner: str, job: Job, context: Context) -> None:
    """Do a job to its end; the head hears its events, then Done or Stopped, and has the trained weights."""

    def finish() -> None:
        if isinstance(job, Train):
            _carry(ask, job, context.checkpoints / _file(job))

    try:
        do(job, context, functools.partial(tell, ask, owner), finish)
    except (LeaseLost, Replaced):
        raise
    except Exception as error:  # noqa: BLE001  it may be the user's code; any worker would fail
        traceback.print_exc()
        tell(ask, owner, Stopped(Halt(f"A worker failed ({first_line(error)}); its output has the traceback.")))


def tell(ask: Ask, owner: str, message: Message) -> None:
    try:
        with interrupt.undivided():
            ask("hear", owner, message)
    except Replaced:  # another worker does this job
        raise KeyboardInterrupt from None


def _carry(ask: Ask, job: Train, path: Path) -> None:
    """Give the head a training's file, unless it sees it in the coordinator's checkpoint folder."""
    content = path.read_bytes()
    if not ask("holds", path.name, hashlib.sha256(content).hexdigest()):
        ask("keep", job, content)
        remove(path)


def _file(job: Train) -> str:
    return f"{RETRAINING[job.kind](job.trial, job.seed_number)}{SUFFIX}"
