"""Workers on a Ray cluster: tasks, each with its share of a node. Ray schedules them, and restarts them elsewhere if
their node dies.
"""

from __future__ import annotations

import dataclasses
import functools
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.base.errors import Halt, InputError, first_line
from harness.base.files import sqlite_file
from harness.base.processes import name_of_this
from harness.config.events import Event
from harness.config.jobs import Job, Search
from harness.final.retrain import Context
from harness.store.store import Store
from harness.training import interrupt
from harness.workers.head import Ask, do_through, opened_through, prepare, tell
from harness.workers.pool import FAREWELL_SECONDS, Crew
from harness.workers.ray_cluster import Needs, in_words
from harness.workers.ray_head import Arrived, RayHead, answer, ask
from harness.workers.worker import Message, Stopped, WorkerConfig, opened

POLL_SECONDS = 0.2  # between two fetches of messages


class RayWorkers(Crew):
    """The workers of one coordinator on a cluster."""

    def __init__(
        self, config: WorkerConfig, store: Store, needs: Needs, tell: Callable[[Event], None] = lambda _: None
    ) -> None:
        device = "cuda" if needs.gpus else config.device  # a task sees only its own GPU, so the index is useless
        super().__init__(dataclasses.replace(config, device=device), needs.workers, tell)
        self._store, self._needs = store, needs
        self._begun = self._fetched = 0
        self._tasks: dict[Any, tuple[int, Job]] = {}  # Ray's reference -> the worker's number and job
        self._arrived: set[int] = set()
        self._head: Any = None

    def __enter__(self) -> RayWorkers:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": self._needs.environment()}
        options = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": environment}
        self._head = ray.remote(RayHead).options(**options).remote()
        self._ask(self._head.open.remote(self._config, Path.cwd()))
        if (places := self._needs.places) < self._count:
            none = f"no room for a worker now, which needs {in_words(self._needs)}; they start"
            some = f"room for {places} of {self._count} workers now; the others start"
            print(f"The Ray cluster has {some if places else none} when nodes are added.", file=sys.stderr)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop running tasks as Ctrl-C does."""
        left = list(self._tasks)
        if kind is KeyboardInterrupt and left:
            interrupt.notice()
        for task in left:
            ray.cancel(task, recursive=False)
        until = time.monotonic() + FAREWELL_SECONDS
        while left and time.monotonic() < until:
            _, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
            self._heard_late(self._messages())
        for task in left:
            ray.cancel(task, force=True)
        ray.kill(self._head)

    @property
    def at_once(self) -> int:
        return max(1, min(self._count, self._needs.places))

    def train(self, jobs: Sequence[Job]) -> Iterator[Event]:
        waiting = deque(jobs)
        while waiting or self._tasks:
            while waiting and len(self._tasks) < self._count:
                self._begin(waiting.popleft())
            ended, _ = ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=POLL_SECONDS)
            for message in self._messages():  # a task sends all its messages before it ends
                yield from self._heard(message)
            for task in ended:
                _, job = self._tasks.pop(task)
                if not self._ended(task):
                    waiting.appendleft(job)
                elif isinstance(job, Search):
                    self._withdraw()

    def _begin(self, job: Job) -> None:
        number, self._begun = self._begun, self._begun + 1
        options = {
            "num_cpus": self._needs.cpus,
            "num_gpus": self._needs.gpus,
            "max_retries": -1,  # `_heard` counts
            "runtime_env": {"env_vars": self._needs.environment()},
            "name": f"{self._config.file.stem} worker {number}",
        }
        task = _work.options(**options).remote(self._config, job, number, self._head)
        self._tasks[task] = number, job

    def _withdraw(self) -> None:
        """Cancel workers that no node had room for: the search is over."""
        for task, (number, _) in list(self._tasks.items()):
            if number not in self._arrived:
                ray.cancel(task, recursive=False)
                del self._tasks[task]

    def _messages(self) -> list[Message | Arrived]:
        messages: list[Message | Arrived] = self._ask(self._head.messages.remote(self._fetched))
        self._fetched += len(messages)
        return messages

    def _ask(self, reference: Any) -> Any:
        lost = "The Ray actor between the study and its workers died ({}); see Ray's logs."
        return answer(reference, lambda error: Halt(lost.format(first_line(error))))

    def _heard(self, message: Message | Arrived) -> Iterator[Event]:
        if not isinstance(message, Arrived):
            yield from super()._heard(message)
            return
        self._arrived.add(message.number)
        if message.before is not None:
            self._store.leases.dismiss(message.before)  # do not wait for them to expire
            again = "Workers die repeatedly; if the nodes lack memory, give fewer --workers."
            self._note_death(message.number, again)
            print(f"Worker {message.number} died; Ray restarted it on {message.where}.", file=sys.stderr)

    def _ended(self, task: Any) -> bool:
        """Return whether a task ended by itself; False if something else cancelled it."""
        try:
            ray.get(task)
        except TaskCancelledError:
            return False
        except RayTaskError as error:
            print(error, file=sys.stderr)  # with the traceback
            raise Halt(f"A worker failed ({first_line(error.cause)}).") from error
        except RayError as error:
            raise InputError(f"Ray cannot run the workers: {' '.join(str(error).split())[:500]}") from error
        return True


@ray.remote(max_calls=1)
def _work(config: WorkerConfig, job: Job, number: int, head: Any) -> None:
    interrupt.install()
    owner, where, asked = name_of_this(), socket.gethostname(), functools.partial(ask, head)
    asked("arrive", number, owner, where)
    try:
        with _opened(asked, owner, config) as context:
            do_through(asked, owner, job, context)
    except InputError as error:
        tell(asked, owner, Stopped(InputError(f"On {where}: {error}")))
    finally:
        asked("leave", owner)


@contextmanager
def _opened(asked: Ask, owner: str, config: WorkerConfig) -> Iterator[Context]:
    """Open the study for this worker: SQLite through the head, else its database."""
    if sqlite_file(config.url) is not None:
        with opened_through(asked, owner, config) as context:
            yield context
        return
    with opened(config) as context:
        context.store.leases.owner = owner  # the name that the coordinator has
        prepare(context)
        yield context
