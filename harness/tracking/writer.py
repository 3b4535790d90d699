"""Writing to MLflow without waiting for it: what is told is written by a thread, run by run."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import masked
from harness.config.events import EpochResult
from harness.tracking.client import StudyClient
from harness.tracking.library import Deleted, StoreFault, artifact_store, faults, first_line, is_refusal, milliseconds
from harness.tracking.outbox import LONGEST_PAUSE_SECONDS, Away, Outbox, WriterThread

if TYPE_CHECKING:
    from harness.config.study import Study

EPOCHS_IN_A_REQUEST = 50  # MLflow takes 1,000 metrics in one; an epoch must not be cut in two


class MLflowWriter(StudyClient):
    """A study's runs, written by a thread that waits while MLflow is away."""

    _study: Study

    def __init__(self, uri: str, artifacts: Path | None) -> None:
        """`artifacts` is the folder for a local database's files; None leaves them to the server."""
        super().__init__(uri, artifacts)
        self._left: list[Callable[[], object]] = []  # files that the artifact store did not take
        self._next_file = 0.0  # when it is tried again
        self._outbox = WriterThread(Outbox(lambda text: print(text, file=sys.stderr), f"MLflow at {masked(uri)}"))

    def flush(self) -> bool:
        """Wait until everything told is written, or MLflow does not answer; whether MLflow has taken everything."""
        return self._outbox.flush()

    def tell(self, operation: Callable[[], object]) -> None:
        """Have it done soon, or when MLflow is back, after everything told before.

        What MLflow refuses for good is named and left out.
        """

        def attempt() -> None:
            try:
                self._check_file()
                try:
                    operation()
                except faults() as error:
                    if is_refusal(error) and (text := self.deleted(self._study.name)) is not None:
                        raise Deleted(text) from error
                    raise
            except StoreFault as fault:
                self.say(
                    f"MLflow's files cannot be written ({fault}). The study goes on; they are tried again at its end."
                )
            except faults() as error:
                if is_refusal(error):
                    self.say(f"MLflow refuses an entry and it is left out: {first_line(error)}")
                    return
                self._runs = None
                raise Away(first_line(error)) from error
            except BaseException:  # cut off in the middle: whether a run was made must be asked
                self._runs = None
                raise

        self._outbox.add(attempt)

    def tell_file(self, operation: Callable[[], object]) -> None:
        """The same for a file. One that its store does not take holds nothing else up: it is tried again later."""

        def attempt() -> None:
            if time.monotonic() < self._next_file:
                self._left.append(operation)
                return
            try:
                operation()
            except StoreFault:
                self._left.append(operation)
                self._next_file = time.monotonic() + LONGEST_PAUSE_SECONDS
                raise
            self._tell_left()

        self.tell(attempt)

    def _tell_left(self) -> None:
        left, self._left = self._left, []
        for operation in left:
            self.tell_file(operation)

    def _check_file(self) -> None:
        if self._is_lost():
            raise FileNotFoundError(f"{self.file} was deleted")


class MLflowRun:
    """One MLflow run, opened when the first entry arrives; what it already has at a step is not written twice.

    An epoch with another result is: a trial that was taken up where its checkpoint is not begins anew.
    """

    def __init__(self, tracker: MLflowWriter, key: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._tracker, self._key, self._params, self._tags = tracker, key, params, tags
        self._run_id: str | None = None
        self._losses: dict[int, float] | None = None  # of the epochs that it has; None when that must be asked
        self._epochs: deque[tuple[EpochResult, int]] = deque()  # those that wait, with the time when they were told
        tracker.tell(self._open)

    def epoch(self, result: EpochResult) -> None:
        self._epochs.append((result, milliseconds()))
        self._tracker.tell(self._log_epochs)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now = milliseconds()

        def write() -> None:
            run_id = self._open()
            missing = {name: values[name] for name in values if step not in self._tracker.steps(run_id, name)}
            if missing:
                self._tracker.log(run_id, {step: (missing, now)})

        self._tracker.tell(write)

    def text(self, content: str, name: str) -> None:
        def write() -> None:
            run_id = self._open()
            with artifact_store():
                self._tracker.client.log_text(run_id, content, name)

        self._tracker.tell_file(write)

    def end(self, state: str) -> None:
        self._tracker.tell(lambda: self._tracker.close_run(self._open(), state))

    def _log_epochs(self) -> None:
        """Write the epochs that wait in one request; those told since then find nothing left to do."""
        told = list(islice(self._epochs, EPOCHS_IN_A_REQUEST))
        if not told:
            return
        try:
            # Until it is known that the entries arrived, nothing is known about the steps.
            run_id, (losses, self._losses) = self._open(), (self._losses, None)
            known = dict(self._tracker.history(run_id, "train_loss")) if losses is None else losses
            new = {result.epoch: (result, now) for result, now in reversed(told) if _is_new(result, known)}
            self._tracker.log(run_id, {epoch: (new[epoch][0].metrics(), new[epoch][1]) for epoch in sorted(new)})
            self._losses = known | {epoch: result.train.loss for epoch, (result, _) in new.items()}
        except faults() as error:
            if is_refusal(error):
                self._forget(len(told))
            raise
        self._forget(len(told))

    def _forget(self, count: int) -> None:
        for _ in range(count):
            self._epochs.popleft()

    def _open(self) -> str:
        if self._run_id is None:
            new = not self._tracker.has(self._key)
            self._run_id = self._tracker.open_run(self._key, self._params, self._tags)
            self._losses = {} if new else None
        return self._run_id


def _is_new(result: EpochResult, known: Mapping[int, float]) -> bool:
    """Whether MLflow lacks an epoch, or has it as a process that died came to it, with other bits.

    The later entry of a step is the one that MLflow shows. What is no finite number MLflow may give back as another.
    """
    loss = result.train.loss
    return result.epoch not in known or (math.isfinite(loss) and known[result.epoch] != loss)
