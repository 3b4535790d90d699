"""The search of a study: ask, evaluate, tell, until enough trials are finished. A trial is evaluated by training it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

from harness.base.environment import environment
from harness.base.errors import Halt, InputError, first_line, no_room
from harness.base.keys import trial_key
from harness.base.seeds import derive_seed
from harness.config import events
from harness.config.study import Study
from harness.data.splits import content_of
from harness.search import limits
from harness.store.leases import LeaseLost
from harness.store.store import POLL_SECONDS, Asked, NoTrialFree, Store, wanted
from harness.training.assemble import assemble
from harness.training.checkpoint import SUFFIX, Checkpoint, identity_of, remove
from harness.training.loop import Training, fit
from harness.training.optim import group_table
from harness.training.step import Runtime, free_memory, is_device_failure

FAILURES_IN_A_ROW = 3
SKIPPED = "skipped by hand"


class TooManyFailures(Exception):
    """Several trials in a row ended with an exception, so the hyperparameters are not the cause."""


def search(study: Study, store: Store, runtime: Runtime, checkpoints: Path) -> Iterator[events.Event]:
    """Run trials until there are as many as `wanted`, yielding events.

    Raises TooManyFailures after three failed trials in a row.
    """
    states = [trial.state for trial in store.trials() if trial.state != "running"]
    failures = next((count for count, state in enumerate(reversed(states)) if state != "failed"), len(states))
    while store.finished() < (count := wanted(study, store)):
        try:
            if (reason := limits.reason_to_stop(study, store)) is not None:
                yield events.SearchStopped(trials=store.stop(study.limits(), reason), reason=reason)
                continue
            asked = store.ask(study, at_most=count)
            outcome = yield from evaluate_trial(study, asked, store, runtime, checkpoints)
        except NoTrialFree:
            time.sleep(POLL_SECONDS)  # a worker of a running trial may die
            continue
        except LeaseLost:
            yield events.TrialLost(number=asked.number)
            continue
        if runtime.device.type != "cpu":
            free_memory(runtime.device)  # a compiled model is cyclic garbage; the next trial, or a neighbour, needs it
        failures = failures + 1 if isinstance(outcome, events.Failed) else 0
        # After the last trial the study goes on with what it has, as it would if it had been killed here.
        is_done = store.finished() >= count and any(trial.state == "complete" for trial in store.trials())
        if failures >= FAILURES_IN_A_ROW and isinstance(outcome, events.Failed) and not is_done:
            raise TooManyFailures(
                f"{failures} trials in a row failed, the last one with {outcome.reason}; "
                f"the traceback is in MLflow, in the run of trial {asked.number}."
            )


class Skipped(Exception):
    """The user has asked to end this trial."""


def evaluate_trial(
    study: Study, asked: Asked, store: Store, runtime: Runtime, checkpoints: Path
) -> Generator[events.Event, None, events.TrialOutcome]:
    """Train one configuration, yielding events; the generator returns the outcome, already stored.

    An exception inside the trial is an outcome, too (Failed). What stops the process is not: the trial is resumed
    later, from a checkpoint if there was time to write one. Neither is a fault that affects all trials (Halt), nor a
    takeover by another process (LeaseLost).
    """
    start = time.monotonic()
    config, key = study.config(asked.params), trial_key(asked.number)
    seed = derive_seed(study.seed, "trial", asked.number)
    checkpoint = None
    try:
        training = assemble(config, runtime, seed, study.objective)
        identity = identity_of(store.uid, key, seed, config)
        here = environment(runtime.device)
        path = checkpoints / f"{key}{SUFFIX}"
        checkpoint = Checkpoint(path, identity, training, here, check=lambda: store.check(asked))
        outcome = yield from _train(training, study, asked, store, checkpoint)
    except Skipped:
        outcome = events.Pruned(epoch=len(training.progress.epochs), reason=SKIPPED)
    except (Halt, LeaseLost):
        raise
    except Exception as error:  # noqa: BLE001 - the backbone's code may raise any
        begun = None if checkpoint is None else len(training.progress.epochs)
        outcome = _outcome_of(error, study, asked, store, begun)
    if checkpoint is None:
        store.tell(asked, outcome, [], time.monotonic() - start)
    else:
        epochs = [result for result in training.progress.epochs if result.is_finite()]
        with checkpoint.saved_when_stopped():
            store.tell(asked, outcome, epochs, checkpoint.seconds(), checkpoint.environments)
        remove(checkpoint.path)
    yield events.TrialEnded(key=key, number=asked.number, params=asked.params, outcome=outcome)
    return outcome


def _outcome_of(error: Exception, study: Study, asked: Asked, store: Store, epochs: int | None) -> events.TrialOutcome:
    """Return the outcome of a trial that ended with an error after `epochs`; None: before it could be built.

    Raises Halt for what is not the trial's fault: a full disk, a lost device, images or weights out of reach.
    """
    if no_room(error):
        raise Halt(f"{error}; make room.") from error
    unreached = epochs is None and _is_out_of_reach(error, study)
    if not unreached and not is_device_failure(error):
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return events.Failed(reason=reason, traceback=traceback.format_exc())
    if store.is_skipped(asked):
        return events.Pruned(epoch=epochs or 0, reason=SKIPPED)
    what = f"Trial {asked.number} cannot begin" if unreached else "The device failed"
    remedy = f"python -m harness skip {study.name} {asked.number}" if asked.number else "change the base"
    raise Halt(
        f"{what} ({first_line(error).rstrip('.')}); run the same command again. "
        f"If trial {asked.number} fails each time: {remedy}"
    ) from error


def _is_out_of_reach(error: Exception, study: Study) -> bool:
    """Return whether images or weights cannot be read; other errors of a configuration are its own."""
    if isinstance(error, InputError):
        try:
            content_of(study)
        except (InputError, OSError):
            return True
    return isinstance(error, OSError)


def _end_if_skipped(asked: Asked, store: Store, restored: Sequence[events.EpochResult]) -> None:
    """Raise Skipped if a person asked for that, with the values of the checkpoint's epochs stored."""
    if store.is_skipped(asked):
        for result in restored:
            if result.val is not None and result.is_finite():
                store.report(asked, result.epoch, result.val.value)
        raise Skipped


def _restore(checkpoint: Checkpoint, asked: Asked, store: Store) -> None:
    checkpoint.restore()
    if asked.resumed:  # its checkpoint may be lost, or on another machine
        known = next((trial.seconds for trial in store.trials() if trial.number == asked.number), None)
        checkpoint.seconds_before = max(checkpoint.seconds_before, known or 0.0)


def _train(
    training: Training, study: Study, asked: Asked, store: Store, checkpoint: Checkpoint
) -> Generator[events.Event, None, events.TrialOutcome]:
    key, name, last = trial_key(asked.number), f"trial {asked.number}", training.config.epochs
    _restore(checkpoint, asked, store)
    restored = tuple(training.progress.epochs)
    # Epochs it went beyond: with newer results of other workers the pruner might decide otherwise.
    judged = restored if training.progress.step else restored[:-1]
    yield events.TrialStarted(
        key=key,
        kind="trial",
        name=name,
        number=asked.number,
        trial=asked.number,
        params=asked.params,
        epochs=last,
        resumed=asked.resumed,
        groups=group_table(training.groups),
        progress=training.progress,
    )

    def after_batch() -> None:
        store.check(asked)
        if training.progress.step and store.is_skipped(asked):  # not before an epoch's value is stored
            raise Skipped
        checkpoint.after_batch()

    _end_if_skipped(asked, store, restored)
    with checkpoint.saved_when_stopped(), closing(fit(training, after_batch)) as results:
        for result in chain(restored, results):
            if not result.is_finite():
                return events.Diverged(
                    epoch=result.epoch, step=result.diverged_step, lr=result.lr, grad_norm=result.grad_norm
                )
            if result.val is None:
                raise ValueError("A trial needs a validation split.")
            value = result.val.value
            store.report(asked, result.epoch, value)
            if result not in restored:
                yield events.EpochEnded(key=key, name=name, number=asked.number, result=result)
            if result.epoch == last or result in judged:
                continue
            if store.should_prune(asked, result.epoch):
                return events.Pruned(epoch=result.epoch)
            if study.hours is not None:
                store.spend(asked, checkpoint.seconds())
                if asked.number and limits.hours_left(study, store.trials()) <= 0:
                    return events.Pruned(epoch=result.epoch, reason=limits.OUT_OF_HOURS)
    return events.Completed(value=value)
