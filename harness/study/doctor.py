"""The `doctor` command: check that storage, MLflow, checkpoints, model and processes agree, and repair them.

The storage is the source of truth: MLflow is synchronized with it, and unused files are deleted. Results are never
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from harness.base.errors import InputError, masked
from harness.base.files import Damaged, sqlite_file
from harness.base.keys import trial_key
from harness.base.processes import in_words
from harness.config.find import Found
from harness.config.study import Study
from harness.data.cache import damaged
from harness.final import model_files
from harness.final.predictions import from_record
from harness.store.locks import holder, pid_file, recorded_pid
from harness.store.opening import located, open_store, read_store
from harness.store.store import Store
from harness.study.stages import wanted_keys
from harness.tracking.check import disagreements, model_missing
from harness.tracking.expected import Finding, expected_runs, recorded_facts, study_metrics
from harness.tracking.mlflow import MLflowTracker
from harness.tracking.places import attached, tracker_for
from harness.training.checkpoint import SUFFIX, fingerprint, read_tensors, remove, stale

UNFINISHED = "The study has not ended, and no process runs it; run the same command to resume and repair it."


def consult(found: Found, url: str, tracking_uri: str | None, fix: bool) -> bool:
    """Print each disagreement on a line, repair it with `fix`, and return whether all agree now.

    Raises InputError if the study cannot be read, and with `fix` also while a process runs it.
    """
    file = sqlite_file(url)
    with read_store(found.study.name, url) as store:
        study, who = located(found, store), _who(store, file)
        if fix and who is not None:
            raise InputError(f"Study {study.name!r} is being run by {who}; wait for its end, then repair it.")
        tracker = attached(tracking_uri, found.mlruns, study, store)
        findings = list(examine(study, store, tracker, found, who is not None))
        if file is not None and who is None and holder(file) is None and pid_file(file).exists():
            text = f"{pid_file(file)} names process {recorded_pid(file)}, which is gone"
            findings.append(Finding(text, pid_file(file).unlink))
        for finding in findings:
            print(masked(finding.text))
        if not findings:
            print(_well(store, found.beside(url, ".model"), who is not None))
        elif who is not None:
            print(f"The study is running in {who}, and MLflow may lag behind; check again after it ends.")
        elif not fix and not _was_published(store):
            print(UNFINISHED)
    if not (fix and findings):
        return not findings
    with open_store(study, url) as store:
        return _mend(study, store, found, tracking_uri)


def _who(store: Store, file: Path | None) -> str | None:
    """Return the names of the processes that run a study; None if there are none."""
    if file is not None:
        pid = holder(file)
        return None if pid is None else f"process {pid}"
    owners = sorted({in_words(owner) for owner in store.active_workers().values()})
    return _several("process", "processes", owners) if owners else None


def _several(one: str, more: str, names: Sequence[str]) -> str:
    """Return a text such as `trial 3` or `trials 3, 4 and 5`."""
    *rest, last = names
    return f"{more} {', '.join(rest)} and {last}" if rest else f"{one} {last}"


def _well(store: Store, model: Path, living: bool) -> str:
    owners, numbers = store.active_workers(), [trial.number for trial in store.trials() if trial.state == "running"]
    said = [f"Storage, MLflow, checkpoints and processes agree on {store.finished()} finished trials"]
    held = {number: owners[trial_key(number)] for number in numbers if trial_key(number) in owners}
    said += [f"trial {number} is running in process {in_words(owner)}" for number, owner in held.items()]
    if waiting := [str(number) for number in numbers if number not in held]:
        verb = "resumes" if len(waiting) == 1 else "resume"
        said.append(
            f"{_several('trial', 'trials', waiting)} {verb} when {'a worker is free' if living else 'the study does'}"
        )
    if store.has_final() and model_files.is_untested(model):
        said.append(f"the model in {model} was retrained after the tested one was lost, and shows its test result")
    return f"{'; '.join(said)}."


def _mend(study: Study, store: Store, found: Found, tracking_uri: str | None) -> bool:
    """Repair all that can be repaired; return whether all agree. The study must be locked."""
    tracker = tracker_for(tracking_uri, found.mlruns)
    tracker.restore(study.name)
    tracker.start(study, store, recorded_facts(study, store))
    try:
        for finding in list(examine(study, store, tracker, found, living=False)):
            if finding.mend is not None:
                finding.mend()
    except InputError:
        tracker.settle()
        raise
    if _was_published(store):
        folders = model_files.published(store, found.beside(store.url, ".model"))
        told = tracker.finish(study_metrics(store), folders, "complete")
    else:
        told = tracker.settle()
    if not told:
        print("MLflow is incomplete; run the doctor again when it answers.")
    well = told and not list(examine(study, store, tracker, found, living=False))
    print("Repaired." if well else "Some disagreements remain.")
    return well


def _was_published(store: Store) -> bool:
    """Return whether the study's last run ended, whatever number of trials it was asked for."""
    running = any(trial.state == "running" for trial in store.trials())
    return not running and store.facts().published == store.finished()


