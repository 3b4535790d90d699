"""Find and repair differences between MLflow and the storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from harness.tracking.client import KEY, PARENT, STATE, STATUS, STUDY, TRACEBACK
from harness.tracking.expected import Expected, Finding
from harness.tracking.files import elsewhere, local_folder
from harness.tracking.library import StoreFault
from harness.tracking.mlflow import MLflowTracker

if TYPE_CHECKING:
    from mlflow.entities import Run


def disagreements(
    tracker: MLflowTracker,
    expected: list[Expected],
    metrics: Mapping[str, float],
    running: set[str],
    living: bool,
    folders: Sequence[str] = (),
) -> Iterator[Finding]:
    """Yield the differences between MLflow and the expected runs.

    `metrics` and `folders` are those of the study's own run, `running` the keys of unfinished trials. A finding's
    `mend` deletes a run to write it again; the tracker's start or end repairs the rest.
    """
    if (text := tracker.deleted(tracker.study.name)) is not None:
        yield Finding(text)  # `doctor --fix` restores it first
        return
    if tracker.file is not None and tracker.artifacts is not None:
        for old in elsewhere(tracker.file, tracker.artifacts):
            place = tracker.file.parent
            yield Finding(f"MLflow looks for files in {local_folder(old)}, but its database is now in {place}")
    runs = tracker.all_runs()
    known, wanted = tracker.by_key(runs), {each.key: each for each in expected}
    for run in reversed(runs):
        if run is not known[run.data.tags[KEY]]:
            yield Finding(f"MLflow has a second run of {run.data.tags[KEY]}")
    if STUDY in known:
        shown = known[STUDY].data.metrics
        for name in (name for name, value in metrics.items() if shown.get(name) != value):
            yield Finding(f"MLflow lacks {name} of the study's own run")
        for name in folders:
            yield from _lacking(tracker, known[STUDY], name)
        for key, run in known.items():
            if key != STUDY and run.data.tags.get(PARENT) != known[STUDY].info.run_id:
                yield Finding(f"MLflow does not show {key} under the study's own run")
    elif known or wanted:
        yield Finding("MLflow lacks the study's own run")
    for key, each in wanted.items():
        if key in known:
            yield from _compare(tracker, each, known[key])
        else:
            yield Finding(f"MLflow lacks the run of {key}")
    for key, run in known.items():
        if key in wanted or (living and run.info.status == "RUNNING"):
            continue
        if key.startswith("trial-") and key not in running:
            yield Finding(f"MLflow has a run of {key}, which is not in the storage", _drop(tracker, run))
        elif run.info.status == "RUNNING":
            yield Finding(f"MLflow shows {key} as running, but no process runs it")


def _compare(tracker: MLflowTracker, wanted: Expected, run: Run) -> Iterator[Finding]:
    key = wanted.key
    for name, values in wanted.series().items():
        # The latest of several entries at a step counts: a trial may have restarted, and the coordinator of the dead
        # process may log it late.
        shown = dict(tracker.history(run.info.run_id, name))
        if not shown.items() <= set(values):
            yield Finding(f"MLflow has other values of {name} for {key} than the storage", _drop(tracker, run))
            return
        if len(shown) < len(values):
            text = f"MLflow has {name} of {key} at {len(shown)} of {len(values)} steps"
            yield Finding(text, _drop(tracker, run))
            return
    if wanted.traceback is not None:
        yield from _lacking(tracker, run, TRACEBACK)
    status, state = run.info.status, run.data.tags.get(STATE)
    if (status, state) != (STATUS[wanted.state], wanted.state):
        yield Finding(f"MLflow shows {key} as {state or status}, but it is {wanted.state}")


def _drop(tracker: MLflowTracker, run: Run) -> Callable[[], None]:
    """Return a function that deletes a run; the tracker writes it again at its end if it is in the storage."""
    return partial(tracker.tell, partial(tracker.delete, run))


def _lacking(tracker: MLflowTracker, run: Run, name: str) -> Iterator[Finding]:
    """Yield a finding if a run lacks an artifact."""
    key = run.data.tags[KEY]
    try:
        if not tracker.has_file(run.info.run_id, name):
            yield Finding(f"MLflow lacks {name} of {'the study' if key == STUDY else key}")
    except StoreFault as fault:
        yield Finding(f"MLflow's files of {key} cannot be listed ({fault})")


def model_missing(tracker: MLflowTracker, name: str) -> bool:
    """Return whether the registry lacks this study's version of the model `name`, or its files."""
    query = f"name = '{name}'"
    sources = [each.source for each in tracker.client.search_model_versions(query) if tracker.is_own(each.tags)]
    folders = [folder for each in sources if (folder := local_folder(each)) is not None]
    return not sources or (bool(folders) and not any(folder.is_dir() for folder in folders))
