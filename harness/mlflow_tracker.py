"""MLflow, the view that people browse. Nothing else imports mlflow.

One parent run a study, one child run a trial and one a final seed, found again by tags after a restart. Runs are
written through MlflowClient with explicit ids; the storage is the truth, and `synchronise` brings MLflow into line.
A study does not wait for MLflow while it trains: a thread writes (`harness.outbox`). Looking, starting and ending are
done by the caller, at moments when nothing is waiting.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InputError, masked
from harness.mlflow_library import faults, first_line, is_refusal, let_commits_return, milliseconds, quiet
from harness.mlflow_run import MLflowRun
from harness.outbox import Away, Courier, Outbox
from harness.space import label, leaves
from harness.tracking import Expected, expected_runs

if TYPE_CHECKING:
    from mlflow.entities import Run

    from harness.config import Study, TrainConfig
    from harness.storage import Store

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
UID, KEY, STATE = "harness.study_uid", "harness.key", "harness.state"
STUDY, PARENT = "study", "mlflow.parentRunId"  # the key of a study's own run, and the tag that its children carry
EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}  # the UI calls it one of model training
TRAINING = "?workflowType=machine_learning"  # without it MLflow's pages are those for language models


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
        self._outbox = Courier(Outbox(lambda text: print(text, file=sys.stderr), f"MLflow at {masked(uri)}"))

    def connect(self) -> None:
        """Open the client; raises what MLflow raises when it does not answer."""
        from mlflow import MlflowClient

        quiet()
        let_commits_return()
        self.client = MlflowClient(tracking_uri=self.uri)
        self.client.search_experiments(max_results=1)

    def check(self) -> None:
        """Raise InputError unless the server or database answers; no run is made."""
        with self._as_input_error():
            self.connect()

    def pages(self) -> list[tuple[str, str]]:
        """Each experiment's name, and where in MLflow's UI its runs are; once it is connected."""
        known = [each for each in self.client.search_experiments() if each.name != "Default"]
        return sorted((each.name, f"#/experiments/{each.experiment_id}/runs{TRAINING}") for each in known)

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """Open or reopen the study's parent run, and bring its runs into line with the storage.

        Raises InputError when MLflow cannot be reached or written, unless the study has begun: that goes on, and MLflow
        is told when it is back.
        """
        self._study, self._store, self._tags = study, store, {UID: store.attribute("uid"), **facts}
        self._behind = True
        self.flush()
        try:
            self._begin()
        except faults() as error:
            if is_refusal(error) or not store.trials():
                raise self._unusable(error) from error
            self.tell(self._begin)
        self._catch_up()

    def _begin(self) -> None:
        self.connect()
        self._experiment = self._get_experiment(self._study.name)
        self._runs = self.known_runs()
        self._ended_as = self._runs[STUDY].data.tags.get(STATE) if STUDY in self._runs else None
        self.parent = self.open_run(STUDY, {}, self._tags, self._study.name)

    def flush(self) -> bool:
        """Wait until everything told is written, or MLflow does not answer; whether MLflow has taken everything."""
        return self._outbox.flush()

    def _catch_up(self) -> bool:
        """Write what the storage has and MLflow lacks, once it answers; whether MLflow has taken everything."""
        done = self.flush()
        if done and self._behind:
            self._behind = False
            self.synchronise(self._study, self._store)
            done = self.flush()
        return done

    def _end(self, write: Callable[[], bool]) -> bool:
        """Write what can be written now and no more; whether MLflow has taken everything."""
        try:
            return write()
        finally:
            self._outbox.stop()

    def attach(self, study: Study, store: Store) -> None:
        """Look at a study's runs without writing anything. Raises InputError when MLflow cannot be reached."""
        with self._as_input_error():
            self.connect()
            experiment = self.client.get_experiment_by_name(study.name)
            self._experiment = None if experiment is None else experiment.experiment_id
            self._tags = {UID: store.attribute("uid")}

    def replace_folder(self, folder: Path) -> None:
        """Write a folder of the study's own run again, if there is that run. Raises InputError when MLflow does not."""
        with self._as_input_error():
            if (run := self.known_runs().get(STUDY)) is not None:
                self.client.log_artifacts(run.info.run_id, str(folder), folder.name)

    @contextlib.contextmanager
    def _as_input_error(self) -> Iterator[None]:
        try:
            yield
        except faults() as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> InputError:
        return InputError(f"MLflow at {self.uri} cannot be used ({first_line(error)}); check --tracking-uri.")

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> MLflowRun:
        """A child run: the one with this key if there is one already, else a new one.

        Raises what went wrong in the thread since the last one: here it is not taken for a fault of a trial's own.
        """
        self._outbox.check()
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
        self.tell(self._settle)
        return self._end(self.flush)

    def _settle(self) -> None:
        if self._ended_as in STATUS:
            self.close_run(self.parent, self._ended_as)
        else:
            self.kill_run(self.parent)

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> bool:
        """Write the study's own metrics and folders to the parent run and end it; whether MLflow has taken all."""
        now = milliseconds()
        if metrics:
            self.tell(lambda: self._log_study(metrics, now))
        for path in artifacts:
            if path.exists():
                self.tell(functools.partial(self._log_folder, path))
        self.tell(self._close_leftovers)
        self.tell(lambda: self.close_run(self.parent, state))
        self.tell(self._look)
        self._behind = True  # another coordinator may have died before it had told everything
        return self._end(self._catch_up)

    def _look(self) -> None:
        self._runs = self.known_runs()

    def _log_study(self, metrics: Mapping[str, float], now: int) -> None:
        """What the study's own run shows, at the number of its trials; a step later if a reopened test changed it."""
        shown = self.client.get_run(self.parent).data.metrics
        new = {name: value for name, value in metrics.items() if shown.get(name) != value}
        if new:
            steps = {step + 1 for name in new for step in self.steps(self.parent, name)}
            trials = sum(key.startswith("trial-") for key in self.known_runs())
            self.log(self.parent, {max(steps | {trials}): (new, now)})

    def leave(self) -> bool:
        """Write what waits, and leave the study's own run to the coordinator that ends it; whether all is written."""
        return self._end(self.flush)

    def interrupt(self) -> None:
        """Write what waits and mark what is open as killed; a resumed study takes the same runs up again."""
        self.tell(self._kill_open)
        self._end(self.flush)

    def _kill_open(self) -> None:
        for run_id in list(self._open):
            self.kill_run(run_id)

    # -- the operations: each may be repeated ----------------------------------------------------------------------

    def tell(self, operation: Callable[[], object]) -> None:
        """Have it done soon, or when MLflow is back, after everything told before.

        What MLflow refuses for good is named and left out.
        """

        def attempt() -> None:
            try:
                operation()
            except faults() as error:
                if is_refusal(error):
                    print(f"MLflow refuses an entry and it is left out: {first_line(error)}", file=sys.stderr)
                    return
                self._runs = None
                raise Away(first_line(error)) from error
            except BaseException:  # cut off in the middle: whether a run was made must be asked
                self._runs = None
                raise

        self._outbox.add(attempt)

    def has(self, key: str) -> bool:
        if self._runs is None:
            self._runs = self.known_runs()
        return key in self._runs

    def open_run(self, key: str, params: Mapping[str, str], tags: Mapping[str, str], name: str | None = None) -> str:
        from mlflow.entities import Param, RunTag

        if self.has(key):
            assert self._runs is not None
            known = self._runs[key]
            run_id: str = known.info.run_id
            self.client.update_run(run_id, status="RUNNING")
            self.client.set_tag(run_id, STATE, "running")
            if key == STUDY:  # the command, the versions and the rest are those of the last start
                self.client.log_batch(run_id, tags=[RunTag(tag, text) for tag, text in tags.items()])
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

    def _log_folder(self, folder: Path) -> None:
        self.client.log_artifacts(self.parent, str(folder), folder.name)

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
            return str(existing.experiment_id)
        location = (self._artifacts / name).resolve().as_uri() if self._artifacts else None
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
