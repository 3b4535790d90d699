"""The expected runs of a study: their names and contents, for any tracker."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.environment import HARDWARE, git_commit, versions
from harness.base.errors import InputError, recordable
from harness.base.keys import RETRAINING, trial_key
from harness.base.seeds import derive_seed
from harness.base.words import metric_name
from harness.config.events import EpochResult, Kind

if TYPE_CHECKING:
    from harness.config.final_result import TestResult
    from harness.config.study import Study
    from harness.config.train import TrainConfig
    from harness.store.store import Store


LONGEST_DIGEST = 36  # of MLflow


def trial_tags(study: Study, number: int) -> dict[str, str]:
    return {"harness.kind": "trial", "harness.trial_seed": str(derive_seed(study.seed, "trial", number))}


def retraining_tags(kind: Kind, trial: int, seed_number: int) -> dict[str, str]:
    of = "harness.best_trial" if kind == "final" else "harness.of_trial"
    return {"harness.kind": kind, f"harness.{kind}_seed": str(seed_number), of: str(trial)}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The expected content of a finished run in MLflow, from the storage."""

    key: str
    config: TrainConfig
    tags: dict[str, str]
    epochs: tuple[EpochResult, ...]
    metrics: dict[str, float] = field(default_factory=dict)  # at the last epoch, besides its own
    state: str = "complete"
    traceback: str | None = None

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) pairs that a complete run has."""
        series = {"train_loss": [(each.epoch, each.train.loss) for each in self.epochs]}
        series["val_accuracy"] = [(each.epoch, each.val.accuracy) for each in self.epochs if each.val is not None]
        return series | {name: [(self.config.epochs, value)] for name, value in self.metrics.items()}


def expected_runs(study: Study, store: Store) -> list[Expected]:
    """Return the runs of all finished trials and of all recorded trainings after the search."""
    params = {trial.number: trial.params for trial in store.trials()}
    runs = [
        Expected(
            key=trial_key(trial.number),
            config=study.config(trial.params),
            tags=trial_tags(study, trial.number),
            epochs=trial.epochs,
            state=trial.state,
            traceback=trial.traceback,
        )
        for trial in store.trials()
        if trial.state != "running"
    ]
    return runs + [
        Expected(
            key=RETRAINING[kind](trial, seed),
            config=study.config(params[trial]),
            tags=retraining_tags(kind, trial, seed),
            epochs=tuple(map(EpochResult.from_dict, epochs)),
            metrics=metrics,
        )
        for kind, trial, seed, epochs, metrics in _retrainings(store)
    ]


def _retrainings(store: Store) -> Iterator[tuple[Kind, int, int, list[dict[str, Any]], dict[str, float]]]:
    """Yield kind, trial, seed, epochs and test metrics of all recorded trainings after the search."""
    known = store.facts()
    for number, results in ((known.rerank or {}).get("results") or {}).items():
        yield from (("rerank", int(number), each["seed"], each["epochs"], {}) for each in results)
    tested: dict[Kind, TestResult | None] = {"final": known.final, "base": known.final and known.final.base}
    for kind, result in tested.items():
        if result is None:
            continue
        for each in result.per_seed:
            yield kind, result.trial, each.seed, each.epochs, each.metrics()


@dataclass(frozen=True)
class Finding:
    """A disagreement with the storage, and its repair; None if the start or end of a run repairs it."""

    text: str
    mend: Callable[[], object] | None = None


def data_of(study: Study, store: Store) -> dict[str, str]:
    """Return what MLflow shows of the data set: name, digest (at most 36 characters), source and profile."""
    data, facts = study.train.data, store.facts()
    content = str((facts.definition or {}).get("content of data", "unknown"))
    classes: int | None
    try:
        classes = len(data.classes())
    except InputError:  # the images are no longer here
        classes = len((facts.predictions or {}).get("classes", ())) or None
    return {
        "name": type(data).__name__,
        "digest": content if len(content) <= LONGEST_DIGEST else hashlib.sha256(content.encode()).hexdigest()[:16],
        "source_type": "local",
        "source": json.dumps({"uri": str(getattr(data, "root", "") or type(data).__name__)}),
        "profile": json.dumps({"images": facts.images, "classes": classes}),
    }


def study_metrics(store: Store) -> dict[str, float]:
    """Return the metrics of the study's own run."""
    final, best = store.facts().final, store.best()
    name = metric_name(store.facts().objective)
    metrics = {} if best is None or best.value is None else {f"best_val_{name}": best.value}
    if final is None:
        return metrics
    return metrics | {"test_accuracy": final.accuracy, f"test_{metric_name(final.objective)}": final.value}


def recorded_facts(study: Study, store: Store) -> dict[str, str]:
    """Return the tags of `facts` for a study that ran before, as far as its storage knows them."""
    known, environment = store.facts(), store.environment() or {}
    found = facts(study, known.runtime or {}, environment) | {f"version.{n}": v for n, v in known.versions.items()}
    del found["harness.command"], found["mlflow.source.name"]  # those of the repair
    if known.command is not None:
        found["harness.command"] = known.command
    return found | ({"mlflow.source.git.commit": environment["commit"]} if "commit" in environment else {})


def facts(study: Study, runtime: Mapping[str, Any], environment: Mapping[str, str] = {}) -> dict[str, str]:
    """Return tags for how and with what a study ran; of the `environment`, the device and its drivers."""
    return {
        **{f"version.{name}": version for name, version in versions().items()},
        "harness.seed": str(study.seed),
        "harness.command": shlex.join(recordable([Path(sys.executable).name, *sys.argv])),
        "mlflow.source.git.commit": git_commit(),
        "mlflow.source.name": sys.argv[0],
        **{f"harness.{name}": str(value) for name, value in runtime.items()},
        **{f"hardware.{name}": environment[name] for name in HARDWARE if name in environment},
    }
