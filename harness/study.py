"""A study: the search (ask, evaluate, tell, until enough trials are finished), then the final run."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from harness.checkpoint import remove, stale
from harness.config import Study
from harness.engine import Runtime
from harness.final import final_run
from harness.objective import evaluate_trial
from harness.results import Event, Failed, TrialEnded
from harness.storage import Store
from harness.tracking import Tracker, final_key, trial_key

FAILURES_IN_A_ROW = 3


class TooManyFailures(Exception):
    """Several trials in a row ended with an exception: the fault is not in the hyperparameters."""


def run(
    study: Study, store: Store, tracker: Tracker, runtime: Runtime, model_folder: Path, checkpoints: Path
) -> Generator[Event, None, None]:
    """Whatever the study still lacks, yielding what happens. Closing the generator stops it."""
    for path in stale(checkpoints, wanted_keys(study, store)):
        remove(path)  # its process died between recording the result and this
    yield from search(study, store, tracker, runtime, checkpoints)
    yield from final_run(study, store, tracker, runtime, model_folder, checkpoints)


def wanted_keys(study: Study, store: Store) -> set[str]:
    """The trainings whose checkpoints will be read: of interrupted trials, and of a final run without a result."""
    keys = {trial_key(trial.number) for trial in store.trials() if trial.state == "running"}
    best = store.best()
    if best is not None and not store.has_final():
        keys |= {final_key(best.number, number) for number in range(study.final.seeds)}
    return keys


def search(study: Study, store: Store, tracker: Tracker, runtime: Runtime, checkpoints: Path) -> Iterator[Event]:
    """Run the trials that are missing from `study.trials`, yielding what happens.

    Raises TooManyFailures after three failed trials in a row.
    """
    states = [trial.state for trial in store.trials() if trial.state != "running"]
    failures = next((count for count, state in enumerate(reversed(states)) if state != "failed"), len(states))
    while store.finished() < study.trials:
        asked = store.ask(study)
        outcome = yield from evaluate_trial(study, asked, store, tracker, runtime, checkpoints)
        yield TrialEnded(number=asked.number, outcome=outcome)
        failures = failures + 1 if isinstance(outcome, Failed) else 0
        if failures >= FAILURES_IN_A_ROW and isinstance(outcome, Failed):
            raise TooManyFailures(
                f"{failures} trials in a row failed, the last one with {outcome.reason}; "
                f"the traceback is in MLflow, in the run of trial {asked.number}."
            )
