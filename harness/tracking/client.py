"""A study's runs in MLflow: find them by tags, open, write, close. Each operation may be repeated.

A thread writes the entries, run by run, so that training does not wait for MLflow.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import masked
from harness.base.files import sqlite_path
from harness.base.words import metric_name
from harness.tracking.library import (
    LONGEST_PARAM,
    LONGEST_TAG,
    Deleted,
    StoreFault,
    artifact_store,
    faults,
    first_line,
    fitted,
    is_refusal,
    let_commits_return,
    milliseconds,
    no_stray_folder,
    quiet,
    set_aside,
)
from harness.tracking.outbox import Away, Outbox, WriterThread

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Param, Run, RunTag

    from harness.config.study import Study

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED", "interrupted": "KILLED"}
UID, KEY, STATE = "harness.study_uid", "harness.key", "harness.state"
STUDY, PARENT = "study", "mlflow.parentRunId"  # the key of a study's own run, and the tag of its children
TRACEBACK = "traceback.txt"
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # model training, in the UI
VIEW = "harness-results"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"  # a saved view, for MLflow 3.15 and newer
MOST_COLUMNS = 20  # of hyperparameters; a tag is limited to 5,000 characters


def view_of(study: Study) -> str:
    """Return the saved view of a study's runs: its results and searched hyperparameters, the best first."""
    columns = [
        *(f"metrics.`{split}_{metric_name(study.objective)}`" for split in ("val", "test")),
        *(f"params.`{path}`" for path in list(study.space)[:MOST_COLUMNS]),
        f"tags.`{STATE}`",
    ]
    state = {"selectedColumns": columns, "columnOrder": columns, "orderByKey": columns[0], "orderByAsc": False}
    now = milliseconds()
    return json.dumps({"name": "Results", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})


