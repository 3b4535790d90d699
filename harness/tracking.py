"""MLflow, the view that people browse. Nothing else imports mlflow.

One parent run a study, one child run a trial and one a final seed, found again by tags after a restart. Runs are
written through MlflowClient with explicit ids; the storage is the truth, and `synchronise` brings MLflow into line.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import filelock

from harness.errors import InputError
from harness.results import EpochResult
from harness.space import label, leaves

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from harness.config import Study, TrainConfig
    from harness.storage import Store

# Before mlflow is imported anywhere: no telemetry, no background jobs.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # a server that is away is named after seconds

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
UID, KEY, STATE = "harness.study_uid", "harness.key", "harness.state"


def trial_key(number: int) -> str:
    return f"trial-{number}"


def final_key(trial: int, seed_number: int) -> str:
    """The best trial is part of it: an extended study may find a better one and retrain that."""
    return f"final-seed-{seed_number}-of-trial-{trial}"


class RunLog(Protocol):
    """What a tracker gives for one run."""

    def epoch(self, result: EpochResult) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...
    def text(self, content: str, name: str) -> None: ...
    def end(self, state: str) -> None: ...


class Tracker(Protocol):
    """What watches a study: MLflow, or nothing."""

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None: ...
    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> RunLog: ...
    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> None: ...
    def interrupt(self) -> None: ...


class NoRun:
    def epoch(self, result: EpochResult) -> None:
        """Nothing is kept."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Nothing is kept."""

    def text(self, content: str, name: str) -> None:
        """Nothing is kept."""

    def end(self, state: str) -> None:
        """Nothing is kept."""


class NoTracker:
    """Tracks nothing; for tests and for searches that are measured without it."""

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """Nothing is kept."""

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> RunLog:
        return NoRun()

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> None:
        """Nothing is kept."""

    def interrupt(self) -> None:
        """Nothing is kept."""


@dataclass
class MLflowRun:
    """One MLflow run; metrics of an epoch that it already has are not written twice."""

    client: MlflowClient
    run_id: str
    last_epoch: int
    ended: Callable[[str], None]

    def epoch(self, result: EpochResult) -> None:
        if result.epoch > self.last_epoch:
            self.metrics(result.metrics(), step=result.epoch)
            self.last_epoch = result.epoch

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def text(self, content: str, name: str) -> None:
        self.client.log_text(self.run_id, content, name)

    def end(self, state: str) -> None:
        self.client.set_tag(self.run_id, STATE, state)
        self.client.set_terminated(self.run_id, STATUS[state])
        self.ended(self.run_id)


