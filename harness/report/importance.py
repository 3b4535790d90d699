"""How much each hyperparameter matters, with the spread that so few trials leave."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.report.figures import ACCENT, INK, Plot, empty, error_bars
from harness.store.records import TrialRecord
from harness.store.store import Store

if TYPE_CHECKING:
    import optuna

RESAMPLES = 100
INTERVAL = (5, 95)  # percentiles
FEW = 20  # complete trials: with fewer, importances are a hint at most


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


def importance_plot(store: Store, complete: Sequence[TrialRecord]) -> Plot:
    title = "Importances"
    names = sorted(set.intersection(*(set(trial.params) for trial in complete)))
    found = importances(store.optuna_study, names)[::-1] if names else []
    if not found:
        why = "Importances need two complete trials with different results."
        return Plot(title=title, caption=why, width="half")
    figure = empty(height=max(90 + 52 * len(found), 280), xaxis_tickformat=".0%", xaxis_range=[0, 1.04], bargap=0.5)
    figure.add_bar(
        x=[each.share for each in found],
        y=[each.name for each in found],
        orientation="h",
        marker={"color": ACCENT, "opacity": 0.75},
        error_x=error_bars([(each.share, each.low, each.high) for each in found], color=INK, thickness=1.3, width=5),
        customdata=[[each.low, each.high] for each in found],
        hovertemplate="%{y}: %{x:.0%}, %{customdata[0]:.0%} to %{customdata[1]:.0%}<extra></extra>",
    )
    hint = " With so few, take it as a hint at most." if len(complete) < FEW else ""
    caption = (
        f"Share of what separates the best trials from the others (PED-ANOVA over {len(complete)} complete trials). "
        f"The lines span {INTERVAL[1] - INTERVAL[0]} % of the shares that trials drawn anew from these give.{hint}"
    )
    return Plot(title=title, caption=caption, figure=figure, width="half")
