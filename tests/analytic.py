"""Learning curves with a known answer, so that the search is tested in milliseconds and without torch.

`run_analytic` does to a Store what `harness.search.loop.evaluate_trial` does, in the same order; only the training is
replaced by a formula. A test can stop it at a chosen point as a dying process would, leaving the trial running.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna

from harness.config.events import Completed, Diverged, EpochResult, Failed, Metrics, Pruned, TrialOutcome
from harness.config.study import Study
from harness.store.store import Asked, Store

IMAGES = 1000
BEST_LOG10_LR = -3.0
BEST_MULTIPLIER = 0.6
BEST_DROPOUT = 0.2


NOT_COMPARED: dict[str, Any] = {"base": None, "comparison": None, "selection": None}  # of a final result


class Died(BaseException):
    """The process is gone at this point; like KeyboardInterrupt, nothing in a trial catches it."""


Curve = Callable[[Mapping[str, Any], int], float]


def ceiling(params: Mapping[str, Any]) -> float:
    """What a configuration reaches with endless epochs; 0.95 at most, at the BEST_* values and the larger head."""
    distance = (
        1.2 * (math.log10(params["optim.base_lr"]) - BEST_LOG10_LR) ** 2
        + 2.0 * (params["optim.depth_lr_mult"] - BEST_MULTIPLIER) ** 2
        + 1.5 * (params["backbone.dropout"] - BEST_DROPOUT) ** 2
    )
    smaller_head = 0.0 if "-" in params["backbone.hidden"] else 0.02
    return 0.05 + 0.9 * math.exp(-distance) - smaller_head


def accuracy(params: Mapping[str, Any], epoch: int) -> float:
    """Validation accuracy after `epoch`: a smooth function of the four parameters that saturates with the epochs."""
    return ceiling(params) * (1 - math.exp(-epoch / (1.5 + params["backbone.dropout"])))


def epoch_result(epoch: int, value: float, train_loss: float | None = None) -> EpochResult:
    loss = 2.0 * (1 - value) if train_loss is None else train_loss
    return EpochResult(
        epoch=epoch,
        lr=1e-3 / epoch,
        train=Metrics(loss=loss, correct=round(IMAGES * value), total=IMAGES),
        val=Metrics(loss=2.0 * (1 - value), correct=round(IMAGES * value), total=IMAGES),
        seconds=0.5,
    )


def diverges(params: Mapping[str, Any]) -> bool:
    """The largest rates explode, so that studies of analytic curves have this outcome too."""
    return bool(params["optim.base_lr"] > 8e-3)


def evaluate(
    study: Study,
    store: Store,
    asked: Asked,
    *,
    epochs: int = 6,
    curve: Curve = accuracy,
    stop_after: tuple[int, int, str] | None = None,
) -> TrialOutcome:
    """One trial: report, ask the pruner, tell, as `harness.search.loop` does.

    `stop_after` is (trial number, epoch, "ask" | "report" | "prune" | "tell"): where the process dies. "prune" is
    after the pruner's verdict, "tell" before the outcome is told; for both "ask" and "tell" the epoch does not matter.
    """

    def reached(epoch: int, place: str) -> None:
        if stop_after is not None and stop_after in ((asked.number, epoch, place), (asked.number, 0, place)):
            raise Died(f"trial {asked.number}, epoch {epoch}, after {place}")

    results: list[EpochResult] = []
    reached(0, "ask")
    outcome: TrialOutcome | None = None
    for epoch in range(1, epochs + 1):
        if diverges(asked.params) and epoch == 2:
            outcome = Diverged(epoch=epoch)
            break
        value = round(IMAGES * curve(asked.params, epoch)) / IMAGES
        results.append(epoch_result(epoch, value))
        store.report(asked, epoch, value)
        reached(epoch, "report")
        prune = epoch < epochs and should_prune(store, asked, epoch)
        reached(epoch, "prune")
        if prune:
            outcome = Pruned(epoch=epoch)
            break
    if outcome is None:
        assert results[-1].val is not None
        outcome = Completed(value=results[-1].val.accuracy)
    reached(0, "tell")
    store.tell(asked, outcome, results, seconds=float(len(results)))
    return outcome


def should_prune(store: Store, asked: Asked, epoch: int) -> bool:
    """The question that objective.py puts to the store, in one place."""
    return store.should_prune(asked, epoch)


def run_analytic(
    study: Study,
    store: Store,
    trials: int,
    *,
    epochs: int = 6,
    curve: Curve = accuracy,
    stop_after: tuple[int, int, str] | None = None,
) -> None:
    """Ask and evaluate until the store has `trials` finished ones. Raises Died at `stop_after`."""
    while store.finished() < trials:
        evaluate(study, store, store.ask(study), epochs=epochs, curve=curve, stop_after=stop_after)


def memory_study(pruner: optuna.pruners.BasePruner) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", pruner=pruner)


def memory_store(study: Study) -> Store:
    """A store without a file, ten times as fast, for tests that do not ask what is on disk."""
    return Store("sqlite:///nowhere.db", memory_study(study.pruner.of(study)))


def fail_trial(study: Study, store: Store, reason: str = "RuntimeError: out of memory") -> int:
    """Ask for a trial and tell that it failed; returns its number."""
    asked = store.ask(study)
    store.tell(asked, Failed(reason=reason, traceback=f"Traceback\n{reason}"), [], seconds=0.1)
    return asked.number


__all__ = [
    "Died",
    "accuracy",
    "ceiling",
    "diverges",
    "epoch_result",
    "evaluate",
    "fail_trial",
    "memory_store",
    "memory_study",
    "run_analytic",
]