class MLflowTracker:
    """Logs a study to an MLflow tracking server or database at `uri`."""

    def __init__(self, uri: str, artifacts: Path | None) -> None:
        """`artifacts` is the folder for a local database's files; None leaves them to the server."""
        self.uri = uri
        self._artifacts = artifacts
        self._open: set[str] = set()
        self._runs: dict[str, Run] = {}

    def connect(self) -> None:
        """Raise InputError unless the server or database answers; no run is made."""
        from mlflow import MlflowClient

        _quiet()
        with self._as_input_error():
            self._client = MlflowClient(tracking_uri=self.uri)
            self._client.search_experiments(max_results=1)

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """Open or reopen the study's parent run. Raises InputError when MLflow cannot be reached or written."""
        self.connect()
        with self._as_input_error():
            self._experiment = self._get_experiment(study.name)
            self._tags = {UID: store.attribute("uid"), **facts}
            self._runs = self._known_runs()
            self._parent = self._reopen("study", study.name, {}, self._tags)
        self.synchronise(study, store)

    @contextlib.contextmanager
    def _as_input_error(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"MLflow at {self.uri} cannot be used ({reason}); check --tracking-uri.") from error

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> MLflowRun:
        """A child run: the one with this key if there is one already, else a new one."""
        params = {path: str(label(value)) for path, value in leaves(config)}
        child = {**self._tags, **tags, "mlflow.parentRunId": self._parent}
        known = key in self._runs
        run_id = self._reopen(key, key.replace("-", " "), params, child)
        history = self._client.get_metric_history(run_id, "train_loss") if known else []
        last_epoch = max((metric.step for metric in history), default=0)
        return MLflowRun(self._client, run_id, last_epoch, self._open.discard)

    def synchronise(self, study: Study, store: Store) -> None:
        """Make the runs of finished trials say what the storage says: add what is missing, close what is open."""
        for record in store.trials():
            run = self._runs.get(trial_key(record.number))
            said = None if run is None else (run.info.status, run.data.tags.get(STATE))
            if record.state == "running" or said == (STATUS[record.state], record.state):
                continue
            log = self.run(trial_key(record.number), study.config(record.params), {"harness.kind": "trial"})
            for result in record.epochs:
                log.epoch(result)
            log.end(record.state)

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> None:
        """Write the study's own metrics and files to the parent run and end it; folders are logged whole."""
        log = MLflowRun(self._client, self._parent, 0, self._open.discard)
        if metrics:
            log.metrics(metrics)
        for path in artifacts:
            if path.is_dir():
                self._client.log_artifacts(self._parent, str(path), path.name)
            else:
                self._client.log_artifact(self._parent, str(path))
        # A seed of an earlier final run, killed before the study was extended and found a better trial.
        for run in self._known_runs().values():
            if run.info.status == "RUNNING" and run.info.run_id != self._parent:
                self._client.set_terminated(run.info.run_id, "KILLED")
        log.end(state)

    def interrupt(self) -> None:
        """Mark what is open as killed; a resumed study takes the same runs up again."""
        for run_id in list(self._open):
            self._client.set_tag(run_id, STATE, "interrupted")
            self._client.set_terminated(run_id, "KILLED")
        self._open.clear()

    def _get_experiment(self, name: str) -> str:
        existing = self._client.get_experiment_by_name(name)
        if existing is not None:
            found: str = existing.experiment_id
            return found
        location = (self._artifacts / name).resolve().as_uri() if self._artifacts else None
        tags = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on training runs, not on traces
        made: str = self._client.create_experiment(name, artifact_location=location, tags=tags)
        return made

    def _known_runs(self) -> dict[str, Run]:
        runs: dict[str, Run] = {}
        token = None
        query = f"tags.`{UID}` = '{self._tags[UID]}'"
        while True:
            page = self._client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            runs |= {run.data.tags[KEY]: run for run in page}
            token = page.token
            if not token:
                return runs

    def _reopen(self, key: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
        from mlflow.entities import Param

        if key in self._runs:
            run_id: str = self._runs[key].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            self._client.set_tag(run_id, STATE, "running")
        else:
            every = {**tags, KEY: key, STATE: "running"}
            run = self._client.create_run(self._experiment, tags=every, run_name=name)
            run_id, self._runs[key] = run.info.run_id, run
        if params:
            self._client.log_batch(run_id, params=[Param(path, value) for path, value in params.items()])
        self._open.add(run_id)
        return run_id


def local_tracker(folder: Path) -> MLflowTracker:
    """A tracker on `folder`/mlflow.db. Raises InputError when the folder cannot be written."""
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "mlflow.db.lock"):  # two studies may be started at the same time
        if not (folder / "mlflow.db").exists():
            _create_database(folder)
    return MLflowTracker(local_uri(folder), folder / "artifacts")


def tracker_at(uri: str) -> MLflowTracker:
    """A tracker on a server, or on a SQLite database with its files beside it.

    Raises InputError when the database's folder does not exist.
    """
    if not uri.startswith("sqlite:///"):
        return MLflowTracker(uri, None)
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if not folder.is_dir():
        raise InputError(f"--tracking-uri {uri}: there is no folder {folder}; make it first.")
    return MLflowTracker(uri, folder / "artifacts")


def _create_database(folder: Path) -> None:
    """Make mlflow.db whole or not at all: MLflow cannot open one whose migrations were killed half-way."""
    from mlflow import MlflowClient

    _quiet()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as place:
        made = Path(place) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        made.replace(folder / "mlflow.db")


def _quiet() -> None:
    """MLflow announces each table that it creates; a study has better things to say."""
    import logging

    logging.getLogger("mlflow").setLevel(logging.WARNING)


def local_uri(folder: Path) -> str:
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"


def check_writable(folder: Path) -> None:
    """Raise InputError unless the folder can be made and written; leaves nothing behind."""
    place = folder
    while not place.exists() and not place.is_symlink():
        place = place.parent
    probe = place / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); make it writable or give --tracking-uri.") from error


def facts(study: Study, runtime: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say how and with what a study ran."""
    packages = ("torch", "torchvision", "optuna", "mlflow")
    versions = {f"version.{name}": metadata.version(name) for name in packages}
    return {
        **versions,
        "version.python": sys.version.split()[0],
        "harness.seed": str(study.seed),
        "harness.command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "mlflow.source.git.commit": git_commit(),
        "mlflow.source.name": sys.argv[0],
        **{f"harness.{name}": str(value) for name, value in runtime.items()},
    }


def git_commit() -> str:
    """The commit of this code, with "+changes" if the working tree differs, or "unknown"."""
    import subprocess

    where = Path(__file__).resolve().parent.parent
    try:
        commands = ["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]
        commit, changes = (
            subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + ("+changes" if changes.strip() else "")
