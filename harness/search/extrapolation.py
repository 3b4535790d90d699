"""A Gaussian process sampler that also uses pruned trials.

Optuna's GPSampler uses complete trials only, and pruning leaves few of them. Here every pruned trial counts as
complete, with its learning curve extrapolated: its last value, plus for each interval between two epochs at which
trials stopped the median gain of the trials that passed it. A median of few is shrunk towards zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from harness.search.suggest import ShownStudy

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
PRIOR_TRIALS = 2  # a median gain of k trials counts k / (k + PRIOR_TRIALS)
CLIP = 4.0  # times the distance from the best to the median of the better half
MOST = 200  # trials that the process is fitted to
PRELIMINARY, LOCAL = 512, 4  # points to evaluate the acquisition at, and local searches from the best of them


class ExtrapolatingGPSampler(optuna.samplers.GPSampler):
    """Optuna's GPSampler on extrapolated values (see `extrapolated`), for a study that maximizes one value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # With Optuna's 2,048 and 10, a suggestion takes a third longer (benchmarks/RESULTS.md).
        self._n_preliminary_samples, self._n_local_search = PRELIMINARY, LOCAL
        self._intersection_search_space = IntersectionSearchSpace(include_pruned=True)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(_as_complete(study), trial, search_space)

    def _sample_relative_impl(self, *trials_and_space: Any) -> dict[str, Any]:
        import torch  # only here: commands that ask no process start without it

        # From about 170 trials on, several threads sum in another order, and workers have fewer of them than `replay`.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            # Optuna sets a default device, which makes every operation a call in Python: a sixth of the time.
            with torch._C.DisableTorchFunction():
                return super()._sample_relative_impl(*trials_and_space)
        finally:
            torch.set_num_threads(threads)


def _as_complete(study: optuna.Study) -> optuna.Study:
    trials = study.get_trials(deepcopy=False)
    ended = [trial for trial in trials if trial.state in ENDED]
    values = dict(zip((trial.number for trial in ended), clipped(final_values(ended)), strict=True))
    kept = set(thinned(sorted(values, key=lambda number: (-values[number], number))))
    shown = [complete(trial, values[trial.number]) for trial in ended if trial.number in kept]
    return ShownStudy.of(study, shown + [trial for trial in trials if trial.state is TrialState.RUNNING])


def thinned(ranked: Sequence[int], most: int = MOST) -> list[int]:
    """Keep at most `most` of a ranking: half of them the best, the others spread over the rest."""
    if len(ranked) <= most:
        return list(ranked)
    best, rest = ranked[: most // 2], ranked[most // 2 :]
    others = most - len(best)
    return [*best, *(rest[len(rest) * each // others] for each in range(others))]


def complete(trial: FrozenTrial, value: float) -> FrozenTrial:
    """Return a copy that has ended with this value."""
    shown = copy.copy(trial)
    shown.state, shown.value = TrialState.COMPLETE, value
    return shown


def final_values(trials: Sequence[FrozenTrial]) -> list[float]:
    """Return each trial's final value, extrapolated if it was stopped; see `extrapolated`."""
    # Optuna gives a pruned trial its last value.
    ends = [trial.value if trial.state is TrialState.COMPLETE else None for trial in trials]
    planned = [epochs_of(trial.params) for trial in trials]
    return extrapolated([trial.intermediate_values for trial in trials], ends, planned)


def epochs_of(params: Mapping[str, Any]) -> float:
    """Return a trial's epochs if the study searches them; else infinity."""
    return float(params.get("epochs", "inf"))


def extrapolated(
    curves: Sequence[Mapping[int, float]], values: Sequence[float | None], planned: Sequence[float]
) -> list[float]:
    """Return each trial's final value, extrapolated if it has none; NaN if it reported no number.

    `curves` are values by epoch, `values` the final ones, `planned` the epochs that a trial was to have. The last epoch
    is the last that any trial has reached.
    """
    curves = [{epoch: value for epoch, value in curve.items() if not np.isnan(value)} for curve in curves]
    last = [max(curve, default=None) for curve in curves]
    ends = sorted({end for end in last if end is not None})
    gains = {}
    for start, end in pairwise(ends):
        through = [curve[end] - curve[start] for curve in curves if start in curve and end in curve]
        gains[start] = median(through) * len(through) / (len(through) + PRIOR_TRIALS) if through else 0.0
    found = []
    for value, curve, stopped, until in zip(values, curves, last, planned, strict=True):
        if value is not None:
            found.append(value)
        elif stopped is None:
            found.append(float("nan"))
        else:
            left = [(start, end) for start, end in pairwise(ends) if stopped <= start < until]
            parts = [gains[a] if b <= until else gains[a] * (until - a) / (b - a) for a, b in left]
            found.append(curve[stopped] + sum(parts))
    return found


def clipped(values: Sequence[float], share: float = 0.5) -> list[float]:
    """Raise values far below the best, so that the worst do not set the scale; NaN becomes the worst.

    Far is CLIP times the distance from the best to the median of the best `share` of them.
    """
    known = sorted((value for value in values if not np.isnan(value)), reverse=True)
    if not known:
        return [0.0] * len(values)
    spread = known[0] - median(known[: math.ceil(share * len(known))])
    # The best may be close together by chance: values above the median do not change.
    floor = max(known[-1], min(known[0] - CLIP * spread, median(known))) if spread > 0 else known[-1]
    return [floor if np.isnan(value) else max(value, floor) for value in values]
