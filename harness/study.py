"""A study: the search (ask, evaluate, tell, until enough trials are finished), then the final run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.config import Study
from harness.engine import Runtime
from harness.final import final_run
from harness.objective import evaluate_trial
from harness.results import Event, Failed, TrialEnded
from harness.storage import Store
from harness.tracking import Tracker

FAILURES_IN_A_ROW = 3


class TooManyFailures(Exception):
    """Several trials in a row ended with an exception: the fault is not in the hyperparameters."""


def run(study: Study, store: Store, tracker: Tracker, runtime: Runtime, model_folder: Path) -> Iterator[Event]:
    """Whatever the study still lacks, yielding what happens. Closing the generator stops it."""
    yield from search(study, store, tracker, runtime)
    yield from final_run(study, store, tracker, runtime, model_folder)


def search(study: Study, store: Store, tracker: Tracker, runtime: Runtime) -> Iterator[Event]:
    """Run the trials that are missing from `study.trials`, yielding what happens.

    Raises TooManyFailures after three failed trials in a row.
    """
    failures = 0
    while store.finished() < study.trials:
        asked = store.ask(study)
        outcome = yield from evaluate_trial(study, asked, store, tracker, runtime)
        yield TrialEnded(number=asked.number, outcome=outcome)
        failures = failures + 1 if isinstance(outcome, Failed) else 0
        if failures == FAILURES_IN_A_ROW and isinstance(outcome, Failed):
            raise TooManyFailures(
                f"{failures} trials in a row failed, the last one with {outcome.reason}; "
                f"the traceback is in MLflow, in the run of trial {asked.number}."
            )
