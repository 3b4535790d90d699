"""The one place where an Optuna trial meets training."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Generator
from contextlib import closing

from harness.config import Study, TrainConfig
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
from harness.trainer import fit


def evaluate_trial(
    study: Study, asked: Asked, store: Store, tracker: Tracker, runtime: Runtime
) -> Generator[Event, None, TrialOutcome]:
    """Train one configuration, yielding what happens; the generator's return value is the outcome, already told.

    An exception inside the trial is an outcome too (Failed); one that stops the process is not, and leaves the trial
    to be taken up again.
    """
    start, epochs = time.perf_counter(), list[EpochResult]()
    config = study.config(asked.params)
    log = tracker.run(trial_key(asked.number), config, {"harness.kind": "trial"})
    try:
        outcome = yield from _train(study, config, asked, store, log, runtime, epochs)
    except Exception as error:  # noqa: BLE001 - whatever breaks a trial is that trial's result
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome = Failed(reason=reason, traceback=traceback.format_exc())
        log.text(outcome.traceback, "traceback.txt")
    store.tell(asked, outcome, epochs, seconds=time.perf_counter() - start)
    log.end(outcome.state)
    return outcome


def _train(
    study: Study,
    config: TrainConfig,
    asked: Asked,
    store: Store,
    log: RunLog,
    runtime: Runtime,
    epochs: list[EpochResult],
) -> Generator[Event, None, TrialOutcome]:
    name = f"trial {asked.number}"
    training = assemble(config, runtime, derive_seed(study.seed, "trial", asked.number))
    log.text(group_table(training.groups), "parameter_groups.txt")
    yield TrialStarted(
        name=name,
        number=asked.number,
        params=asked.params,
        epochs=config.epochs,
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
            store.report(asked, result.epoch, result.val.accuracy)
            log.epoch(result)
            yield EpochEnded(name=name, number=asked.number, result=result)
            if result.epoch < config.epochs and store.should_prune(asked):
                return Pruned(epoch=result.epoch)
    return Completed(value=epochs[-1].val.accuracy)  # type: ignore[union-attr]
