"""A study's runs in MLflow: found by their tags, opened, written, closed. Each operation may be repeated.

Nobody waits for MLflow: what is told is written by a thread, run by run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import masked
from harness.base.files import sqlite_path
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
    no_stray_folder,
    quiet,
    set_aside,
)
from harness.tracking.outbox import Away, Outbox, WriterThread

if TYPE_CHECKING:
    from mlflow.entities import Param, Run, RunTag

    from harness.config.study import Study

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED", "interrupted": "KILLED"}
UID, KEY, STATE = "harness.study_uid", "harness.key", "harness.state"
STUDY, PARENT = "study", "mlflow.parentRunId"  # the key of a study's own run, and the tag that its children carry
TRACEBACK = "traceback.txt"
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # the UI calls it one of model training


class StudyClient:
    """What is done to the runs of one study, by MlflowClient with explicit ids.

    What it is told is done by a thread that waits while MLflow is away.
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
        self._open: set[str] = set()
        self._runs: dict[str, Run] | None = {}  # by key; None when that must be asked
        self._said: set[str] = set()
        self._left: list[Callable[[], object]] = []  # files that the artifact store did not take, to be tried again
        self._outbox = WriterThread(Outbox(lambda text: print(text, file=sys.stderr), f"MLflow at {masked(uri)}"))

    def connect(self) -> None:
        """Open the client; raises what MLflow raises when it does not answer."""
        from mlflow import MlflowClient

        quiet()
        let_commits_return()
        set_aside(self.uri)
        with no_stray_folder(self.uri):
            self.client = MlflowClient(tracking_uri=self.uri)
            self.client.search_experiments(max_results=1)
        if self.file is not None:
            self._inode = self.file.stat().st_ino

    def is_own(self, tags: Mapping[str, str]) -> bool:
        """Whether these are the tags of something of this study's."""
        return tags.get(UID) == self._tags[UID]

    def deleted(self, name: str) -> str | None:
        """What there is to do when the experiment of this name was deleted in MLflow's pages; None when it was not."""
        found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == "active":
            return None
        return (
            f"The experiment {name!r} was deleted in MLflow; restore it, with all its runs, by `python -m harness "
            f"doctor {name} --fix`, or by `MLFLOW_TRACKING_URI={self.uri} mlflow experiments restore --experiment-id "
            f"{found.experiment_id}`"
        )

    def has_file(self, run_id: str, name: str) -> bool:
        """Whether a file or folder lies with a run. Raises StoreFault when its store does not say."""
        with artifact_store():
            return any(each.path == name for each in self.client.list_artifacts(run_id))

    def add_file(self, run_id: str, name: str, text: str) -> None:
        """Have a file lie with a run; one that lies there stays."""
        if not self.has_file(run_id, name):
            with artifact_store():
                self.client.log_text(run_id, text, name)

    def flush(self) -> bool:
        """Wait until everything told is written, or MLflow does not answer; whether MLflow has taken everything."""
        return self._outbox.flush()

    def tell(self, operation: Callable[[], object]) -> None:
        """Have it done soon, or when MLflow is back, after everything told before.

        What MLflow refuses for good is named and left out.
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
                self.say(
                    f"MLflow's files cannot be written ({fault}). The study goes on; they are tried again at its end."
                )
            except BaseException as error:
                if is_refusal(error):
                    self.say(f"MLflow refuses an entry and it is left out: {first_line(error)}")
                    return
                self._runs = None  # cut off in the middle: whether a run was made must be asked
                if isinstance(error, faults()):
                    raise Away(first_line(error)) from error
                raise

        self._outbox.add(attempt)

    def tell_file(self, operation: Callable[[], object]) -> None:
        """The same for a file. When its store does not take one, that and those after it hold nothing else up."""

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
        """On stderr, once."""
        if text not in self._said:
            self._said.add(text)
            print(masked(text), file=sys.stderr)

    def runs(self) -> dict[str, Run]:
        """This study's runs by key, as far as they are known without asking."""
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
            # Of the study's own run, the command, the versions and the rest are those of the last start.
            changed = tags if key == STUDY else {STATE: "running"}
            self._log_each(run.info.run_id, "tags", [RunTag(tag, text) for tag, text in changed.items()])
        # Parameters cannot be changed; where something lies may be another place today.
        new = {path: value for path, value in params.items() if path not in run.data.params}
        if new:
            entries = [Param(path, fitted(value, LONGEST_PARAM)) for path, value in new.items()]
            self._log_each(run.info.run_id, "params", entries)
        self._open.add(run.info.run_id)
        return str(run.info.run_id)

    def _log_each(self, run_id: str, kind: str, entries: Sequence[Param | RunTag]) -> None:
        """Write parameters or tags in one request; where that is refused, the one that is refused alone is left out."""
        try:
            self.client.log_batch(run_id, **{kind: entries})
        except faults() as error:
            if not is_refusal(error) or self.client.get_run(run_id).info.lifecycle_stage != "active":
                raise
            if len(entries) == 1:
                self.say(f"MLflow refuses {kind[:-1]} {entries[0].key}, and it is left out: {first_line(error)}")
                return
            half = len(entries) // 2
            self._log_each(run_id, kind, entries[:half])
            self._log_each(run_id, kind, entries[half:])

    def close_run(self, run_id: str, state: str) -> None:
        self.client.set_tag(run_id, STATE, state)
        self.client.set_terminated(run_id, STATUS[state])
        self._open.discard(run_id)

    def delete(self, run: Run) -> None:
        self.client.delete_run(run.info.run_id)
        self._runs = None

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Step and value of every entry, in the order of their times."""
        entries = sorted(self.client.get_metric_history(run_id, metric), key=lambda each: each.timestamp)
        return [(each.step, each.value) for each in entries]

    def log(self, run_id: str, steps: Mapping[int, tuple[Mapping[str, float], int]]) -> None:
        """Write values by step, in one request; beside them the time in milliseconds when they were told.

        MLflow knows an entry that comes twice, however late, by its time.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, now, step) for step, (values, now) in steps.items() for name, value in values.items()
        ]
        self.client.log_batch(run_id, metrics=metrics)

    def _restore_own_run(self) -> None:
        """Have a deleted run of the study back; those of trials are written again from the storage."""
        from mlflow.entities import ViewType

        query = f"tags.`{UID}` = '{self._tags[UID]}' and tags.`{KEY}` = '{STUDY}'"
        for run in self.client.search_runs([self._experiment], query, ViewType.DELETED_ONLY, max_results=1):
            self.client.restore_run(run.info.run_id)
            self._runs = self.known_runs()

    def _keep_own_run(self) -> None:
        if self.client.get_run(self.parent).info.lifecycle_stage != "active":
            self.client.restore_run(self.parent)

    def _close_leftovers(self) -> None:
        """A seed of an earlier final run, killed before the study was extended and found a better trial.

        And a second run with the same key, made by a request that the server took after it was given up; and the
        children of an own run that is lost.
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
        """Whether the database's file is not there any more, or another one; what is written to it reaches nobody."""
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
        """This study's runs by key."""
        return self.by_key(self.all_runs())

    def by_key(self, newest_first: Iterable[Run]) -> dict[str, Run]:
        """One run for each key: of several, the one that is open, else one that has ended, and of those the oldest."""

        def rank(run: Run) -> tuple[bool, bool]:
            return run.info.run_id == self.parent, run.info.status != "RUNNING"

        return {run.data.tags[KEY]: run for run in sorted(newest_first, key=rank)}  # the last one stays

    def all_runs(self) -> list[Run]:
        """Newest first."""
        if self._experiment is None:
            return []
        query = f"tags.`{UID}` = '{self._tags[UID]}'"
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs
