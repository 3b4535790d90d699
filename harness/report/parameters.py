"""Figures of the hyperparameters: importances and parallel coordinates.

Importances have intervals, because trials are few. Optuna's own parallel coordinates have fixed colours, which a dark
page cannot change.
"""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import optuna

from harness.base.words import percent
from harness.report.figures import ACCENT, INK, PAPER, SOFT, Plot, add_lines, empty, error_bars
from harness.store.records import TrialRecord
from harness.store.store import Store

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RESAMPLES = 100
INTERVAL = (5, 95)  # percentiles
FEW = 20  # complete trials: with fewer, importances are only a hint
# Groups of trials by value, worst first: colour and opacity of their lines.
LINES = ((SOFT, 0.3), (SOFT, 0.5), (ACCENT, 0.6), (ACCENT, 1.0))


@dataclass(frozen=True, kw_only=True)
class Importance:
    """A parameter's share of the importance, and the 90 % interval over resampled trials."""

    name: str
    share: float
    low: float
    high: float


def importances(study: optuna.Study, names: Sequence[str]) -> list[Importance]:
    """Return PED-ANOVA importances (Watanabe et al., 2023) of the complete trials, most important first.

    The intervals are percentiles over bootstrap resamples of the trials (Efron and Tibshirani, 1993, chapter 13),
    without resamples whose values are all equal. Empty unless two values differ.
    """
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) < 2:
        return []
    generator = numpy.random.default_rng(0)
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
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, params=list(names))
    return [float(found[name]) for name in names]


def importance_plot(store: Store, complete: Sequence[TrialRecord]) -> Plot:
    names = sorted(complete[0].params)
    found = importances(store.optuna_study, names)[::-1] if names else []
    if not found:
        why = "Importances need two complete trials with different results."
        return Plot(title="Importances", caption=why, width="half")
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
    hint = " With so few trials, this is only a hint." if len(complete) < FEW else ""
    caption = (
        f"Importance for separating the best trials from the others (PED-ANOVA, {len(complete)} complete trials). "
        f"The lines are {INTERVAL[1] - INTERVAL[0]} % bootstrap intervals over the trials.{hint}"
    )
    return Plot(title="Importances", caption=caption, figure=figure, width="half")


# -- parallel coordinates -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One parameter: each trial's position, from 0 to 1, and the tick labels."""

    name: str
    places: list[float]
    marks: dict[float, str]


def parallel_coordinates(study: optuna.Study, measured: str) -> Figure:
    """Draw a line per complete trial over its parameters and its value."""
    trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    trials = sorted(trials, key=lambda trial: trial.value or 0.0)  # draw the best last
    axes = [_parameter(name, trials) for name in sorted(trials[0].params)]
    values = [trial.value or 0.0 for trial in trials]
    axes.append(_numbers(measured, values, log=False, share=True))
    figure = empty(height=380, margin={"l": 30, "r": 50, "t": 6, "b": 6})
    groups = numpy.digitize(values, numpy.linspace(min(values), max(values), len(LINES) + 1)[1:-1])
    lines = [
        (f"trial {trial.number}: {percent(trial.value)}", list(enumerate(axis.places[place] for axis in axes)))
        for place, trial in enumerate(trials)
    ]
    for group, (colour, opacity) in enumerate(LINES):
        add_lines(
            figure,
            [lines[place] for place in numpy.flatnonzero(groups == group)],
            line={"color": colour, "width": 1.8},
            marker={"size": 5},
            opacity=opacity,
            hovertemplate="%{text}<extra></extra>",
        )
    _add_marks(figure, axes)
    return figure


def _add_marks(figure: Figure, axes: Sequence[Axis]) -> None:
    for place, axis in enumerate(axes):
        for height, text in axis.marks.items():
            figure.add_annotation(
                x=place,
                y=height,
                text=text,
                showarrow=False,
                xanchor="left",
                xshift=7,
                font={"color": INK, "size": 11},
                bgcolor=PAPER,
                borderpad=1,
            )
    figure.update_xaxes(tickvals=list(range(len(axes))), ticktext=[f"<b>{axis.name}</b>" for axis in axes], tickangle=0)
    figure.update_xaxes(side="top", tickfont={"color": INK, "size": 12}, showline=False, range=[-0.4, len(axes) - 0.5])
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])


def _parameter(name: str, trials: Sequence[Any]) -> Axis:
    values, distribution = [trial.params[name] for trial in trials], trials[0].distributions[name]
    if not isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return _numbers(name, values, log=distribution.log, share=False)
    options = list(distribution.choices)
    heights = {option: place / max(len(options) - 1, 1) for place, option in enumerate(options)}
    marks = {height: html.escape(str(option), quote=False) for option, height in heights.items()}
    return Axis(name=name, places=[heights[value] for value in values], marks=marks)


def _numbers(name: str, values: Sequence[float], log: bool, share: bool) -> Axis:
    scaled = [math.log10(value) if log else value for value in values]
    low, span = min(scaled), max(scaled) - min(scaled)
    places = [(value - low) / (span or 1.0) for value in scaled]
    marks = {}
    for place in (0.0, 0.5, 1.0) if span else (0.0,):  # equal values need one tick
        value = low + place * span
        value = 10**value if log else value
        marks[place] = f"{100 * value:.1f} %" if share else f"{value:.2g}"
    return Axis(name=name, places=places, marks=marks)
