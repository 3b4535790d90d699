"""What a study tells its watchers, and what a finished run should hold. MLflow is one: harness.mlflow_tracker."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.environment import git_commit, versions
from harness.errors import masked
from harness.results import EpochResult
from harness.seeds import derive_seed

if TYPE_CHECKING:
    from harness.config import Study, TrainConfig
    from harness.storage import Store


def trial_key(number: int) -> str:
    return f"trial-{number}"


def final_key(trial: int, seed_number: int) -> str:
    """The best trial is part of it: an extended study may find a better one and retrain that."""
    return f"final-seed-{seed_number}-of-trial-{trial}"


def trial_tags(study: Study, number: int) -> dict[str, str]:
    return {"harness.kind": "trial", "harness.trial_seed": str(derive_seed(study.seed, "trial", number))}


def final_tags(trial: int, seed_number: int) -> dict[str, str]:
    return {"harness.kind": "final", "harness.final_seed": str(seed_number), "harness.best_trial": str(trial)}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the storage says that a finished run in MLflow should hold."""

    key: str
    config: TrainConfig
    tags: dict[str, str]
    epochs: tuple[EpochResult, ...]
    metrics: dict[str, float]  # besides those of the epochs, at the last epoch
    state: str
    traceback: str | None

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """The (step, value) pairs that tell whether a run is whole."""
        series = {"train_loss": [(each.epoch, each.train.loss) for each in self.epochs]}
        series["val_accuracy"] = [(each.epoch, each.val.accuracy) for each in self.epochs if each.val is not None]
        return series | {name: [(self.config.epochs, value)] for name, value in self.metrics.items()}


def expected_runs(study: Study, store: Store) -> list[Expected]:
    """The run of every finished trial, and of every seed of the recorded final result."""
    runs = [
        Expected(
            key=trial_key(trial.number),
            config=study.config(trial.params),
            tags=trial_tags(study, trial.number),
            epochs=trial.epochs,
            metrics={},
            state=trial.state,
            traceback=trial.traceback,
        )
        for trial in store.trials()
        if trial.state != "running"
    ]
    final = store.attribute("final")
    if final is None:
        return runs
    config = study.config(next(trial.params for trial in store.trials() if trial.number == final["trial"]))
    return runs + [
        Expected(
            key=final_key(final["trial"], seed["seed"]),
            config=config,
            tags=final_tags(final["trial"], seed["seed"]),
            epochs=tuple(EpochResult.from_dict(each) for each in seed.get("epochs", [])),
            metrics={"test_accuracy": seed["accuracy"]} | ({"test_loss": seed["loss"]} if "loss" in seed else {}),
            state="complete",
            traceback=None,
        )
        for seed in final["per_seed"]
    ]


@dataclass(frozen=True)
class Finding:
    """A disagreement with the storage in words, and what mends it; None when only a run of the study does."""

    text: str
    mend: Callable[[], object] | None = None


class RunLog(Protocol):
    """What a tracker gives for one run."""

    def epoch(self, result: EpochResult) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...
    def text(self, content: str, name: str) -> None: ...
    def end(self, state: str) -> None: ...


class Tracker(Protocol):
    """What watches a study: MLflow, or nothing. Once it has started, it never stops the study."""

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None: ...
    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> RunLog: ...
    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> bool: ...
    def interrupt(self) -> None: ...


class NoRun:
    def epoch(self, result: EpochResult) -> None:
        """Nothing is kept."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Nothing is kept."""

    def text(self, content: str, name: str) -> None:
        """Nothing is kept."""

    def end(self, state: str) -> None:
        """Nothing is kept."""


class NoTracker:
    """Tracks nothing; for tests and for searches that are measured without it."""

    def start(self, study: Study, store: Store, facts: Mapping[str, str]) -> None:
        """Nothing is kept."""

    def run(self, key: str, config: TrainConfig, tags: Mapping[str, str]) -> RunLog:
        return NoRun()

    def finish(self, metrics: Mapping[str, float], artifacts: Iterable[Path], state: str) -> bool:
        return True

    def interrupt(self) -> None:
        """Nothing is kept."""


def study_metrics(store: Store) -> dict[str, float]:
    """What the study's own run shows."""
    final, best = store.attribute("final"), store.best()
    metrics = {} if best is None or best.value is None else {"best_val_accuracy": best.value}
    return metrics if final is None else metrics | {"test_accuracy": final["accuracy"]}


def facts(study: Study, runtime: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say how and with what a study ran."""
    return {
        **{f"version.{name}": version for name, version in versions().items()},
        "harness.seed": str(study.seed),
        "harness.command": shlex.join(map(masked, [Path(sys.executable).name, *sys.argv])),
        "mlflow.source.git.commit": git_commit(),
        "mlflow.source.name": sys.argv[0],
        **{f"harness.{name}": str(value) for name, value in runtime.items()},
    }
