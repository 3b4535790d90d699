"""Records of the storage: a trial, its history snapshot, and the study's attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from harness.config.events import EpochResult
from harness.config.final_result import FinalResult

BY_HAND, SKIP = "by_hand", "skip"  # attributes of a trial that `harness try` queued, and that `harness skip` ends


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as the storage has it."""

    number: int
    state: str  # complete, pruned, diverged, failed, running
    value: float | None  # validation accuracy of the last epoch; None unless complete
    params: dict[str, Any]
    epochs: tuple[EpochResult, ...]
    curve: dict[int, float]  # epoch -> validation accuracy, as reported so far
    reason: str | None  # of a failure, or of a stop that is not the pruner's
    seconds: float | None
    environments: tuple[dict[str, str], ...] = ()
    traceback: str | None = None
    queued: bool = False  # by hand

    @property
    def is_pruned(self) -> bool:
        """Whether the pruner stopped it, and not the user or a limit."""
        return self.state == "pruned" and self.reason is None


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Return the record of an Optuna trial."""
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    outcome = trial.user_attrs.get("outcome", {})
    return TrialRecord(
        number=trial.number,
        state=(outcome.get("state") or states[trial.state]) if trial.state.is_finished() else "running",
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        params=dict(trial.params),
        epochs=tuple(EpochResult.from_dict(each) for each in trial.user_attrs.get("epochs", [])),
        curve=dict(sorted(trial.intermediate_values.items())),
        reason=outcome.get("reason"),
        queued=BY_HAND in trial.user_attrs,
        seconds=trial.user_attrs.get("seconds"),
        environments=tuple(trial.user_attrs.get("environments", [])),
        traceback=outcome.get("traceback"),
    )


@dataclass(frozen=True)
class Snapshot:
    """Trials with lower numbers at a suggestion: `open` had not ended, and of those `running` had parameters."""

    open: tuple[int, ...] = ()
    running: tuple[int, ...] = ()

    @staticmethod
    def now(trials: Sequence[FrozenTrial], number: int, space: Iterable[str]) -> Snapshot:
        """Return the current snapshot for trial `number`."""
        lower = [trial for trial in trials if trial.number < number and not trial.state.is_finished()]
        running = [trial.number for trial in lower if all(path in trial.params for path in space)]
        return Snapshot(tuple(trial.number for trial in lower), tuple(running))

    @staticmethod
    def of(trial: FrozenTrial) -> Snapshot:
        """Return the snapshot stored with a trial; none is stored if all lower numbers had ended."""
        return Snapshot(**{name: tuple(numbers) for name, numbers in trial.user_attrs.get("seen", {}).items()})

    def history(self, trials: Sequence[FrozenTrial], number: int) -> list[FrozenTrial]:
        """Return the history for trial `number`; running and diverged trials have parameters only."""
        known = [
            without_values(trial) if has_diverged(trial) else trial
            for trial in trials
            if trial.number < number and trial.number not in self.open
        ]
        running = [without_values(trial, TrialState.RUNNING) for trial in trials if trial.number in self.running]
        return sorted(known + running, key=lambda trial: trial.number)


def has_diverged(trial: FrozenTrial) -> bool:
    """Return whether a trial, stored as pruned, ended with a non-finite loss or gradient."""
    return bool(trial.user_attrs.get("outcome", {}).get("state") == "diverged")


def without_values(trial: FrozenTrial, state: TrialState = TrialState.PRUNED) -> FrozenTrial:
    """Return a copy with parameters only; TPE ranks a pruned trial without values last."""
    shown = copy.copy(trial)
    shown.state, shown.value, shown.intermediate_values, shown.system_attrs = state, None, {}, {}
    if state is TrialState.RUNNING:
        shown.datetime_complete, shown.user_attrs = None, {}
    return shown


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """The study's attributes in the storage, with defaults for missing ones."""

    # First start
    uid: str = ""
    definition: dict[str, Any] | None = None  # `Study.definition()`, and fingerprints of images and weights
    images: int | None = None
    after: dict[str, Any] | None = (
        None  # an earlier study: its name, uid, and trials (`harness.search.samplers.earlier_trials`)
    )
    depths: dict[str, list[str]] | None = None  # prefixes of parameter names by "block" and by "layer"
    # Last start
    command: str | None = None
    data_root: str | None = None  # the folder of the images, if given
    runtime: dict[str, Any] | None = None  # `Runtime.to_dict()`
    versions: dict[str, str] = field(default_factory=dict)
    wanted: int = 0  # trials
    price: float | None = None  # of a device-hour
    stopped: dict[str, Any] | None = None  # `Store.stop`
    # After the search
    choice: dict[str, Any] | None = None  # `harness.final.choice.choose`
    rerank: dict[str, Any] | None = None  # `harness.final.choice.rerank`
    final: FinalResult | None = None
    predictions: dict[str, Any] | None = None  # `harness.final.predictions`
    thumbnails: dict[str, str] = field(default_factory=dict)  # by number of the test image
    suspects: dict[str, Any] | None = None  # `harness.final.suspects`
    duplicates: dict[str, Any] | None = None  # `harness.data.duplicates`
    audit: dict[str, Any] | None = None  # `harness.final.pruning_cost.record`
    ablation: dict[str, Any] | None = None  # `harness.study.ablate.begun`
    files: dict[str, str] = field(default_factory=dict)  # the sha256 of the model's files
    published: int | None = None  # number of finished trials when MLflow had everything
    registered: int | None = None  # the trial whose model is in MLflow's registry
    validation_images: str | None = None  # their fingerprint, once computed for the registry

    def limited(self, trials: int, limits: Mapping[str, Any] | None = None) -> int:
        """Return `trials`, or fewer if a limit has stopped the search; if `limits` are given, one of these."""
        if self.stopped is None or limits not in (None, self.stopped["limits"]):
            return trials
        return min(trials, int(self.stopped["trials"]))

    def is_registered(self) -> bool:
        """Return whether MLflow's registry has the model of the final result."""
        return self.final is not None and self.registered == self.final.trial

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> StudyFacts:
        """Return the attributes as a record. Raises InputError if the final result is incomplete."""
        found = {each.name: value for each in fields(StudyFacts) if (value := attributes.get(each.name)) is not None}
        if "final" in found:
            found["final"] = FinalResult.of(found["final"])
        return StudyFacts(**found)

    @property
    def objective(self) -> str:
        return str((self.definition or {}).get("objective", "accuracy"))
