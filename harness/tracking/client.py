"""A study's runs in MLflow: found by their tags, opened, written, closed. Each operation may be repeated."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.base.errors import masked
from harness.base.files import sqlite_path
from harness.tracking.library import (
    LONGEST_PARAM,
    LONGEST_TAG,
    Deleted,
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

if TYPE_CHECKING:
    from mlflow.entities import Param, Run, RunTag

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
UID, KEY, STATE = "harness.study_uid", "harness.key", "harness.state"
STUDY, PARENT = "study", "mlflow.parentRunId"  # the key of a study's own run, and the tag that its children carry
TRACEBACK = "traceback.txt"
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # the UI calls it one of model training


class StudyClient:
    """What is done to the runs of one study, by MlflowClient with explicit ids."""

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

    def has_file(self, run: Run, name: str) -> bool:
        """Whether a file or folder lies with a run. Raises StoreFault when its store does not say."""
        with artifact_store():
            return any(each.path == name for each in self.client.list_artifacts(run.info.run_id))

    def _add_traceback(self, run: Run, text: str) -> None:
        if not self.has_file(run, TRACEBACK):
            with artifact_store():
                self.client.log_text(run.info.run_id, text, TRACEBACK)

    def say(self, text: str) -> None:
        """On stderr, once."""
        if text not in self._said:
            self._said.add(text)
            print(masked(text), file=sys.stderr)

    def has(self, key: str) -> bool:
        if self._runs is None:
            self._runs = self.known_runs()
        return key in self._runs

    def open_run(self, key: str, params: Mapping[str, str], tags: Mapping[str, str], name: str | None = None) -> str:
        from mlflow.entities import Param, RunTag

        tags = {tag: fitted(text, LONGEST_TAG) for tag, text in tags.items()}
        if self.has(key):
            assert self._runs is not None
            known = self._runs[key]
            run_id: str = known.info.run_id
            self.client.update_run(run_id, status="RUNNING")
            self.client.set_tag(run_id, STATE, "running")
            if key == STUDY:  # the command, the versions and the rest are those of the last start
                self._log_each(run_id, "tags", [RunTag(tag, text) for tag, text in tags.items()])
            # Parameters cannot be changed; where something lies may be another place today.
            params = {path: value for path, value in params.items() if path not in known.data.params}
        else:
            every = {**tags, KEY: key, STATE: "running"} | ({} if key == STUDY else {PARENT: self.parent})
            run = self.client.create_run(self._experiment, tags=every, run_name=name or key.replace("-", " "))
            run_id = run.info.run_id
            assert self._runs is not None
            self._runs[key] = run
        if params:
            entries = [Param(path, fitted(value, LONGEST_PARAM)) for path, value in params.items()]
            self._log_each(run_id, "params", entries)
        self._open.add(run_id)
        return run_id

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

    def kill_run(self, run_id: str) -> None:
        self.client.set_tag(run_id, STATE, "interrupted")
        self.client.set_terminated(run_id, "KILLED")
        self._open.discard(run_id)

    def delete(self, run: Run) -> None:
        self.client.delete_run(run.info.run_id)
        self._runs = None

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Step and value of every entry, in the order of their times."""
        entries = sorted(self.client.get_metric_history(run_id, metric), key=lambda each: each.timestamp)
        return [(each.step, each.value) for each in entries]

    def steps(self, run_id: str, metric: str) -> set[int]:
        return {step for step, _ in self.history(run_id, metric)}

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

    def _is_lost(self) -> bool:
        """Whether the database's file is not there any more, or another one; what is written to it reaches nobody."""
        if self.file is None or not self._inode:
            return False
        return not self.file.exists() or self.file.stat().st_ino != self._inode

    def _get_experiment(self, name: str) -> str:
        existing = self.client.get_experiment_by_name(name)
        if existing is not None:
            if (text := self.deleted(name)) is not None:
                raise Deleted(text)
            return str(existing.experiment_id)
        location = (self.artifacts / name).resolve().as_uri() if self.artifacts else None
        return str(self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT))

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
