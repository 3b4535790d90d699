"""Workers of this machine and of others: the coordinator listens, and every worker that has the key gets jobs.

A thread answers each connected worker. A worker that says nothing for as long as a lease lasts is lost: it renews its
leases more often.
"""

from __future__ import annotations

import itertools
import multiprocessing
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Self

from harness.base import __version__
from harness.base.errors import Halt, InputError, first_line
from harness.config.events import Event
from harness.config.jobs import Job, Search
from harness.config.space import MOST_TRIALS
from harness.store.leases import LEASE_SECONDS, RENEWAL_SECONDS
from harness.workers import wire
from harness.workers.head import Ended, Head
from harness.workers.pool import POLL_SECONDS, Pool, Worker
from harness.workers.worker import Message, Stopped, WorkerConfig

MOST_STRANGERS = 32  # connections that have not shown the key yet; each holds a thread and a descriptor
GOODBYE_SECONDS = RENEWAL_SECONDS + 5.0  # each worker asks something within this time, and hears of the end


class _Guest(Worker):
    """A worker on another machine. Its thread passes on its events, and its next job."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.line, self.theirs = multiprocessing.Pipe()
        self.owner = self.where = ""
        self.told = ""  # the last error of this machine that it was told
        self.halted: Halt | None = None  # why it can do no job


class Server(Pool):
    """The workers of this machine, and those that connect."""

    def __init__(
        self,
        config: WorkerConfig,
        environments: Sequence[Mapping[str, str]],
        tell: Callable[[Event], None],
        address: str,
        key: bytes,
    ) -> None:
        self._listener, self._key = wire.listen(address), key
        self._head, self._one_at_a_time = Head(), threading.Lock()
        self._head.open(config, Path.cwd())
        super().__init__(config, environments, tell)
        self._numbers, self._ending = itertools.count(self._count), False
        self._strangers = threading.BoundedSemaphore(MOST_STRANGERS)
        self._threads = [threading.Thread(target=self._accept, name="listener", daemon=True)]

    @property
    def address(self) -> str:
        """The address for workers; its host is this machine's name if it listens at all of its addresses."""
        host, port = self._listener.getsockname()[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def at_once(self) -> int:
        return max(1, len(self._workers))

    def __enter__(self) -> Self:
        self._listener.settimeout(POLL_SECONDS)
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ending = True  # every worker that asks something hears so
        super().__exit__(kind, *rest)
        until = time.monotonic() + GOODBYE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._listener.close()
        self._head.close()

    def search(self) -> Iterator[Event]:
        return self.train([Search()] * MOST_TRIALS)  # for however many workers connect meanwhile

    def _replace(self, dead: Worker) -> None:
        if not isinstance(dead, _Guest):
            return super()._replace(dead)
        self._workers.remove(dead)
        if dead.halted is not None:  # several in a row: not for a reason of one machine
            self._note_death(-1, str(dead.halted))
        print(f"Worker {dead.number} on {dead.where} has gone; another one resumes its work.", file=sys.stderr)

    # -- in threads ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._ending:
            try:
                connected, (host, *_) = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:  # it has left at once, or there are too many open files; others may come
                time.sleep(POLL_SECONDS)
                continue
            if not self._strangers.acquire(blocking=False):
                connected.close()
                continue
            thread = threading.Thread(target=self._attend, args=(connected, host), daemon=True)
            self._threads = [each for each in self._threads if each.is_alive()] + [thread]
            thread.start()

    def _attend(self, connected: socket.socket, host: str) -> None:
        guest = None
        try:
            with wire.steady(connected, LEASE_SECONDS) as line:
                try:
                    deliver_challenge(line, self._key)
                    answer_challenge(line, self._key)
                finally:
                    self._strangers.release()
                guest = _Guest(next(self._numbers))
                while True:
                    method, *arguments = wire.receive(line)
                    wire.send(line, self._answer(guest, method, arguments))
        except AuthenticationError:
            print(f"A connection from {host} had another key; it was refused.", file=sys.stderr)
        except (OSError, EOFError):
            pass  # it has gone: the coordinator finds its line closed
        finally:
            if guest is not None:
                self._head.leave(guest.owner)
                guest.theirs.close()

    def _answer(self, guest: _Guest, method: str, arguments: Sequence[Any]) -> tuple[bool, Any]:
        """Return True and what a method returns, or False and its error."""
        if self._ending:
            return False, Ended()
        methods: dict[str, Callable[..., Any]] = {"join": self._join, "job": self._job, "hear": self._hear}
        try:
            if method in methods:
                return True, methods[method](guest, *arguments)
            if method not in ("call", "renew", "holds", "keep"):
                raise Halt(f"A worker cannot call {method!r}.")
            with self._one_at_a_time if method == "call" else nullcontext():
                return True, getattr(self._head, method)(*arguments)
        except Exception as error:  # noqa: BLE001  the worker raises it
            guest.told = str(error)
            if type(error).__name__ in wire.known():
                return False, error
            traceback.print_exc()
            return False, Halt(f"The study's machine failed ({first_line(error)}).")

    def _join(self, guest: _Guest, owner: str, where: str, version: str) -> WorkerConfig:
        if version != __version__:
            raise InputError(
                f"{self.address} has version {__version__} of the harness, but {where} has {version}; install "
                "the same version."
            )
        guest.owner, guest.where = owner, where
        self._head.enter(owner)
        return self._config

    def _job(self, guest: _Guest) -> Job | None:
        """Return the worker's next job; None if there is none yet."""
        if guest.halted is not None:
            raise guest.halted
        if guest not in self._workers:
            print(f"Worker {guest.number} connected from {guest.where}.", file=sys.stderr)
            self._workers.append(guest)
        return guest.theirs.recv() if guest.theirs.poll(POLL_SECONDS) else None

    def _hear(self, guest: _Guest, _owner: str, message: Message) -> None:
        error = message.error if isinstance(message, Stopped) else None
        if isinstance(error, Halt) and str(error) != guest.told:  # of that machine, such as its full disk
            print(f"Worker {guest.number} on {guest.where} stopped: {error}", file=sys.stderr)
            guest.halted = error
            guest.theirs.close()  # as if it had gone
        else:
            guest.theirs.send(message)
