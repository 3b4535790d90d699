"""A study: the search (ask, evaluate, tell, until enough trials are finished), then the final run."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path

from harness.checkpoint import SUFFIX, remove, stale
from harness.choice import record_choice
from harness.config import Study
from harness.engine import Runtime
from harness.final import final_run
from harness.jobs import Workers
from harness.keys import audit_key, base_key, final_key, rerank_key, trial_key
from harness.leases import LeaseLost
from harness.objective import evaluate_trial
from harness.rerank import rerank
from harness.results import Elsewhere, Event, Failed, TrialLost
from harness.retraining import Place
from harness.storage import POLL_SECONDS, NoTrialFree, Store

FAILURES_IN_A_ROW = 3


class TooManyFailures(Exception):
    """Several trials in a row ended with an exception: the fault is not in the hyperparameters."""


def run(
    study: Study,
    store: Store,
    runtime: Runtime,
    model_folder: Path,
    checkpoints: Path,
    reason: str | None = None,
    workers: Workers | None = None,
) -> Generator[Event, None, None]:
    """Whatever the study still lacks, yielding what happens. Closing the generator stops it.

    `reason` is why the test set may be opened for another trial than before. `workers` train, if there are any.
    """
    if not store.at_work():
        for path in stale(checkpoints, wanted_keys(study, store)):
            remove(path)  # its process died between recording the result and this
    place = Place(study=study, store=store, runtime=runtime, checkpoints=checkpoints, workers=workers)
    done = False
    while not done:
        if workers is None:
            yield from search(study, store, runtime, checkpoints)
        elif store.finished() < wanted(study, store):
            yield from workers.search()
        done = yield from _after_search(place, model_folder, reason)
    for path in left_over(study, store, checkpoints):
        remove(path)  # of what another machine took up and ended


def left_over(study: Study, store: Store, folder: Path) -> list[Path]:
    """The whole checkpoints that nobody will read any more. One that is being written meanwhile is not among them."""
    files = list(folder.glob(f"*{SUFFIX}"))  # before it is asked what is under way
    wanted = wanted_keys(study, store)
    return [path for path in files if path.stem not in wanted]


def wanted(study: Study, store: Store) -> int:
    """How many finished trials there should be: the most that a command asks for that works on the study."""
    return max(study.trials, store.facts().wanted)


def _after_search(place: Place, model_folder: Path, reason: str | None) -> Generator[Event, None, bool]:
    """Choose, retrain and test, as the one process that does; another one waits, lest that process dies.

    Returns False, with nothing done, when another command has come that asks for more trials.
    """
    store = place.store
    waited = False
    while True:
        while not store.lead():
            waited = True
            yield Elsewhere(by=store.leader() or "another process")
            time.sleep(POLL_SECONDS)
        if store.finished() < wanted(place.study, store):
            store.follow()
            return False
        if waited and store.is_settled():
            return True
        try:
            yield from rerank(place)
            record_choice(place.study, store)
            yield from final_run(place, model_folder, reason)
        except LeaseLost:
            continue
        return True


def wanted_keys(study: Study, store: Store) -> set[str]:
    """The trainings whose checkpoints will be read: of interrupted trials, audits, and what comes after the search."""
    keys = {trial_key(trial.number) for trial in store.trials() if trial.state == "running"}
    audited = (store.facts().audit or {}).get("results", {})
    pruned = [trial.number for trial in store.trials() if trial.state == "pruned"]
    keys |= {audit_key(number) for number in pruned if str(number) not in audited}
    if store.has_final():
        return keys
    seeds = range(study.final.seeds)
    keys |= {rerank_key(trial.number, number) for trial in store.candidates(study.final.rerank) for number in seeds}
    if (chosen := store.chosen()) is not None:
        keys |= {key for number in seeds for key in (final_key(chosen.number, number), base_key(0, number))}
    return keys


def search(study: Study, store: Store, runtime: Runtime, checkpoints: Path) -> Iterator[Event]:
    """Run the trials that are missing from those `wanted`, yielding what happens.

    Raises TooManyFailures after three failed trials in a row.
    """
    states = [trial.state for trial in store.trials() if trial.state != "running"]
    failures = next((count for count, state in enumerate(reversed(states)) if state != "failed"), len(states))
    while store.finished() < (count := wanted(study, store)):
        try:
            asked = store.ask(study, at_most=count)
            outcome = yield from evaluate_trial(study, asked, store, runtime, checkpoints)
        except NoTrialFree:
            time.sleep(POLL_SECONDS)  # somebody who is at one of them may die
            continue
        except LeaseLost:
            yield TrialLost(number=asked.number)
            continue
        failures = failures + 1 if isinstance(outcome, Failed) else 0
        if failures >= FAILURES_IN_A_ROW and isinstance(outcome, Failed):
            raise TooManyFailures(
                f"{failures} trials in a row failed, the last one with {outcome.reason}; "
                f"the traceback is in MLflow, in the run of trial {asked.number}."
            )
