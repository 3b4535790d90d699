"""MLflow, the view that people browse. Nothing else imports mlflow.

One parent run a study, one child run a trial and one a final seed, found again by tags after a restart. Runs are
written through MlflowClient with explicit ids; the storage is the truth, and `synchronise` brings MLflow into line.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError, masked
from harness.outbox import Away, Outbox
from harness.results import EpochResult
from harness.space import label, leaves
from harness.tracking import Expected, expected_runs

if TYPE_CHECKING:
    from mlflow.entities import Run

    from harness.config import Study, TrainConfig
    from harness.storage import Store

# Before mlflow is imported anywhere: no telemetry, no background jobs.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
# A server that is away or hangs is named after seconds; entries for it wait in an outbox, not in its client. The client
# must not repeat a request by itself: when only the answer was lost, a second run would be made.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the display has its own lines

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
UID, KEY, STATE = "harness.study_uid", "harness.key", "harness.state"
STUDY, PARENT = "study", "mlflow.parentRunId"  # the key of a study's own run, and the tag that its children carry
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}


class MLflowRun:
    """One MLflow run, opened when the first entry arrives; what it already has at a step is not written twice."""

    def __init__(self, tracker: MLflowTracker, key: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._tracker, self._key, self._params, self._tags = tracker, key, params, tags
        self._run_id: str | None = None
        self._steps: set[int] | None = None  # epochs that it has; None when that must be asked
        tracker.tell(self._open)

    def epoch(self, result: EpochResult) -> None:
        now = milliseconds()
        self._tracker.tell(lambda: self._log_epoch(result, now))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now = milliseconds()
        self._tracker.tell(lambda: self._tracker.log_once(self._open(), values, step, now))

    def text(self, content: str, name: str) -> None:
        self._tracker.tell(lambda: self._tracker.client.log_text(self._open(), content, name))

    def end(self, state: str) -> None:
        self._tracker.tell(lambda: self._tracker.close_run(self._open(), state))

    def _log_epoch(self, result: EpochResult, now: int) -> None:
        # Until it is known that the entry arrived, nothing is known about the steps.
        run_id, (steps, self._steps) = self._open(), (self._steps, None)
        if steps is None:
            steps = self._tracker.steps(run_id, "train_loss")
        if result.epoch not in steps:
            self._tracker.log(run_id, result.metrics(), result.epoch, now)
        self._steps = steps | {result.epoch}

    def _open(self) -> str:
        if self._run_id is None:
            new = not self._tracker.has(self._key)
            self._run_id = self._tracker.open_run(self._key, self._params, self._tags)
            self._steps = set() if new else None
        return self._run_id


class MLflowTracker:
    """Logs a study to an MLflow tracking server or database at `uri`.

    When MLflow goes away after the start, entries wait in order until it is back, or until the study's next start.
    """

    def __init__(self, uri: str, artifacts: Path | None) -> None:
        """`artifacts` is the folder for a local database's files; None leaves them to the server."""
        self.uri = uri
        self._artifacts = artifacts
        self._experiment: str | None = None
        self.parent = ""  # the study's own run, once it is open
        self._open: set[str] = set()
        self._runs: dict[str, Run] | None = {}  # by key; None when that must be asked
        self._outbox = Outbox(lambda text: print(text, file=sys.stderr), f"MLflow at {masked(uri)}")

    def connect(self) -> None:
        """Open the client; raises what MLflow raises when it does not answer."""
        from mlflow import MlflowClient

        quiet()
        self.client = MlflowClient(tracking_uri=self.uri)
        self.client.search_experiments(max_results=1)

    def check(self) -> None:
        """Raise InputError unless the server or database answers; no run is made."""
        with self._as_input_error():
            self.connect()

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """Open or reopen the study's parent run, and bring its runs into line with the storage.

        Raises InputError when MLflow cannot be reached or written, unless the study has begun: that goes on, and MLflow
        is told when it is back.
        """
        self._study, self._store, self._tags = study, store, {UID: store.attribute("uid"), **facts}
        self._behind = True
        try:
            self._begin()
        except faults() as error:
            if _is_refusal(error) or not store.trials():
                raise self._unusable(error) from error
            self.tell(self._begin)
        self._catch_up()

    def _begin(self) -> None:
        self.connect()
        self._experiment = self._get_experiment(self._study.name)
        self._runs = self.known_runs()
        self._ended_as = self._runs[STUDY].data.tags.get(STATE) if STUDY in self._runs else None
        self.parent = self.open_run(STUDY, {}, self._tags, self._study.name)

    def _catch_up(self) -> bool:
        """Write what the storage has and MLflow lacks, once it answers; whether MLflow has taken everything."""
        done = self._outbox.flush()
        if done and self._behind:
            self._behind = False
            self.synchronise(self._study, self._store)
            done = self._outbox.flush()
        return done

    def attach(self, study: Study, store: Store) -> None:
        """Look at a study's runs without writing anything. Raises InputError when MLflow cannot be reached."""
        with self._as_input_error():
            self.connect()
            experiment = self.client.get_experiment_by_name(study.name)
            self._experiment = None if experiment is None else experiment.experiment_id
            self._tags = {UID: store.attribute("uid")}

    @contextlib.contextmanager
    def _as_input_error(self) -> Iterator[None]:
        try:
            yield
        except faults() as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> InputError:
        return InputError(f"MLflow at {self.uri} cannot be used ({first_line(error)}); check --tracking-uri.")

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> MLflowRun:
        """A child run: the one with this key if there is one already, else a new one."""
        params = {path: str(label(value)) for path, value in leaves(config)}
        return MLflowRun(self, key, params, {**self._tags, **tags})

    def synchronise(self, study: Study, store: Store) -> None:
        """Make the runs of finished trials say what the storage says: add what is missing, close what is open."""
        for wanted in expected_runs(study, store):
            run = (self._runs or {}).get(wanted.key)
            said = None if run is None else (run.info.status, run.data.tags.get(STATE))
            if said != (STATUS[wanted.state], wanted.state):
                self.write(wanted)

    def write(self, wanted: Expected) -> None:
        """Write a finished run whole; what it has already stays."""
        log = self.run(wanted.key, wanted.config, wanted.tags)
        for result in wanted.epochs:
            log.epoch(result)
        if wanted.metrics:
            log.metrics(wanted.metrics, wanted.config.epochs)
        if wanted.traceback is not None:
            log.text(wanted.traceback, "traceback.txt")
        log.end(wanted.state)

    def settle(self) -> bool:
        """End the parent run as it had ended before this start, else as interrupted; whether MLflow has taken all."""
        if self._ended_as in STATUS:
            self.tell(functools.partial(self.close_run, self.parent, self._ended_as))
        else:
            self.tell(functools.partial(self.kill_run, self.parent))
        return self._outbox.flush()

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> bool:
        """Write the study's own metrics and files to the parent run and end it; folders are logged whole.

        Returns whether MLflow has taken everything.
        """
        now = milliseconds()
        if metrics:
            self.tell(lambda: self.log_once(self.parent, metrics, self._count_trials(), now))
        for path in artifacts:
            if path.exists():
                self.tell(functools.partial(self._log_artifact, path))
        self.tell(self._close_leftovers)
        self.tell(lambda: self.close_run(self.parent, state))
        return self._catch_up()

    def interrupt(self) -> None:
        """Mark what is open as killed; a resumed study takes the same runs up again."""
        for run_id in list(self._open):
            self.tell(functools.partial(self.kill_run, run_id))
        self._outbox.flush()
        self._open.clear()

    # -- the operations: each may be repeated ----------------------------------------------------------------------

    def tell(self, operation: Callable[[], object]) -> None:
        """Do it now if MLflow answers, else when it is back; what MLflow refuses for good is named and left out."""

        def attempt() -> None:
            try:
                operation()
            except faults() as error:
                if _is_refusal(error):
                    print(f"MLflow refuses an entry and it is left out: {first_line(error)}", file=sys.stderr)
                    return
                self._runs = None
                raise Away(first_line(error)) from error

        self._outbox.add(attempt)

    def has(self, key: str) -> bool:
        if self._runs is None:
            self._runs = self.known_runs()
        return key in self._runs

    def open_run(self, key: str, params: Mapping[str, str], tags: Mapping[str, str], name: str | None = None) -> str:
        from mlflow.entities import Param

        if self.has(key):
            assert self._runs is not None
            known = self._runs[key]
            run_id: str = known.info.run_id
            self.client.update_run(run_id, status="RUNNING")
            self.client.set_tag(run_id, STATE, "running")
            # Parameters cannot be changed; where something lies may be another place today.
            params = {path: value for path, value in params.items() if path not in known.data.params}
        else:
            every = {**tags, KEY: key, STATE: "running"} | ({} if key == STUDY else {PARENT: self.parent})
            run = self.client.create_run(self._experiment, tags=every, run_name=name or key.replace("-", " "))
            run_id = run.info.run_id
            assert self._runs is not None
            self._runs[key] = run
        if params:
            self.client.log_batch(run_id, params=[Param(path, value) for path, value in params.items()])
        self._open.add(run_id)
        return run_id

    def close_run(self, run_id: str, state: str) -> None:
        self.client.set_tag(run_id, STATE, state)
        self.client.set_terminated(run_id, STATUS[state])
        self._open.discard(run_id)

    def kill_run(self, run_id: str) -> None:
        self.client.set_tag(run_id, STATE, "interrupted")
        self.client.set_terminated(run_id, "KILLED")

    def delete(self, run: Run) -> None:
        self.client.delete_run(run.info.run_id)
        self._runs = None

    def steps(self, run_id: str, metric: str) -> set[int]:
        return {each.step for each in self.client.get_metric_history(run_id, metric)}

    def log(self, run_id: str, values: Mapping[str, float], step: int, now: int) -> None:
        """`now` is when the entry was told: MLflow knows an entry that comes twice, however late, by its time."""
        from mlflow.entities import Metric

        self.client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def log_once(self, run_id: str, values: Mapping[str, float], step: int, now: int) -> None:
        missing = {name: value for name, value in values.items() if step not in self.steps(run_id, name)}
        if missing:
            self.log(run_id, missing, step, now)

    def _log_artifact(self, path: Path) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.parent, str(path), path.name)
        else:
            self.client.log_artifact(self.parent, str(path))

    def _count_trials(self) -> int:
        return sum(key.startswith("trial-") for key in self.known_runs())

    def _close_leftovers(self) -> None:
        """A seed of an earlier final run, killed before the study was extended and found a better trial.

        And a second run with the same key, made by a request that the server took after it was given up.
        """
        runs = self.all_runs()
        kept = by_key(runs)
        for run in runs:
            if run.info.run_id == self.parent:
                continue
            if run.info.run_id != kept[run.data.tags[KEY]].info.run_id:
                self.client.delete_run(run.info.run_id)
            elif run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _get_experiment(self, name: str) -> str:
        existing = self.client.get_experiment_by_name(name)
        if existing is not None:
            found: str = existing.experiment_id
            return found
        location = (self._artifacts / name).resolve().as_uri() if self._artifacts else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on training runs, not on traces
        made: str = self.client.create_experiment(name, artifact_location=location, tags=tags)
        return made

    def known_runs(self) -> dict[str, Run]:
        """This study's runs by key."""
        return by_key(self.all_runs())

    def all_runs(self) -> list[Run]:
        """Newest first."""
        if self._experiment is None:
            return []
        runs: list[Run] = []
        token = None
        query = f"tags.`{UID}` = '{self._tags[UID]}'"
        while True:
            page = self.client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs


def by_key(newest_first: Iterable[Run]) -> dict[str, Run]:
    """One run for each key: of several, one that has ended, and of those the oldest."""
    kept: dict[str, Run] = {}
    for run in newest_first:
        key = run.data.tags[KEY]
        if key not in kept or kept[key].info.status == "RUNNING" or run.info.status != "RUNNING":
            kept[key] = run
    return kept


def milliseconds() -> int:
    """The time, as MLflow counts it."""
    return int(time.time() * 1000)


def faults() -> tuple[type[Exception], ...]:
    """What MLflow's client raises when its server or database does not do as it is told."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow answered, and the answer will be the same the next time."""
    return getattr(error, "error_code", None) in REFUSALS


def first_line(error: BaseException) -> str:
    """The reason in short: the system's own words where a request wraps them, else the first line."""
    if found := re.search(r"\[Errno -?\d+\] ([^\"')]+)", str(error)):
        return found[1]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quiet() -> None:
    """MLflow announces each table that it creates; a study has better things to say."""
    import logging

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it raises is told in our words
