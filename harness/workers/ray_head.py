"""The actor between a coordinator and its workers on a Ray cluster, on the coordinator's machine.

Workers send it events, which the coordinator fetches. It also serves a study in SQLite, which no other machine can
open: it holds the storage open, and each worker has its own leases there, which it must renew.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from harness.base.files import sqlite_file
from harness.config.study import Study
from harness.store.database import outlast
from harness.store.leases import LeaseLost, renewing
from harness.store.opening import open_store
from harness.store.store import Asked, Store
from harness.workers.worker import Message, WorkerConfig

CHECK_SECONDS = 2.0  # between two lease checks of a trial
READ = ("attributes", "facts", "trials", "finished", "stop")  # store methods that a worker calls
ON_A_TRIAL = ("check", "is_skipped", "report", "should_prune", "spend", "tell")


class Replaced(Exception):
    """Ray has replaced this worker, because it considered its node dead."""


@dataclass(frozen=True)
class Arrived:
    """A worker starts; `before` is its previous owner if Ray restarts it."""

    number: int
    where: str
    before: str | None


class Head:
    """The actor. Its calls run one after the other."""

    def __init__(self) -> None:
        self._kept = ExitStack()
        self._store: Store | None = None
        self._owners: dict[int, str] = {}  # by the worker's number
        self._stores: dict[str, Store] = {}  # by owner
        self._messages: list[Message | Arrived] = []
        self._fetched = 0  # number of messages that the coordinator has fetched

    def open(self, config: WorkerConfig, place: Path) -> None:
        """Load the study's file, whose classes messages may hold, and open its storage if workers cannot.

        `place` is the coordinator's working directory.
        """
        os.chdir(place)
        self._checkpoints = config.checkpoints
        self._study = config.study()
        if sqlite_file(config.url) is not None:
            self._store = self._kept.enter_context(open_store(self._study, config.url, joining=True))

    def arrive(self, number: int, owner: str, where: str) -> None:
        """Register a starting worker; an earlier one with its number counts as dead from here on."""
        before = self._owners.get(number)
        if before is not None:
            self.leave(before)
        self._owners[number] = owner
        if self._store is not None:
            self._stores[owner] = self._store.of(owner)
        self._messages.append(Arrived(number, where, before))

    def leave(self, owner: str) -> None:
        """Release an ending worker's leases."""
        store = self._stores.pop(owner, None)
        if store is not None:
            store.leases.close()

    def hear(self, owner: str, message: Message) -> None:
        if owner not in self._owners.values():
            raise Replaced
        self._messages.append(message)

    def messages(self, fetched: int) -> list[Message | Arrived]:
        """Return the messages after the first `fetched`, which are deleted."""
        del self._messages[: fetched - self._fetched]
        self._fetched = fetched
        return list(self._messages)

    def holds(self, name: str, sha256: str) -> bool:
        """Return whether the coordinator's checkpoint folder has this file with this content."""
        try:
            return hashlib.sha256((self._checkpoints / name).read_bytes()).hexdigest() == sha256
        except OSError:
            return False

    def renew(self, owner: str) -> None:
        store = self._of(owner)
        outlast(store.url, store.leases.renew)

    def call(self, owner: str, method: str, *arguments: Any) -> Any:
        """Call a method of the store for this worker; `ask` gets the study that is open here."""
        study = (self._study,) if method == "ask" else ()
        return getattr(self._of(owner), method)(*study, *arguments)

    def _of(self, owner: str) -> Store:
        if owner not in self._stores:
            raise Replaced
        return self._stores[owner]


def answer(reference: Any, gone: Callable[[RayActorError], BaseException] = lambda _: KeyboardInterrupt()) -> Any:
    """Return what the head returns, or raise its error. A worker without a head stops as after Ctrl-C.

    `gone` makes another error for that case.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise gone(error) from error


class _Served:
    """A proxy of the store through the head, with the methods of `Store` that a worker calls."""

    def __init__(self, head: Any, owner: str, url: str) -> None:
        self.url = url
        self._head, self._owner = head, owner
        self._checked: dict[int, float] = {}  # trial -> time of its last lease check
        self._looked = 0.0  # time of the last look for a skipped trial

    def __getattr__(self, name: str) -> Any:
        if name not in READ + ON_A_TRIAL:
            raise AttributeError(f"A worker's store has no {name!r}.")
        return functools.partial(self._call, name)

    @property
    def uid(self) -> str:
        return cast(str, self.attributes()["uid"])

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
            return answer(self._head.call.remote(self._owner, method, *arguments))
        except Replaced:
            if method in ON_A_TRIAL:
                raise LeaseLost(self._owner) from None
            raise KeyboardInterrupt from None


@contextmanager
def served(head: Any, owner: str, url: str) -> Iterator[Store]:
    """Yield the study's store on the coordinator's machine; a thread renews this worker's leases there."""
    closed = threading.Event()

    def renew() -> None:
        with suppress(RayError):  # the trial's own calls raise it too
            ray.get(head.renew.remote(owner))

    renewing(renew, closed).start()
    try:
        yield cast(Store, _Served(head, owner, url))
    finally:
        closed.set()
