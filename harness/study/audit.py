"""The `audit` command: train randomly drawn pruned trials to the last epoch, without a pruner."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Generator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from harness.base import mounts
from harness.base.environment import environment
from harness.base.errors import InputError
from harness.base.files import sqlite_file
from harness.base.keys import audit_key
from harness.config.events import EpochResult
from harness.config.find import Found
from harness.config.options import RunOptions
from harness.config.study import Study
from harness.data.splits import content_of
from harness.final import pruning_cost as audit
from harness.report.write import write_report
from harness.store import opening
from harness.store.store import Store, TrialRecord
from harness.study.reproduce import Compared, again, explanation
from harness.study.start import keep_imports
from harness.tracking.places import attached, tracker_at, uri_of
from harness.training.assemble import decide_runtime
from harness.training.checkpoint import SUFFIX, Checkpoint, identity_of, remove
from harness.training.loop import fit
from harness.training.step import Runtime


def audit_study(options: RunOptions, found: Found, fraction: float, seed: int) -> None:
    """Audit a study, or resume its audit. Raises InputError for user errors."""
    url = opening.url_of(found, options.storage)
    if options.tracking_uri:
        tracker_at(options.tracking_uri)  # refuse a wrong URI before training
    with opening.read_store(found.study.name, url) as store:
        study = opening.located(found, store, options.data_root, options.device)
        check_ended(study, store)
        trials, results, asked = sample(store, fraction, seed)
        if not trials:
            print(f"Study {study.name!r} has no pruned trials; there is nothing to audit.")
            return
        runtime = decide_runtime(study.train, store.facts().runtime)
        content = None if results.keys() >= set(map(str, asked)) else content_of(study)
        opening.as_begun(study, store, content)
    if (risk := mounts.warning(sqlite_file(url))) is not None:
        print(f"Warning: {risk}", file=sys.stderr)
    keep_imports()
    with opening.open_store(study, url, content) as store:
        checkpoints = found.beside(url, ".checkpoints")
        with closing(train(study, store, runtime, checkpoints, fraction, seed)) as lines:
            for line in lines:
                store.check_file()
                print(line, flush=True)
        store.check_file()
        print("\n".join(audit.audit_sentences(store.facts().audit or {}, store.facts().objective)))
        write_report_again(study, store, found, options.tracking_uri)


def write_report_again(study: Study, store: Store, found: Found, tracking_uri: str | None) -> None:
    """Rewrite the study's report, and its copy in MLflow if there is one. Raises Halt if the disk is full."""
    folder = found.beside(store.url, ".report")
    page = write_report(study.name, store, uri_of(tracking_uri, found.mlruns), folder)
    print(f"report    {page}", flush=True)
    try:
        tracker = attached(tracking_uri, found.mlruns, study, store)
        if tracker is not None:
            tracker.replace_folder(folder)
    except InputError as error:  # what was asked for is complete
        print(f"{error} The report there lacks this; run the same command to write it, without training.")


def check_ended(study: Study, store: Store) -> None:
    """Raise InputError unless the study is complete and has a best trial."""
    under_way = [trial.number for trial in store.trials() if trial.state == "running"]
    facts = store.facts()
    # Not if a smaller --trials has left it over.
    if under_way and (not store.is_settled() or store.finished() < facts.limited(facts.wanted or 1)):
        raise InputError(
            f"Trial {under_way[0]} of study {study.name!r} is not finished; run the study to its end first."
        )
    if store.best() is None:
        raise InputError(f"Study {study.name!r} has no complete trial to compare with; run it with a larger --trials.")
    if not store.is_settled():
        raise InputError(f"The final run of study {study.name!r} is missing; run the study to its end first.")


def sample(store: Store, fraction: float, seed: int) -> tuple[dict[int, TrialRecord], dict[str, Any], list[int]]:
    """Return the pruned trials by number, the results of those audited, and the numbers to audit in order."""
    pruned = {trial.number: trial for trial in store.trials() if trial.is_pruned}
    results = dict((store.facts().audit or {}).get("results", {}))
    return pruned, results, audit.draw(pruned, fraction, seed, [int(number) for number in results])


def train(
    study: Study, store: Store, runtime: Runtime, checkpoints: Path, fraction: float, seed: int
) -> Generator[str, None, None]:
    """Train the sample's missing trials, yield a line per epoch, and record each trial at its end.

    Writes the study's attribute "audit" only. Killed anywhere, it resumes to the same record.
    """
    trials, _, asked = sample(store, fraction, seed)
    courses = [course(study, trial) for trial in store.trials() if trial.state != "running"]

    def keep(new: Mapping[str, Any]) -> None:
        """Add to what is recorded by now: on a server, another machine may audit, too."""
        with store.exclusive("audit"):
            results = sample(store, fraction, seed)[1] | dict(new)
            store.set_attribute("audit", audit.record(courses, results, len(asked), seed))

    for number in asked:
        path = checkpoints / f"{audit_key(number)}{SUFFIX}"
        with store.exclusive(audit_key(number)):
            if str(number) not in sample(store, fraction, seed)[1]:
                record = yield from _to_the_end(study, trials[number], store, runtime, path)
                keep({str(number): record})
            remove(path)
    keep({})


def course(study: Study, trial: TrialRecord) -> audit.Course:
    """Return the audit's data of a trial."""
    return audit.Course(
        number=trial.number,
        state=trial.state if trial.state != "pruned" or trial.is_pruned else "stopped",
        epochs=study.config(trial.params).epochs,
        curve=tuple(trial.curve.values()),
        seconds=trial.seconds or 0.0,
        epoch_seconds=statistics.fmean(each.seconds for each in trial.epochs) if trial.epochs else 0.0,
    )


def _to_the_end(
    study: Study, trial: TrialRecord, store: Store, runtime: Runtime, path: Path
) -> Generator[str, None, dict[str, Any]]:
    """Train a pruned trial from its own seed; return its record."""
    training = again(study, trial, runtime)
    config = training.config
    identity = identity_of(store.uid, audit_key(trial.number), training.seed, config)
    checkpoint = Checkpoint(path, identity, training, environment(runtime.device))
    checkpoint.restore()
    now: list[EpochResult] = []
    with checkpoint.saved_when_stopped(), closing(fit(training, checkpoint.after_batch)) as results:
        for result in chain(tuple(training.progress.epochs), results):
            if not result.is_finite():
                yield f"trial {trial.number}  epoch {result.epoch}/{config.epochs}  diverged"
                break
            now.append(result)
            yield _line(trial, result, config.epochs)
    same = len(now) >= len(trial.epochs) and all(_same(trial, result) is not False for result in now)
    return {
        "state": "complete" if len(now) == config.epochs else "diverged",
        "curve": [result.val.value for result in now if result.val is not None],
        "same": same,
        "explanation": None if same else explanation(config, trial, runtime),
    }


def _same(trial: TrialRecord, result: EpochResult) -> bool | None:
    """Return whether the epoch equals the record; None for an epoch that was not run then."""
    if result.epoch > len(trial.epochs):
        return None
    return Compared(recorded=trial.epochs[result.epoch - 1], now=result).same


WORDS = {True: "as recorded", False: "DIFFERENT from the record", None: "beyond the record"}


def _line(trial: TrialRecord, result: EpochResult, epochs: int) -> str:
    assert result.val is not None, "a trial has a validation split"
    word = WORDS[_same(trial, result)]
    return f"trial {trial.number}  epoch {result.epoch}/{epochs}  val {result.val.value:.2%}  {word}"
