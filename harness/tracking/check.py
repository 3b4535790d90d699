"""Where MLflow differs from what the storage says, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from harness.tracking.client import KEY, PARENT, STATE, STATUS, STUDY, TRACEBACK, by_key
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
    """Where MLflow differs from what is expected of it.

    `metrics` and `folders` are those of the study's own run, `running` the keys of unfinished trials.
    """
    if (text := tracker.deleted(tracker.study_name)) is not None:
        yield Finding(text)  # a start with --fix restores it first
        return

    def later(operation: Callable[..., object], *arguments: object) -> Callable[[], None]:
        return partial(tracker.tell, partial(operation, *arguments))

    yield from _moved(tracker)
    runs = tracker.all_runs()
    known = by_key(runs) | {run.data.tags[KEY]: run for run in runs if run.info.run_id == tracker.parent}
    for run in reversed(runs):
        key = run.data.tags[KEY]
        if run.info.run_id != known[key].info.run_id:
            yield Finding(f"MLflow has a second run of {key}", later(tracker.delete, run))
    wanted = {each.key: each for each in expected}
    if STUDY not in known and (known or wanted):
        yield Finding("MLflow lacks the study's own run")  # any start makes it
    elif STUDY in known:
        shown = known[STUDY].data.metrics
        for name in (name for name, value in metrics.items() if shown.get(name) != value):
            yield Finding(f"MLflow lacks {name} of the study's own run")  # its end writes it
        for name in folders:
            yield from _lacking(tracker, known[STUDY], name)  # its end writes it, too
    for key, run in known.items():
        parent = known[STUDY].info.run_id if STUDY in known else None
        if parent and key != STUDY and run.data.tags.get(PARENT) != parent:
            move = later(tracker.client.set_tag, run.info.run_id, PARENT, parent)
            yield Finding(f"MLflow does not show {key} under the study's own run", move)
    for key, each in wanted.items():
        yield from _compare(tracker, each, known.get(key))
    for key, run in known.items():
        if key in wanted or (living and run.info.status == "RUNNING"):
            continue
        if key.startswith("trial-") and key not in running:
            yield Finding(f"MLflow has a run of {key}, which the storage does not know", later(tracker.delete, run))
        elif run.info.status == "RUNNING":
            kill = later(tracker.kill_run, run.info.run_id)
            yield Finding(f"MLflow shows {key} as running, but no process runs it", kill)


def _compare(tracker: MLflowTracker, wanted: Expected, run: Run | None) -> Iterator[Finding]:
    if run is None:
        yield Finding(f"MLflow lacks the run of {wanted.key}", partial(tracker.write, wanted))
        return
    series, write_anew = wanted.series(), partial(_write_anew, tracker, wanted, run)
    # Of several entries at one step the latest counts: a trial may have begun anew, and the coordinator of the process
    # that died may tell of it late.
    found = {name: dict(tracker.history(run.info.run_id, name)) for name in series}
    for name, shown in found.items():
        if not shown.items() <= set(series[name]):
            yield Finding(f"MLflow has other values of {name} for {wanted.key} than the storage", write_anew)
            return
    for name, values in found.items():
        if len(values) < len(series[name]):
            text = f"MLflow has {name} of {wanted.key} at {len(values)} of {len(series[name])} steps"
            # Whole epochs can be added; to one that is there in part nothing is added.
            steps = [found[each].keys() for each in ("train_loss", "val_accuracy") if series[each]]
            even = all(each == steps[0] for each in steps)
            yield Finding(text, partial(tracker.write, wanted) if even else write_anew)
            return
    if wanted.traceback is not None:
        yield from _lacking(tracker, run, TRACEBACK, partial(tracker.write, wanted))
    said = run.info.status, run.data.tags.get(STATE)
    if said != (STATUS[wanted.state], wanted.state):
        text = f"MLflow shows {wanted.key} as {said[1] or said[0]}, but it is {wanted.state}"
        yield Finding(text, partial(tracker.write, wanted))


def _moved(tracker: MLflowTracker) -> Iterator[Finding]:
    file, artifacts = tracker.file, tracker.artifacts
    if file is None or artifacts is None:
        return
    for old in elsewhere(file, artifacts):
        yield Finding(f"MLflow looks for files in {local_folder(old)}, but its database lies in {file.parent} now")


def _lacking(
    tracker: MLflowTracker, run: Run, name: str, mend: Callable[[], object] | None = None
) -> Iterator[Finding]:
    """A file or folder that should lie with a run."""
    key = run.data.tags[KEY]
    try:
        if not tracker.has_file(run, name):
            yield Finding(f"MLflow lacks {name} of {'the study' if key == STUDY else key}", mend)
    except StoreFault as fault:
        yield Finding(f"MLflow's files of {key} cannot be looked at ({fault})")


def model_missing(tracker: MLflowTracker, name: str) -> bool:
    """Whether the registry has no version of the registered model `name` that is this study's, or not its files."""
    query = f"name = '{name}'"
    sources = [each.source for each in tracker.client.search_model_versions(query) if tracker.is_own(each.tags)]
    folders = [folder for each in sources if (folder := local_folder(each)) is not None]
    return not sources or (bool(folders) and not any(folder.is_dir() for folder in folders))


def _write_anew(tracker: MLflowTracker, wanted: Expected, run: Run) -> None:
    tracker.tell(partial(tracker.delete, run))
    tracker.write(wanted)