def examine(study: Study, store: Store, tracker: MLflowTracker | None, found: Found, living: bool) -> Iterator[Finding]:
    """Yield every disagreement. While a process runs the study (`living`), skip running trials.

    The tracker must be attached; None means that there is no MLflow database. Writes nothing; a finding's `mend` does.
    """
    model = found.beside(store.url, ".model")
    if not living:
        yield from _checkpoints(study, store, found.beside(store.url, ".checkpoints"), model)
    if (wrong := store.ledger_fault()) is not None:
        yield Finding(f"In the storage, {wrong}; do not trust the test result; restore the storage from a backup")
    if (predictions := store.facts().predictions) is not None:
        try:
            from_record(predictions)
        except InputError as error:
            yield Finding(f"In the storage: {error}")
    yield from _model(store, model)
    for array in damaged(Path(study.train.data.cache)):  # reads all of it; a start trusts unchanged files
        text = f"The image cache {array} is damaged (its checksum is wrong)"
        yield Finding(text, partial(array.unlink, missing_ok=True))  # the next start writes it again
    expected = expected_runs(study, store)
    if tracker is None:
        if expected:
            yield Finding(f"MLflow has no database and lacks {len(expected)} runs")
        return
    running = {trial_key(trial.number) for trial in store.trials() if trial.state == "running"}
    metrics, folders = (
        (study_metrics(store), model_files.published(store, model)) if _was_published(store) else ({}, [])
    )
    with tracker.as_input_error():
        yield from disagreements(tracker, expected, metrics, running, living, [folder.name for folder in folders])
        if model_files.is_registered(study, store, model) and model_missing(tracker, study.name):
            text = "MLflow's registry lacks the model; run the study again to register it"
            yield Finding(text, partial(store.set_attribute, "registered", None))


def _checkpoints(study: Study, store: Store, folder: Path, model: Path) -> Iterator[Finding]:
    useless = stale(folder, wanted_keys(study, store, model), store.uid)
    for path in useless:
        yield Finding(f"{path} is left over and unused", partial(remove, path))
    for path in sorted(path for path in folder.glob(f"*{SUFFIX}") if path not in useless):
        try:
            identity = read_tensors(path)[1].get("identity", {})
        except Damaged as error:
            yield Finding(f"{error}; its training would restart", partial(remove, path))
            continue
        if identity.get("study") != store.uid:
            alone = sqlite_file(store.url) is not None  # studies on servers may share the folder
            yield Finding(f"{path} belongs to another study", partial(remove, path) if alone else None)


def _model(store: Store, folder: Path) -> Iterator[Finding]:
    final = store.facts().final
    if final is None or not store.has_final():
        return
    try:
        model_files.check_folder(folder, store.url, store.uid)
    except InputError as error:
        yield Finding(str(error).rstrip("."))
        return
    if not model_files.has_model(folder):
        yield Finding(f"{folder} holds no model, but the final run is recorded; {model_files.AGAIN}")
        return
    wrong = model_files.wrong_files(store, folder)
    for name, fault in wrong:
        if name == model_files.CHECK_FILE:
            text = f"{fault}; it cannot be written again, and the registry's check uses validation images instead"
            yield Finding(text, partial(_give_up, store, folder / name))
        else:
            yield Finding(f"{fault}; {model_files.AGAIN}", partial((folder / name).unlink, missing_ok=True))
    needed = {model_files.WEIGHTS, model_files.DESCRIPTION}
    if needed & dict(wrong).keys() or model_files.is_recorded(store, folder, model_files.WEIGHTS):
        return
    weights, description = (folder / name for name in (model_files.WEIGHTS, model_files.DESCRIPTION))
    there = fingerprint(read_tensors(weights)[0])
    # Retrained weights with other bits, marked as such, are as good as this machine can train.
    retrained = {"sha256": there, "tested": False}
    if there != final.per_seed[0].weights and model_files.read_description(description)["weights"] != retrained:
        yield Finding(f"{weights} differs from the final run's weights; {model_files.AGAIN}", weights.unlink)


def _give_up(store: Store, path: Path) -> None:
    """Delete a file of the model that cannot be written again, and its record."""
    path.unlink(missing_ok=True)
    model_files.record_files(store, path.parent, path.name)
