"""The one place where an Optuna trial meets training."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Generator
from contextlib import closing

from harness.config import Study
from harness.engine import Runtime
from harness.experiment import assemble
from harness.optim import group_table
from harness.results import (
    Completed,
    Diverged,
    EpochEnded,
    EpochResult,
    Event,
    Failed,
    Pruned,
    TrialOutcome,
    TrialStarted,
)
from harness.seeds import derive_seed
from harness.storage import Asked, Store
from harness.tracking import RunLog, Tracker, trial_key
from harness.trainer import Training, fit


def evaluate_trial(
    study: Study, asked: Asked, store: Store, tracker: Tracker, runtime: Runtime
) -> Generator[Event, None, TrialOutcome]:
    """Train one configuration, yielding what happens; the generator's return value is the outcome, already told.

    An exception inside the trial is an outcome too (Failed); one that stops the process is not, and leaves the trial
    to be taken up again.
    """
    start, epochs = time.perf_counter(), list[EpochResult]()
    config = study.config(asked.params)
    seed = derive_seed(study.seed, "trial", asked.number)
    log = tracker.run(trial_key(asked.number), config, {"harness.kind": "trial", "harness.trial_seed": str(seed)})
    try:
        training = assemble(config, runtime, seed)
        log.text(group_table(training.groups), "parameter_groups.txt")
        outcome = yield from _train(training, asked, store, log, epochs)
    except Exception as error:  # noqa: BLE001 - whatever breaks a trial is that trial's result
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome = Failed(reason=reason, traceback=traceback.format_exc())
        log.text(outcome.traceback, "traceback.txt")
    store.tell(asked, outcome, epochs, seconds=time.perf_counter() - start)
    log.end(outcome.state)
    return outcome


def _train(
    training: Training, asked: Asked, store: Store, log: RunLog, epochs: list[EpochResult]
) -> Generator[Event, None, TrialOutcome]:
    name, last = f"trial {asked.number}", training.config.epochs
    yield TrialStarted(
        name=name,
        number=asked.number,
        params=asked.params,
        epochs=last,
        resumed=asked.resumed,
        progress=training.progress,
    )
    with closing(fit(training)) as results:
        for result in results:
            if result.val is None:
                raise ValueError("A trial needs a validation split.")
            if not math.isfinite(result.train.loss):
                return Diverged(epoch=result.epoch)
            epochs.append(result)
            value = result.val.accuracy
            store.report(asked, result.epoch, value)
            log.epoch(result)
            yield EpochEnded(name=name, number=asked.number, result=result)
            if result.epoch < last and store.should_prune(asked, result.epoch):
                return Pruned(epoch=result.epoch)
    return Completed(value=value)
