"""The MLflow tracker: log a study's events.

One parent run per study, one child run per trial and per final seed, found by tags after a restart. MlflowClient writes
runs by explicit ids; the storage is the source of truth, and `synchronise` updates MLflow from it. Training does not
wait for MLflow: a thread writes (`harness.tracking.outbox`). The caller's thread reads, starts and ends, when the
outbox is empty.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import InputError
from harness.base.words import metric_name
from harness.config.events import EpochEnded, Event, Failed, RetrainingEnded, TrialEnded, TrialStarted
from harness.config.space import label, leaves
from harness.tracking.client import (
    STATE,
    STATUS,
    STUDY,
    TRACEBACK,
    UID,
    VIEW,
    VIEW_TAG,
    StudyClient,
    view_of,
)
from harness.tracking.expected import Expected, data_of, expected_runs, retraining_tags, trial_tags
from harness.tracking.files import make_database, move_in
from harness.tracking.library import (
    Deleted,
    artifact_store,
    drop_connections,
    faults,
    first_line,
    is_refusal,
    milliseconds,
    wants_system_metrics,
)
from harness.tracking.writer import MLflowRun

if TYPE_CHECKING:
    from harness.config.study import Study
    from harness.config.train import TrainConfig
    from harness.store.store import Store

GROUPS = "parameter_groups.txt"
TRAINING = "?workflowType=machine_learning"  # else the UI opens its pages for language models


class MLflowTracker(StudyClient):
    """Log a study to an MLflow tracking server or database at `uri`.

    If MLflow becomes unreachable after the start, entries wait in order until it is back, or until the next start.
    """

    def __init__(self, uri: str, artifacts: Path | None) -> None:
        super().__init__(uri, artifacts)
        self._shown: dict[str, MLflowRun] = {}  # the runs of running trainings, by key

    def check(self, name: str | None = None) -> None:
        """Raise InputError unless the server or database answers and accepts the study `name`; create no run."""
        if name is not None:
            wants_system_metrics()  # raises
        with self.as_input_error():
            self.connect()
            if name is not None and (text := self.deleted(name)) is not None:
                raise Deleted(text)

    def pages(self) -> list[tuple[str, str]]:
        """Return each experiment's name and its path in MLflow's UI; requires a connection."""
        found = []
        for each in self.client.search_experiments():
            if each.name != "Default":
                opened = f"{TRAINING}&viewStateShareKey={VIEW}" if VIEW_TAG in each.tags else TRAINING
                found.append((each.name, f"#/experiments/{each.experiment_id}/runs{opened}"))
        return sorted(found)

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """Open or reopen the study's parent run, and synchronise its runs with the storage.

        Raises InputError if MLflow cannot be reached or written, unless the study has started: then it continues, and
        entries wait until MLflow is back.
        """
        self.study, self._store, self._tags = study, store, {UID: store.uid, **facts}
        self._data = data_of(study, store)
        self._monitored = wants_system_metrics()
        self._ended_as: str | None = None  # the study's own run, before this start
        self._behind = True
        self._values = {trial.number: trial.value for trial in store.trials() if trial.state != "running"}
        self.flush()
        with self.as_input_error():
            try:
                self._begin()
            except faults() as error:
                if is_refusal(error) or isinstance(error, Deleted) or not store.trials():
                    raise
                self.tell(self._begin)
        self._catch_up()

    def _begin(self) -> None:
        self.connect()
        if self.file is not None and self.artifacts is not None:
            move_in(self.file, self.artifacts)
        self._experiment = self._get_experiment()
        self.client.set_experiment_tag(self._experiment, VIEW_TAG, view_of(self.study))
        self._runs = self.known_runs()
        if STUDY not in self._runs:
            self._restore_own_run()
        self._ended_as = self._runs[STUDY].data.tags.get(STATE) if STUDY in self._runs else None
        self.parent = self.open_run(STUDY, {}, self._tags)
        self._best: float | None = None  # that MLflow shows; None: unknown
        self._log_best()

    def _catch_up(self) -> bool:
        """Write what MLflow lacks from the storage, if it answers; return whether it is complete."""
        done = self.flush()
        if done and self._behind:
            self._behind = False
            self.synchronise(self.study, self._store)
            done = self.flush()
        if done and self._left:
            left, self._left = self._left, []
            for operation in left:
                self.tell_file(operation)
            done = self.flush() and not self._left
        return done

    def _end(self, write: Callable[[], bool]) -> bool:
        """Write once, then stop the outbox; return whether MLflow is complete."""
        for run in self._shown.values():
            run.stop_monitor()
        try:
            return write()
        finally:
            self._outbox.stop()

    def attach(self, study: Study, store: Store) -> None:
        """Attach to a study's runs read-only. Raises InputError if MLflow cannot be reached."""
        with self.as_input_error():
            self.connect()
            experiment = self.client.get_experiment_by_name(study.name)
            self._experiment = None if experiment is None else experiment.experiment_id
            self.study, self._tags = study, {UID: store.uid}

    def replace_folder(self, folder: Path) -> None:
        """Write a folder of the study's own run again, if the run exists. Raises InputError if MLflow fails."""
        with self.as_input_error():
            if self.file is not None and self.artifacts is not None:
                move_in(self.file, self.artifacts)
            if (run := self.known_runs().get(STUDY)) is not None:
                with artifact_store():
                    self.client.log_artifacts(run.info.run_id, str(folder), folder.name)

    @contextlib.contextmanager
    def as_input_error(self) -> Iterator[None]:
        """Turn errors of MLflow into InputError."""
        try:
            yield
        except Deleted as error:
            raise InputError(f"{error}.") from error
        except faults() as error:
            raise InputError(
                f"MLflow at {self.uri} cannot be used ({first_line(error)}); check --tracking-uri."
            ) from error

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> MLflowRun:
        """Return a child run: the existing one with this key, else a new one.

        Raises an earlier error of the writer thread: raised here, it does not count as the trial's own.
        """
        self._outbox.check()
        params = {path: str(label(value)) for path, value in leaves(config)}
        return MLflowRun(self, key, params, {**self._tags, **tags})

    def show(self, event: Event) -> None:
        """Log an event of a study."""
        match event:
            case TrialStarted(key=str(key)):
                self._shown[key] = run = self._run_of(event, key)
                if self._monitored:
                    run.monitor()
                if event.groups is not None:
                    run.text(event.groups, GROUPS)
                for result in event.progress.epochs:
                    if event.kind != "trial" or result.is_finite():
                        run.epoch(result)
            case EpochEnded(key=str(key)):
                if key in self._shown:  # else its start was lost in a stopped study; `synchronise` adds it
                    self._shown[key].epoch(event.result)
            case TrialEnded():
                run = self._run_of(event, event.key)
                if isinstance(event.outcome, Failed):
                    run.text(event.outcome.traceback, TRACEBACK)
                run.end(event.outcome.state)
                self._values[event.number] = getattr(event.outcome, "value", None)
                self.tell(self._log_best)
            case RetrainingEnded():
                run = self._run_of(event, event.key)
                for result in event.epochs:
                    run.epoch(result)
                run.metrics(event.metrics, self.study.config(event.params).epochs)
                run.end("complete")

    def _run_of(self, event: TrialStarted | TrialEnded | RetrainingEnded, key: str) -> MLflowRun:
        """Return a training's run: remove it from the running ones, else find it by its key."""
        if (shown := self._shown.pop(key, None)) is not None:
            return shown
        if isinstance(event, TrialEnded) or event.kind == "trial":
            tags = trial_tags(self.study, event.number)
        else:
            tags = retraining_tags(event.kind, event.trial, event.number)
        return self.run(key, self.study.config(event.params), tags)

    def synchronise(self, study: Study, store: Store) -> None:
        """Make the runs of finished trials equal to the storage: add missing entries, close open runs."""
        for wanted in expected_runs(study, store):
            run = (self._runs or {}).get(wanted.key)
            said = None if run is None else (run.info.status, run.data.tags.get(STATE))
            if said != (STATUS[wanted.state], wanted.state):
                self.write(wanted)
            elif run is not None and wanted.traceback is not None:
                self.tell_file(functools.partial(self.add_file, run.info.run_id, TRACEBACK, wanted.traceback))

    def write(self, wanted: Expected) -> None:
        """Write a finished run completely; keep existing entries."""
        log = self.run(wanted.key, wanted.config, wanted.tags)
        for result in wanted.epochs:
            log.epoch(result)
        log.metrics(wanted.metrics, wanted.config.epochs)
        if wanted.traceback is not None:
            log.text(wanted.traceback, TRACEBACK)
        log.end(wanted.state)

    def settle(self) -> bool:
        """End the parent run with its state before this start, else interrupted; return whether MLflow is complete."""
        return self.finish({}, [], self._ended_as if self._ended_as in STATUS else "interrupted")

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> bool:
        """Write metrics and folders to the parent run and end it; return whether MLflow is complete."""
        now = milliseconds()
        if self._is_lost():
            self._begin_anew()
        self.tell(self._keep_own_run)
        if metrics:
            self.tell(lambda: self._log_study(metrics, now))
        for path in artifacts:
            if path.exists():
                self.tell_file(functools.partial(self._log_folder, path))
        self.tell(self._close_leftovers)
        self.tell(lambda: self.close_run(self.parent, state))
        self._behind = True  # another coordinator may have died before it wrote all entries
        return self._end(self._catch_up)

    def _log_study(self, metrics: Mapping[str, float], now: int) -> None:
        """Log the study's own metrics at the number of its trials; a step later if a reopened test changed them."""
        shown = self.client.get_run(self.parent).data.metrics
        new = {name: value for name, value in metrics.items() if shown.get(name) != value}
        if new:
            steps = {step + 1 for name in new for step, _ in self.history(self.parent, name)}
            trials = sum(key.startswith("trial-") for key in self.known_runs())
            self.log(self.parent, {max(steps | {trials}): (new, now)})

    def _log_best(self) -> None:
        """Log each new best value to the study's own run, at the number of trials so far; MLflow draws a chart of it.

        Trials count in the order of their numbers, so a trial waits for those before it.
        """
        name = f"best_val_{metric_name(self.study.objective)}"
        best, self._best = self._best, None  # until the request succeeds
        if best is None:
            best = max((value for _, value in self.history(self.parent, name)), default=-math.inf)
        now, new = milliseconds(), {}
        for number in itertools.takewhile(self._values.__contains__, itertools.count()):
            if (value := self._values[number]) is not None and value > best:
                best, new[number + 1] = value, ({name: value}, now)
        if new:
            self.log(self.parent, new)
        self._best = best

    def leave(self) -> bool:
        """Write waiting entries, and leave the parent run to another coordinator; return whether all are written."""
        return self._end(self.flush)

    def interrupt(self) -> None:
        """Write waiting entries and mark open runs as killed; a resumed study reopens them."""
        self.tell(self._kill_open)
        self.leave()

    def _kill_open(self) -> None:
        for run_id in list(self._open):
            self.close_run(run_id, "interrupted")

    def _log_folder(self, folder: Path) -> None:
        with artifact_store():
            self.client.log_artifacts(self.parent, str(folder), folder.name)

    def restore(self, name: str) -> None:
        """Restore the experiment of this name. Raises InputError if MLflow cannot be reached."""
        with self.as_input_error():
            self.connect()
            if self.deleted(name) is not None:
                self.client.restore_experiment(self.client.get_experiment_by_name(name).experiment_id)

    def _begin_anew(self) -> None:
        """Recreate the database that was deleted while the study ran, from the storage."""
        assert self.file is not None
        self.say(f"{self.file} was deleted; creating it again, with all runs of this study.")
        self._outbox.forget()
        drop_connections(self.uri)
        self._runs, self._inode = None, 0
        self.tell(functools.partial(make_database, self.file))
        self.tell(self._begin)
