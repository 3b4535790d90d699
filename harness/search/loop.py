"""The search of a study: ask, evaluate, tell, until enough trials are finished."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from harness.config.events import Event, Failed, SearchStopped, TrialLost
from harness.config.study import Study
from harness.search import limits
from harness.search.trial import evaluate_trial
from harness.store.leases import LeaseLost
from harness.store.store import POLL_SECONDS, NoTrialFree, Store, wanted
from harness.training.step import Runtime

FAILURES_IN_A_ROW = 3


class TooManyFailures(Exception):
    """Several trials in a row ended with an exception, so the hyperparameters are not the cause."""


def search(study: Study, store: Store, runtime: Runtime, checkpoints: Path) -> Iterator[Event]:
    """Run trials until there are as many as `wanted`, yielding events.

    Raises TooManyFailures after three failed trials in a row.
    """
    states = [trial.state for trial in store.trials() if trial.state != "running"]
    failures = next((count for count, state in enumerate(reversed(states)) if state != "failed"), len(states))
    while store.finished() < (count := wanted(study, store)):
        try:
            if (reason := limits.reason_to_stop(study, store)) is not None:
                yield SearchStopped(trials=store.stop(study.limits(), reason), reason=reason)
                continue
            asked = store.ask(study, at_most=count)
            outcome = yield from evaluate_trial(study, asked, store, runtime, checkpoints)
        except NoTrialFree:
            time.sleep(POLL_SECONDS)  # a worker of a running trial may die
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
