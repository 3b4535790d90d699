"""Limits of a search besides the number of its trials: hours, patience, and a value that is good enough.

They are functions of the recorded trials, evaluated before a trial is asked for, so that a resumed study stops where
the uninterrupted one does. A stopped study is the one with that number of trials. Hours are those of training, added
up over workers and restarts. What the final run needs is set aside first; a trial that cannot reach its first rung in
what is left is not begun, and one that uses it up ends after the epoch. The base, trial 0, always completes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harness.base.words import OBJECTIVES, percent
from harness.config.study import Study
from harness.store.records import TrialRecord
from harness.store.view import StudyView

OUT_OF_HOURS = "the hours are used"


def reason_to_stop(study: Study, store: StudyView) -> str | None:
    """Return why no further trial should begin; None if one should, or if the search has stopped already."""
    if not any(study.limits().values()):
        return None
    stopped = store.facts().stopped
    if stopped is not None and stopped["limits"] == study.limits():
        return None
    trials = store.trials()
    ended = [trial for trial in trials if trial.state != "running"]
    complete = [trial for trial in ended if trial.value is not None]
    best = max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)
    if best is None:
        # Of pruned ones beside a base that still runs, nothing is said.
        before = min((trial.number for trial in trials if trial.state == "running"), default=len(trials))
        without = sum(trial.number < before for trial in ended)
        if study.patience is not None and without > study.patience:
            return f"{without} trials without one that is complete"
        used = study.hours is not None and any(trial.number == 0 for trial in ended) and hours_left(study, trials) <= 0
        return f"{study.hours:g} h are used, or set aside, and no trial is complete" if used else None
    if study.until is not None and (best.value or 0.0) >= study.until:
        noun = OBJECTIVES[study.objective]
        return (
            f"trial {best.number} has a validation {noun} of {percent(best.value)} ({percent(study.until)} asked for)"
        )
    if study.patience is not None and sum(each.number > best.number for each in ended) >= study.patience:
        count = f"{study.patience} trials" if study.patience > 1 else "1 trial"
        return f"{count} without a new best after trial {best.number}"
    if study.hours is not None and hours_left(study, trials) <= _first_rung(study) * _epoch_seconds(trials) / 3600:
        return f"{study.hours:g} h are used, or set aside for the final run"
    return None


def hours_left(study: Study, trials: Sequence[TrialRecord]) -> float:
    """Return the hours that are left for the search."""
    assert study.hours is not None
    spent = sum(trial.seconds or 0.0 for trial in trials)
    # Where all have diverged or failed, there is nothing to set time aside for.
    after = final_seconds(study, trials) if any(trial.state in ("complete", "pruned") for trial in trials) else 0.0
    return study.hours - (spent + after) / 3600


def final_seconds(study: Study, trials: Sequence[TrialRecord]) -> float:
    """Forecast the training time of the final run from the measured epochs; 0 before there is one."""
    results = [result for trial in trials for result in trial.epochs]
    if not results:
        return 0.0
    last = results[-1]
    images = 1 + last.val.total / last.train.total if last.val and study.final.fit_on == "train+val" else 1.0
    return study.final.trainings(study.trials) * study.train.epochs * _epoch_seconds(trials) * images


def _epoch_seconds(trials: Sequence[TrialRecord]) -> float:
    return statistics.fmean([result.seconds for trial in trials for result in trial.epochs] or [0.0])


def _first_rung(study: Study) -> int:
    """Return the first epoch after which the pruner may stop a trial."""
    rung = getattr(study.pruner.of(study), "rung", lambda epoch: False)
    return next((epoch for epoch in range(1, study.train.epochs) if rung(epoch)), study.train.epochs)
