"""Trials as the storage knows them, in the project's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from harness.asking import FINISHED
from harness.results import EpochResult


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as the storage knows it, in the project's words."""

    number: int
    state: str  # complete, pruned, diverged, failed, running
    value: float | None  # validation accuracy of the last epoch; None unless complete
    params: dict[str, Any]
    epochs: tuple[EpochResult, ...]
    curve: dict[int, float]  # epoch -> validation accuracy, as reported so far
    reason: str | None
    seconds: float | None
    environments: tuple[dict[str, str], ...] = ()
    traceback: str | None = None


def record_of(trial: FrozenTrial) -> TrialRecord:
    """What Optuna keeps of a trial, in our words."""
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    outcome = trial.user_attrs.get("outcome", {})
    finished = trial.state in FINISHED
    return TrialRecord(
        number=trial.number,
        state=(outcome.get("state") or states[trial.state]) if finished else "running",
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        params=dict(trial.params),
        epochs=tuple(EpochResult.from_dict(each) for each in trial.user_attrs.get("epochs", [])),
        curve=dict(sorted(trial.intermediate_values.items())),
        reason=outcome.get("reason"),
        seconds=trial.user_attrs.get("seconds"),
        environments=tuple(trial.user_attrs.get("environments", [])),
        traceback=outcome.get("traceback"),
    )
