"""Measure how the demo depends on its hyperparameters: `python -m benchmarks.demo_spread --configurations 30`

Trains random configurations of the demo's space to the end, without pruning. Prints the spread of their validation
accuracies, and how much of the variance the base LR and the depth-LR multiplier each explain: the drop in R² of a
quadratic regression without the factor, with its F-test.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from benchmarks.machine import describe
from harness.config.find import find
from harness.data.splits import prepare
from harness.search.loop import search
from harness.search.pruners import no_pruning
from harness.search.samplers import Sampler
from harness.store.opening import open_store
from harness.store.store import TrialRecord
from harness.training.assemble import decide_runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = find("demo")
    study = dataclasses.replace(
        found.study.located(found.home, None, None),
        sampler=Sampler("RandomSampler"),
        pruner=no_pruning(),
        trials=args.configurations + 1,  # trial 0 is the base configuration, not a random one
    )
    prepare(study.train.data, study.train.backbone.preprocessing())
    runtime = decide_runtime(study.train, None)
    with tempfile.TemporaryDirectory() as place, open_store(study, f"sqlite:///{Path(place) / 'spread.db'}") as store:
        for _ in search(study, store, runtime, Path(place)):
            pass
        base, *trials = store.trials()
    print(describe())
    complete = [trial for trial in trials if trial.value is not None]
    values = sorted(100 * trial.value for trial in complete if trial.value is not None)
    print(f"base configuration (trial 0): {100 * (base.value or 0):.1f} %")
    print(
        f"{len(values)} of {len(trials)} configurations complete: min {values[0]:.1f}, median "
        f"{statistics.median(values):.1f}, max {values[-1]:.1f}, spread {values[-1] - values[0]:.1f} points"
    )
    for factor in ("optim.base_lr", "optim.depth_lr_mult"):
        drop, p = explained(complete, factor)
        print(f"{factor}: R² drops by {drop:.2f} without it (F-test p = {p:.1e})")
    seconds = [trial.seconds for trial in complete if trial.seconds is not None]
    print(f"seconds per trial: median {statistics.median(seconds):.1f}")
    for trial in sorted(complete, key=lambda each: each.value or 0):
        lr, mult = trial.params["optim.base_lr"], trial.params["optim.depth_lr_mult"]
        print(f"  {100 * (trial.value or 0):5.1f} %  base LR {lr:.2e}  multiplier {mult:.2f}")


def explained(trials: list[TrialRecord], factor: str) -> tuple[float, float]:
    """Drop in R² without `factor`, and the p-value of the F-test of the two nested regressions."""
    y = np.array([trial.value for trial in trials], dtype=float)
    lr = np.log10([trial.params["optim.base_lr"] for trial in trials])
    mult = np.array([trial.params["optim.depth_lr_mult"] for trial in trials])
    lr, mult = (lr - lr.mean()) / lr.std(), (mult - mult.mean()) / mult.std()
    full = np.stack([np.ones_like(y), lr, lr**2, mult, mult**2, lr * mult], 1)
    kept = [0, 3, 4] if factor == "optim.base_lr" else [0, 1, 2]
    total = float(((y - y.mean()) ** 2).sum())
    rest, rest_without = _residual(full, y), _residual(full[:, kept], y)
    dropped, free = full.shape[1] - len(kept), len(y) - full.shape[1]
    statistic = (rest_without - rest) / dropped / (rest / free)
    return (rest_without - rest) / total, float(f_distribution.sf(statistic, dropped, free))


def _residual(design: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    return float(((y - design @ coefficients) ** 2).sum())


if __name__ == "__main__":
    main()