class StudyClient:
    """The runs of one study, written by MlflowClient with explicit run ids.

    A thread does the operations, and waits while MLflow is unreachable.
    """

    study: Study

    def __init__(self, uri: str, artifacts: Path | None) -> None:
        """`artifacts` is the folder for a local database's files; None leaves them to the server."""
        self.uri = uri
        self.file, self._inode = sqlite_path(uri), 0
        self.artifacts = artifacts
        self.parent = ""  # the study's own run, once it is open
        self._experiment: str | None = None
        self._tags: Mapping[str, str] = {}  # of every run of the study
        self._data: Mapping[str, str] = {}  # its data set, see `harness.tracking.expected`
        self._open: set[str] = set()
        self._runs: dict[str, Run] | None = {}  # by key; None if unknown
        self._said: set[str] = set()
        self._left: list[Callable[[], object]] = []  # failed artifact uploads, to be retried
        self._outbox = WriterThread(
            Outbox(lambda text: print(masked(text), file=sys.stderr), f"MLflow at {masked(uri)}")
        )

    def connect(self) -> None:
        """Open the client. Raises MLflow's error if it does not answer."""
        from mlflow import MlflowClient

        quiet()
        let_commits_return()
        set_aside(self.uri)
        if not self.uri.startswith(("http", "databricks")):  # for a server, nothing of databases is imported
            from mlflow.store.db import utils

            utils.MAX_RETRY_COUNT = 2  # MLflow's ten take 100 s, in which nothing says what is wrong
        with no_stray_folder(self.uri):
            # A program may have set another registry for all clients.
            self.client = MlflowClient(self.uri, None if self.uri.startswith("databricks") else self.uri)
            self.client.search_experiments(max_results=1)
        if self.file is not None:
            self._inode = self.file.stat().st_ino

    def is_own(self, tags: Mapping[str, str]) -> bool:
        """Return whether tags belong to this study."""
        return tags.get(UID) == self._tags[UID]

    def deleted(self, name: str) -> str | None:
        """Return how to restore the experiment of this name if it was deleted in MLflow; None if it was not."""
        found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "active":
            return None
        uri = shlex.quote(masked(self.uri))
        return (
            f"The experiment {name!r} was deleted in MLflow; restore it and its runs with `python -m harness doctor "
            f"{name} --fix --tracking-uri {uri}`, or with `MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`"
        )

    def has_file(self, run_id: str, name: str) -> bool:
        """Return whether a run has an artifact. Raises StoreFault if the artifact store fails."""
        with artifact_store():
            return any(each.path == name for each in self.client.list_artifacts(run_id))

    def add_file(self, run_id: str, name: str, text: str) -> None:
        """Add an artifact to a run, unless it exists."""
        if not self.has_file(run_id, name):
            with artifact_store():
                self.client.log_text(run_id, text, name)

    def flush(self) -> bool:
        """Wait until all entries are written, or MLflow does not answer; return whether all are written."""
        return self._outbox.flush()

    def tell(self, operation: Callable[[], object]) -> None:
        """Queue an operation; a thread runs it soon, or when MLflow is back, in order.

        Entries that MLflow rejects permanently are reported and skipped.
        """

        def attempt() -> None:
            try:
                if self._is_lost():
                    raise FileNotFoundError(f"{self.file} was deleted")
                try:
                    operation()
                except faults() as error:
                    if is_refusal(error) and (text := self.deleted(self.study.name)) is not None:
                        raise Deleted(text) from error
                    raise
            except StoreFault as fault:
                self.say(f"MLflow's files cannot be written ({fault}). The study goes on, and tries again at its end.")
            except BaseException as error:
                if is_refusal(error):
                    self.say(f"MLflow refuses an entry, which is skipped: {first_line(error)}")
                    return
                self._runs = None  # interrupted: a run may have been created
                if isinstance(error, faults()):
                    raise Away(first_line(error)) from error
                raise

        self._outbox.add(attempt)

    def tell_file(self, operation: Callable[[], object]) -> None:
        """Queue an artifact upload. If the store fails, this and later uploads wait without blocking the rest."""

        def attempt() -> None:
            if self._left:
                self._left.append(operation)
                return
            try:
                operation()
            except StoreFault:
                self._left.append(operation)
                raise

        self.tell(attempt)

    def say(self, text: str) -> None:
        """Print to stderr, once."""
        if text not in self._said:
            self._said.add(text)
            print(masked(text), file=sys.stderr)

    def runs(self) -> dict[str, Run]:
        """Return this study's runs by key, cached if known."""
        if self._runs is None:
            self._runs = self.known_runs()
        return self._runs

    def open_run(self, key: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
        from mlflow.entities import Param, RunTag

        tags = {tag: fitted(text, LONGEST_TAG) for tag, text in tags.items()} | {STATE: "running"}
        run = self.runs().get(key)
        if run is None:
            every = {**tags, KEY: key} | ({} if key == STUDY else {PARENT: self.parent})
            name = self.study.name if key == STUDY else key.replace("-", " ")
            run = self.runs()[key] = self.client.create_run(self._experiment, tags=every, run_name=name)
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
            # The tags of the study's own run are those of the last start.
            changed = tags if key == STUDY else {STATE: "running"}
            self._log_each(run.info.run_id, "tags", [RunTag(tag, text) for tag, text in changed.items()])
        if self._data and not (run.inputs and run.inputs.dataset_inputs):
            self.client.log_inputs(run.info.run_id, [self._input()])
        # Logged parameters cannot be changed, although paths may differ now.
        new = {path: value for path, value in params.items() if path not in run.data.params}
        if new:
            entries = [Param(path, fitted(value, LONGEST_PARAM)) for path, value in new.items()]
            self._log_each(run.info.run_id, "params", entries)
        self._open.add(run.info.run_id)
        return str(run.info.run_id)

    def _input(self) -> DatasetInput:
        """Return the data set as MLflow has it, so that its column in the table of runs is not empty."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        return DatasetInput(Dataset(**self._data), [InputTag("mlflow.data.context", "training")])

    def _log_each(self, run_id: str, kind: str, entries: Sequence[Param | RunTag]) -> None:
        """Write parameters or tags in one request; if it is refused, skip only the refused entries."""
        try:
            self.client.log_batch(run_id, **{kind: entries})
        except faults() as error:
            if not is_refusal(error) or self.client.get_run(run_id).info.lifecycle_stage != "active":
                raise
            if len(entries) == 1:
                self.say(f"MLflow refuses {kind[:-1]} {entries[0].key}, which is skipped: {first_line(error)}")
                return
            for each in entries:
                self._log_each(run_id, kind, [each])

    def close_run(self, run_id: str, state: str) -> None:
        self.client.set_tag(run_id, STATE, state)
        self.client.set_terminated(run_id, STATUS[state])
        self._open.discard(run_id)

    def delete(self, run: Run) -> None:
        self.client.delete_run(run.info.run_id)
        self._runs = None

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return step and value of every entry, ordered by time."""
        entries = sorted(self.client.get_metric_history(run_id, metric), key=lambda each: each.timestamp)
        return [(each.step, each.value) for each in entries]

    def log(self, run_id: str, steps: Mapping[int, tuple[Mapping[str, float], int]]) -> None:
        """Write values by step, with their timestamps in milliseconds, in one request.

        MLflow recognizes a repeated entry, however late, by its timestamp.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, now, step) for step, (values, now) in steps.items() for name, value in values.items()
        ]
        self.client.log_batch(run_id, metrics=metrics)

    def _restore_own_run(self) -> None:
        """Restore the study's own run if it was deleted; trials are written again from the storage."""
        from mlflow.entities import ViewType

        query = f"tags.`{UID}` = '{self._tags[UID]}' and tags.`{KEY}` = '{STUDY}'"
        for run in self.client.search_runs([self._experiment], query, ViewType.DELETED_ONLY, max_results=1):
            self.client.restore_run(run.info.run_id)
            self._runs = self.known_runs()

    def _keep_own_run(self) -> None:
        if self.client.get_run(self.parent).info.lifecycle_stage != "active":
            self.client.restore_run(self.parent)

    def _close_leftovers(self) -> None:
        """Close the open runs of an earlier final run, killed before the study was extended and found a better trial.

        Also delete duplicates of a key, from requests that succeeded after their timeout, and adopt the children of a
        lost parent run.
        """
        runs = self.all_runs()
        kept = self.by_key(runs)
        for run in runs:
            if run.info.run_id == self.parent:
                continue
            if run is not kept[run.data.tags[KEY]]:
                self.client.delete_run(run.info.run_id)
                continue
            if run.info.status == "RUNNING":
                self.close_run(run.info.run_id, "interrupted")
            if run.data.tags.get(PARENT) != self.parent:
                self.client.set_tag(run.info.run_id, PARENT, self.parent)
        self._runs = kept

    def _is_lost(self) -> bool:
        """Return whether the database's file was deleted or replaced; writes to it would be lost."""
        if self.file is None or not self._inode:
            return False
        return not self.file.exists() or self.file.stat().st_ino != self._inode

    def _get_experiment(self) -> str:
        name = self.study.name
        if (text := self.deleted(name)) is not None:
            raise Deleted(text)
        if (existing := self.client.get_experiment_by_name(name)) is not None:
            return str(existing.experiment_id)
        location = (self.artifacts / name).resolve().as_uri() if self.artifacts else None
        return str(self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT))

    def known_runs(self) -> dict[str, Run]:
        """Return this study's runs by key."""
        return self.by_key(self.all_runs())

    def by_key(self, newest_first: Iterable[Run]) -> dict[str, Run]:
        """Return one run per key: of several, the open parent run, else an ended one, and of those the oldest."""

        def rank(run: Run) -> tuple[bool, bool]:
            return run.info.run_id == self.parent, run.info.status != "RUNNING"

        return {run.data.tags[KEY]: run for run in sorted(newest_first, key=rank)}  # the last one stays

    def all_runs(self) -> list[Run]:
        """Return all runs of this study, newest first."""
        from mlflow.utils import get_results_from_paginated_fn

        if self._experiment is None:
            return []
        query = f"tags.`{UID}` = '{self._tags[UID]}'"

        def page(count: int, token: str | None) -> Sequence[Run]:
            return self.client.search_runs([self._experiment], query, max_results=count, page_token=token)

        return get_results_from_paginated_fn(page, 1000)
