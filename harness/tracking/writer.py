"""One run of a study in MLflow: log a training, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.config.events import EpochResult
from harness.tracking.client import StudyClient
from harness.tracking.library import first_line, milliseconds, system_monitor

EPOCHS_IN_A_REQUEST = 50  # MLflow accepts 1,000 metrics per request; an epoch must not be split


class MLflowRun:
    """One MLflow run, opened at its first entry; existing entries of a step are not written again.

    An epoch with another result is written again: a trial that resumes without its checkpoint restarts.
    """

    def __init__(self, tracker: StudyClient, key: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._tracker, self._key, self._params, self._tags = tracker, key, params, tags
        self._run_id: str | None = None
        self._losses: dict[int, float] | None = None  # of the logged epochs; None if unknown
        self._epochs: list[tuple[EpochResult, int]] = []  # with their timestamps
        self._written = 0  # number of written epochs
        self._monitor: Any = None  # of the machine, while the training runs
        tracker.tell(self._open)

    def epoch(self, result: EpochResult) -> None:
        first = len(self._epochs)
        self._epochs.append((result, milliseconds()))
        self._tracker.tell(lambda: self._log_epochs(first))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = milliseconds()

        def write() -> None:
            run_id = self._open()
            missing = {name: values[name] for name in values if step not in dict(self._tracker.history(run_id, name))}
            if missing:
                self._tracker.log(run_id, {step: (missing, now)})

        self._tracker.tell(write)

    def text(self, content: str, name: str) -> None:
        self._tracker.tell_file(lambda: self._tracker.add_file(self._open(), name, content))

    def monitor(self) -> None:
        """Log system metrics, from a thread of MLflow's, until the run ends."""

        self.stop_monitor()  # if the worker was lost that had the run before

        def start() -> None:
            run_id = self._open()
            try:
                self._monitor = system_monitor(run_id, self._tracker.uri)
            except Exception as error:  # noqa: BLE001  psutil and the driver's library raise errors of many kinds
                self._tracker.say(f"System metrics are not logged ({first_line(error)}).")

        self._tracker.tell(start)

    def stop_monitor(self) -> None:
        def stop() -> None:
            monitor, self._monitor = self._monitor, None
            if monitor is not None:
                monitor.finish()

        self._tracker.tell(stop)

    def end(self, state: str) -> None:
        self.stop_monitor()
        self._tracker.tell(lambda: self._tracker.close_run(self._open(), state))

    def _log_epochs(self, first: int) -> None:
        """Write the epochs from `first` on, in one request; later calls skip written epochs."""
        if first < self._written:
            return
        told = self._epochs[first : first + EPOCHS_IN_A_REQUEST]
        # Until the request succeeds, the logged steps are unknown.
        run_id, (losses, self._losses) = self._open(), (self._losses, None)
        known = dict(self._tracker.history(run_id, "train_loss")) if losses is None else losses
        new = {result.epoch: (result, now) for result, now in reversed(told) if _is_new(result, known)}
        self._tracker.log(run_id, {epoch: (new[epoch][0].metrics(), new[epoch][1]) for epoch in sorted(new)})
        self._losses = known | {epoch: result.train.loss for epoch, (result, _) in new.items()}
        self._written = first + len(told)

    def _open(self) -> str:
        if self._run_id is None:
            self._losses = None if self._key in self._tracker.runs() else {}
            self._run_id = self._tracker.open_run(self._key, self._params, self._tags)
        return self._run_id


def _is_new(result: EpochResult, known: Mapping[int, float]) -> bool:
    """Return whether MLflow lacks an epoch, or has it from a dead process with other bits.

    MLflow shows a step's later entry. It may return a non-finite number as another one.
    """
    loss = result.train.loss
    return result.epoch not in known or (math.isfinite(loss) and known[result.epoch] != loss)
