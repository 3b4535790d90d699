"""How much each hyperparameter matters, with the spread that so few trials leave."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

RESAMPLES = 100
INTERVAL = (5, 95)  # percentiles


@dataclass(frozen=True, kw_only=True)
class Importance:
    """A parameter's share of the importance, and the 90 % interval over resampled trials."""

    name: str
    share: float
    low: float
    high: float


def importances(study: optuna.Study, names: Sequence[str], seed: int = 0) -> list[Importance]:
    """PED-ANOVA (Watanabe et al., 2023) of the complete trials, the most important parameter first.

    The intervals are percentiles over bootstrap resamples of the trials (Efron and Tibshirani, 1993, chapter 13); a
    resample in which all values are equal says nothing and is left out. Empty without two different values.
    """
    import numpy
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) < 2:
        return []
    generator = numpy.random.default_rng(seed)
    samples = []
    for _ in range(RESAMPLES):
        drawn = [complete[number] for number in generator.integers(len(complete), size=len(complete))]
        if len({trial.value for trial in drawn}) > 1:
            samples.append(_shares(drawn, names))
    observed = _shares(complete, names)
    ends = numpy.percentile(samples, INTERVAL, axis=0) if samples else [observed, observed]
    found = [
        Importance(name=name, share=share, low=min(float(low), share), high=max(float(high), share))
        for name, share, low, high in zip(names, observed, *ends, strict=True)
    ]
    return sorted(found, key=lambda each: -each.share)


def _shares(trials: Sequence[optuna.trial.FrozenTrial], names: Sequence[str]) -> list[float]:
    import optuna

    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, params=list(names))
    return [float(found[name]) for name in names]
