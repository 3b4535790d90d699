"""Worker processes on this machine, each with its share of the cores or its own GPU.

The coordinator sends them jobs, forwards their events, and replaces a dead worker; the next worker that asks resumes
its trial, because the lease of a dead process on this machine counts as expired.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import TYPE_CHECKING, Self

from harness.base.environment import cores
from harness.base.errors import INTERRUPTED, Halt, InputError
from harness.base.files import sqlite_file
from harness.config.events import EpochEnded, Event
from harness.config.jobs import Job, Search
from harness.training import interrupt
from harness.workers.worker import Done, Message, Stopped, WorkerConfig, work

if TYPE_CHECKING:
    from harness.config.study import Study
    from harness.store.store import Store

DEATHS_IN_A_ROW = 3  # of one worker, without an epoch of any worker in between
FAREWELL_SECONDS = 60.0  # for the current batch and its checkpoint
POLL_SECONDS = 0.5  # between two looks for workers that have connected (`harness.workers.server`)


def surroundings(workers: int, per_gpu: int, device: str) -> list[dict[str, str]]:
    """Return each worker's environment variables for its cores or GPU. `device` is a torch device type.

    Raises InputError if there are not enough GPUs.
    """
    if not workers:
        return []
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // workers)))}
    if device != "cuda":
        return [threads] * workers
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    if workers > len(gpus) * per_gpu:
        raise InputError(
            f"--workers {workers} needs {-(-workers // per_gpu)} GPUs with --workers-per-gpu {per_gpu}, but there are "
            f"{len(gpus)}; give fewer --workers or more --workers-per-gpu."
        )
    return [threads | {"CUDA_VISIBLE_DEVICES": gpus[number // per_gpu]} for number in range(workers)]


def of_use(asked: int, study: Study, store: Store, reopening: bool) -> int:
    """Return how many of the requested workers will have work; starting one takes seconds of a core."""
    if sqlite_file(store.url) is None:  # another command may request more trials at any time
        return asked
    settled = store.best() is not None and store.is_settled() and not reopening
    after = 0 if settled else study.final.trainings(study.trials)
    return min(asked, max(study.trials - store.finished(), after, 1))


class Worker:
    """A worker's number, its pipe, and its current job."""

    line: connection.Connection

    def __init__(self, number: int) -> None:
        self.number = number
        self.job: Job | None = None

    def take(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it has died; the next receive raises that
            self.line.send(job)

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does if it has a job."""

    def end(self) -> None:
        """Wait for its end."""


class _Process(Worker):
    """A worker process of this machine."""

    def __init__(self, config: WorkerConfig, number: int, environment: Mapping[str, str]) -> None:
        super().__init__(number)
        self.environment = environment
        context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
        self.line, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=work, args=(config, theirs), name=f"worker {number}", daemon=True
        )
        resource_tracker.ensure_running()  # its start would unblock signals
        with _environment(environment), interrupt.inherited_later(), _without_program():
            self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.job is not None:
            self.process.terminate()
        else:
            with contextlib.suppress(OSError):
                self.line.send(None)

    def end(self) -> None:
        self.process.join(FAREWELL_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Crew:
    """The workers of one coordinator, as a context manager; on exit, every training writes its checkpoint."""

    def __init__(self, config: WorkerConfig, count: int, tell: Callable[[Event], None]) -> None:
        """`tell` receives the events of workers that are being stopped, after the last event was yielded."""
        self._config, self._count, self._tell = config, count, tell
        self._deaths: Counter[int] = Counter()  # by number, since any worker's last epoch: a node may take several down

    def __enter__(self) -> Self:
        return self

    def search(self) -> Iterator[Event]:
        return self.train([Search()] * self._count)

    def train(self, jobs: Sequence[Job]) -> Iterator[Event]:
        raise NotImplementedError

    def _heard(self, message: Message) -> Iterator[Event]:
        """Yield a worker's event. Raises the error that stops its job permanently."""
        if isinstance(message, Stopped):
            raise message.error
        if isinstance(message, EpochEnded):
            self._deaths.clear()
        if not isinstance(message, Done):
            yield message

    def _heard_late(self, messages: Iterable[object]) -> None:
        for message in messages:
            if isinstance(message, Event):
                self._tell(message)

    def _note_death(self, number: int, too_many: str) -> None:
        self._deaths[number] += 1
        if self._deaths[number] > DEATHS_IN_A_ROW:
            raise Halt(too_many)


class Pool(Crew):
    """The workers of one machine."""

    def __init__(
        self, config: WorkerConfig, environments: Sequence[Mapping[str, str]], tell: Callable[[Event], None]
    ) -> None:
        super().__init__(config, len(environments), tell)
        self._workers: list[Worker] = [_Process(config, number, each) for number, each in enumerate(environments)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop running jobs as Ctrl-C does."""
        if kind is KeyboardInterrupt and any(worker.job is not None for worker in self._workers):
            interrupt.notice()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            self._heard_late(_rest(worker))
            worker.end()

    @property
    def at_once(self) -> int:
        return self._count

    def train(self, jobs: Sequence[Job]) -> Iterator[Event]:
        waiting = deque(jobs)
        while True:
            for worker in self._workers:
                if worker.job is None and waiting:
                    worker.take(waiting.popleft())
            busy = {worker.line: worker for worker in self._workers if worker.job is not None}
            if not busy and not waiting:
                return
            for line in connection.wait(list(busy), POLL_SECONDS):
                worker = busy[line]  # type: ignore[index]
                try:
                    message: Message = worker.line.recv()
                except (EOFError, OSError):
                    assert worker.job is not None
                    waiting.appendleft(worker.job)
                    self._replace(worker)
                else:
                    if isinstance(message, Done) and isinstance(worker.job, Search):
                        waiting.clear()  # the search is over
                    if isinstance(message, Done | Stopped):
                        worker.job = None
                    yield from self._heard(message)

    def _replace(self, dead: Worker) -> None:
        assert isinstance(dead, _Process)
        dead.process.join()
        code = dead.process.exitcode
        if code == INTERRUPTED:  # it was asked to stop, as are the others
            raise KeyboardInterrupt
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        again = f"Workers die repeatedly ({how}); signal 9 suggests a lack of memory: give fewer --workers."
        self._note_death(dead.number, again)
        print(f"Worker {dead.number} died ({how}); starting another.", file=sys.stderr)
        self._workers[dead.number] = _Process(self._config, dead.number, dead.environment)


def _rest(worker: Worker) -> Iterator[Message]:
    """Yield a worker's last messages until it ends."""
    try:
        while worker.line.poll(FAREWELL_SECONDS):
            yield worker.line.recv()
    except (EOFError, OSError):
        return


@contextmanager
def _without_program() -> Iterator[None]:
    """Keep processes started inside from running the program's main file again, which may start this study."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a process started inside."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)
