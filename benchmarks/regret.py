"""Measure what parallel search costs: the regret of 1 to 8 workers at equal trials: `python -m benchmarks.regret`

Uses analytic learning curves with a known optimum (tests/analytic.py). Each suggestion is asked for as in a study, with
the results available at that time; time is simulated, with random epoch lengths (lognormal, sigma 0.5). The regret is
the optimum's accuracy minus the best complete trial's; the base configuration, which is near the optimum, is not tried.
A suggestion is a near-duplicate if an earlier one has the same choice and lies within 5 % of the range in every other
dimension.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.config.space import Choice
from harness.config.study import Study
from harness.search import suggest as asking
from harness.search.extrapolation import ExtrapolatingGPSampler
from harness.search.pruners import Pruner, asha, no_pruning
from harness.search.samplers import Sampler, gp, tpe
from harness.search.suggest import ShownStudy
from harness.store.records import Snapshot
from tests.analytic import BEST_LOG10_LR, BEST_MULTIPLIER, accuracy, diverges
from tests.conftest import make_study

WORKERS = (1, 2, 4, 8)
TRIALS, EPOCHS, NEAR = 50, 6, 0.05
SAMPLERS = {
    "random": Sampler("RandomSampler"),
    "TPE, constant liar": tpe(),
    "TPE, no liar": tpe(constant_liar=False),
    "TPE, univariate, constant liar": tpe(multivariate=False),
    "GP, fantasies": gp(),
    "GP, predictions": Sampler("benchmarks.regret:Predicting"),
}
PRUNERS = {"no pruning": no_pruning(), "ASHA": asha(min_epochs=1)}


@dataclass(frozen=True)
class Outcome:
    """A simulated search: its regret, its length in mean epochs, and how many suggestions came near another."""

    regret: float
    time: float
    near_any: int
    near_running: int


class Predicting(ExtrapolatingGPSampler):
    """Running trials that have reported count as stopped ones do, by their predicted ends; others as fantasies."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return super().infer_relative_search_space(_as_stopped(study), trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return super().sample_relative(_as_stopped(study), trial, search_space)


def _as_stopped(study: optuna.Study) -> optuna.Study:
    trials = copy.deepcopy(study.get_trials(deepcopy=False))
    for trial in trials:
        if trial.state is TrialState.RUNNING and trial.intermediate_values:
            trial.state = TrialState.PRUNED
    return ShownStudy.of(study, trials)


def optimum(study: Study) -> float:
    """The accuracy of the best configuration; how fast it learns depends on the dropout as well."""
    best = {"optim.base_lr": 10**BEST_LOG10_LR, "optim.depth_lr_mult": BEST_MULTIPLIER, "backbone.hidden": "16-8"}
    return max(accuracy(best | {"backbone.dropout": dropout}, EPOCHS) for dropout in np.linspace(0, 0.6, 6001))


class Search:
    """One study in memory with `workers` trials under way at any time."""

    def __init__(self, study: Study, workers: int) -> None:
        self.study, self.workers = study, workers
        self.memory = optuna.create_study(direction="maximize", pruner=study.pruner.of(study))
        self.pace = np.random.default_rng([study.seed, workers])
        self.active_workers: list[tuple[float, int, int]] = []  # when the next epoch ends, the trial, that epoch
        self.near: list[tuple[bool, bool]] = []

    def run(self) -> Outcome:
        now = 0.0
        while self.active_workers or len(self.near) < TRIALS:
            while len(self.active_workers) < self.workers and len(self.near) < TRIALS:
                self._push(now, self._ask(), 1)
            now, number, epoch = heapq.heappop(self.active_workers)
            if not self._ended(number, epoch):
                self._push(now, number, epoch + 1)
        return Outcome(
            optimum(self.study) - self.memory.best_value,
            now,
            sum(any_ for any_, _ in self.near),
            sum(running for _, running in self.near),
        )

    def _push(self, now: float, number: int, epoch: int) -> None:
        heapq.heappush(self.active_workers, (now + float(self.pace.lognormal(-0.125, 0.5)), number, epoch))

    def _ask(self) -> int:
        trial = self.memory.ask()
        trials = self.memory.get_trials(deepcopy=False)
        history = Snapshot.now(trials, trial.number, self.study.space).history(trials, trial.number)
        if self.study.sampler.name.endswith("Predicting"):  # a study shows of running trials the parameters alone
            history = [trials[each.number] if each.state is TrialState.RUNNING else each for each in history]
        params = asking.ask(self.study, self.memory, trial._trial_id, trial.number, history)
        near = [each.number for each in history if self._is_near(params, each.params)]
        self.near.append((bool(near), bool({number for _, number, _ in self.active_workers} & set(near))))
        return trial.number

    def _is_near(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return all(distance(dimension, one[path], other[path]) <= NEAR for path, dimension in self.study.space.items())

    def _ended(self, number: int, epoch: int) -> bool:
        trial = self.memory.get_trials(deepcopy=False)[number]
        if diverges(trial.params) and epoch == 2:
            self.memory.tell(number, state=TrialState.PRUNED)
            return True
        value = accuracy(trial.params, epoch)
        self.memory._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)
        if epoch == EPOCHS:
            self.memory.tell(number, value)
            return True
        if pruned := self.memory.pruner.prune(self.memory, self.memory._storage.get_trial(trial._trial_id)):
            self.memory.tell(number, state=TrialState.PRUNED)
        return pruned


def distance(dimension: Any, one: Any, other: Any) -> float:
    """As a share of the range, that of the logarithm where it is searched."""
    if isinstance(dimension, Choice):
        return 0.0 if one == other else 1.0
    low, high, one, other = ((math.log(v) if dimension.log else v) for v in (dimension.low, dimension.high, one, other))
    return float(abs(one - other) / (high - low))


def quartiles(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    low, middle, high = (scale * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def row(sampler: Sampler, pruner: Pruner, workers: int, seeds: int) -> str:
    outcomes = []
    for seed in range(seeds):
        study = make_study("nowhere", sampler=sampler, pruner=pruner, seed=seed, trials=TRIALS)
        outcomes.append(Search(study, workers).run())
    time = statistics.median(each.time for each in outcomes)
    cells = [
        quartiles([each.regret for each in outcomes], 2, 100),
        f"{time:.0f}",
        f"{statistics.mean(each.near_any for each in outcomes):.1f}",
        f"{statistics.mean(each.near_running for each in outcomes):.2f}",
    ]
    return " | ".join(cells)


def main() -> None:
    from benchmarks.machine import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="studies per row (default: %(default)s)")
    parser.add_argument("samplers", nargs="*", default=list(SAMPLERS), metavar="SAMPLER", help=", ".join(SAMPLERS))
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(
        f"{describe()}\n{TRIALS} trials of {EPOCHS} epochs, {args.seeds} seeds; median (quartiles), means of counts\n"
    )
    print("| sampler | pruner | workers | regret, points | time, epochs | near-duplicates | of running ones |")
    print("|---|---|---|---|---|---|---|")
    for pruning, pruner in PRUNERS.items():
        for name in args.samplers:
            for workers in WORKERS:
                print(
                    f"| {name} | {pruning} | {workers} | {row(SAMPLERS[name], pruner, workers, args.seeds)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
