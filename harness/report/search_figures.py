"""Figures of the search: history, learning curves, importances, and landscape of the trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from harness.base.words import OBJECTIVES, percent
from harness.report import figures
from harness.report.figures import ACCENT, ACCURACIES, INK, LINE, SCALE, SHARE, SOFT, STATES, Plot, empty, whole_numbers
from harness.report.overview import subject
from harness.report.parameters import importance_plot, parallel_coordinates
from harness.search.extrapolation import epochs_of
from harness.store.store import Store, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAIR = ("optim.base_lr", "optim.depth_lr_mult")
ROOM = 0.6  # margin beside the first and last trial: half a bar and a little
GRID = 160  # steps per side of the contour; with few, its edge is a staircase short of the outer trials
BETWEEN = 6  # complete trials: with fewer, do not interpolate


def search_plots(store: Store, trials: Sequence[TrialRecord]) -> list[Plot]:
    """Return all figures of the search; if one has no data yet, its caption says why."""
    complete = [trial for trial in trials if trial.state == "complete"]
    plots = [_history(trials, _measured(store)), _learning_curves(trials, store)]
    if not complete:
        return plots
    plots += [importance_plot(store, complete), _ladder(store), _landscape(store, trials)]
    if len(complete) > 1 and complete[0].params:
        caption = "A line per complete trial, from its parameters to its result; a stronger colour is better."
        figure = parallel_coordinates(store.optuna_study, _measured(store))
        plots.append(Plot(title="Parallel coordinates", caption=caption, figure=figure, shape="long"))
    return plots


def _measured(store: Store) -> str:
    return f"validation {OBJECTIVES[store.facts().objective]}"


def _history(trials: Sequence[TrialRecord], measured: str) -> Plot:
    title = "Optimisation history"
    complete = [trial for trial in trials if trial.value is not None]
    if not complete:
        return Plot(title=title, caption="No trial is complete yet.", width="half")
    figure = empty(legend=True, xaxis_title="epochs trained so far", yaxis=ACCURACIES | {"title": measured})
    best = list(accumulate((trial.value or 0.0 for trial in complete), max))
    epochs = accumulate(len(trial.curve) for trial in trials)
    spent = dict(zip((trial.number for trial in trials), epochs, strict=True))
    last = spent[trials[-1].number]
    figure.add_scatter(
        x=[*(spent[trial.number] for trial in complete), last],
        y=[*best, best[-1]],
        mode="lines",
        line={"color": INK, "width": 1.5, "shape": "hv"},
        name="best so far",
        hoverinfo="skip",
    )
    pruned = [trial for trial in trials if trial.state == "pruned" and trial.curve]
    for name, group, symbol in (("complete", complete, "circle"), ("pruned", pruned, "x-thin-open")):
        if group:
            figure.add_scatter(
                x=[spent[trial.number] for trial in group],
                customdata=[trial.number for trial in group],
                y=[_end(trial)[1] if trial.value is None else trial.value for trial in group],
                mode="markers",
                marker=_mark(STATES[name], symbol),
                name=name,
                hovertemplate=f"trial %{{customdata}}: %{{y:.2%}}<extra>{name}</extra>",
            )
    figure.update_xaxes(whole_numbers(0, last, room=0.02 * last))
    caption = "Each complete trial's result after its last epoch, over the epochs of all trials, and the best so far"
    crosses = "; a cross is a pruned trial, at its last epoch." if pruned else "."
    return Plot(title=title, caption=caption + crosses, figure=figure, width="half")


def _mark(colour: str, symbol: str) -> dict[str, Any]:
    return {"color": colour, "size": 8, "symbol": symbol, "line": {"width": 2, "color": colour}}


def _end(trial: TrialRecord) -> tuple[int, float]:
    """Return the last reported epoch of a trial, and its accuracy."""
    return list(trial.curve.items())[-1]


def _learning_curves(trials: Sequence[TrialRecord], store: Store) -> Plot:
    title, begun = "Learning curves", [trial for trial in trials if trial.curve]
    if not begun:
        return Plot(title=title, caption="No trial has finished an epoch yet.", width="half")
    figure = empty(legend=True, xaxis_title="epoch", yaxis=ACCURACIES | {"title": _measured(store)})
    last = max(max(trial.curve) for trial in begun)
    figure.update_xaxes(whole_numbers(1, last, room=max(0.04 * (last - 1), 0.1)))
    for state, colour in STATES.items():
        if group := [trial for trial in begun if trial.state == state]:
            _add_curves(figure, group, state, {"color": colour, "width": 1.2}, opacity=0.55)
    if (shown := subject(store)) is not None and shown.curve:
        best = store.best()
        is_best_so_far = store.facts().final is None and best is not None and shown.number == best.number
        word = "the best so far" if is_best_so_far else "chosen"
        _add_curves(figure, [shown], f"trial {shown.number}, {word}", {"color": ACCENT, "width": 3.5})
    pruned = [trial for trial in begun if trial.state == "pruned"]
    dotted = _add_ends(figure, pruned, last, (store.facts().choice or {}).get("estimates") or {})
    if pruned:
        figure.add_scatter(
            x=[_end(trial)[0] for trial in pruned],
            y=[_end(trial)[1] for trial in pruned],
            mode="markers",
            marker=_mark(STATES["pruned"], "x-thin-open"),
            showlegend=False,
            hoverinfo="skip",
        )
    caption = f"{_measured(store).capitalize()} of each trial after each epoch; a cross marks where a trial was pruned"
    caption += ", a dotted line its predicted end, with one standard deviation." if dotted else "."
    return Plot(title=title, caption=caption, figure=figure, width="half")


def _add_ends(
    figure: Figure, pruned: Sequence[TrialRecord], last: int, estimates: Mapping[str, tuple[float, float]]
) -> bool:
    """Draw the ends of pruned trials as the choice's Gaussian process predicts; return whether there are any."""
    ends = {trial.number: int(min(last, epochs_of(trial.params))) for trial in pruned}
    known = [each for each in pruned if str(each.number) in estimates and max(each.curve) < ends[each.number]]
    lines = [(f"trial {n}", [_end(each), (ends[n], estimates[str(n)][0])]) for each in known for n in [each.number]]
    deviations = [each for trial in known for each in (None, estimates[str(trial.number)][1], None)]
    if known:
        figures.add_lines(
            figure,
            lines,
            mode="lines",
            error_y={"array": deviations, "width": 3, "thickness": 1},
            line={"color": STATES["pruned"], "width": 1.2, "dash": "dot"},
            opacity=0.55,
            name="predicted end",
            hovertemplate="%{text}, predicted end: %{y:.2%}<extra></extra>",
        )
    return bool(known)


def _add_curves(
    figure: Figure, trials: Sequence[TrialRecord], name: str, line: dict[str, Any], opacity: float = 1.0
) -> None:
    figures.add_lines(
        figure,
        [(f"trial {trial.number}", trial.curve.items()) for trial in trials],
        line=line,
        marker={"size": 4},
        opacity=opacity,
        name=name,
        hovertemplate="%{text}, epoch %{x}: %{y:.2%}<extra></extra>",
    )


# -- learning rates ------------------------------------------------------------------------------------------------


def _ladder(store: Store) -> Plot:
    """Draw the peak learning rate per depth, chosen trial: base_lr * depth_lr_mult ** distance from the head."""
    title, chosen = "Learning rate over depth", subject(store)
    definition, depths = store.facts().definition or {}, store.facts().depths
    if depths is None or chosen is None:
        return Plot(title=title, caption="The depths of the backbone are not recorded.", width="half")
    values = definition | chosen.params
    rate, multiplier = values["optim.base_lr"], values["optim.depth_lr_mult"]
    names = [depth.rstrip(".") for depth in depths[values["optim.depth_by"]]]
    rates = {name: rate * multiplier ** (len(names) - 1 - place) for place, name in enumerate(names)}
    moving = {name: each for name, each in rates.items() if each > 0}
    frozen = [name for name, each in rates.items() if each == 0]
    figure = empty(height=max(90 + 34 * len(names), 280), xaxis_title="peak learning rate")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names, range=[-0.5, len(names) - 0.5])
    figure.add_scatter(
        x=list(moving.values()),
        y=list(moving),
        mode="lines+markers+text",
        text=[f"{each:.1e}" for each in moving.values()],
        textposition="top center",
        textfont={"color": INK, "size": 11},
        line={"color": LINE, "width": 2},
        marker={"color": ACCENT, "size": 11},
        hovertemplate="%{y}: %{x:.3e}<extra></extra>",
    )
    _rates(figure, min(moving.values()) / 2, max(moving.values()) * 2)
    still = f" Frozen: {', '.join(frozen)}." if frozen else ""
    caption = (
        f"Trial {chosen.number}: the head's learning rate is {rate:.3g}, and each depth below has {multiplier:.3g} "
        f"times the rate of the one above.{still}"
    )
    return Plot(title=title, caption=caption, figure=figure, width="half")


def _landscape(store: Store, trials: Sequence[TrialRecord]) -> Plot:
    """Draw validation accuracy over base LR and multiplier: a table for a grid, else a contour with dots."""
    title = "Base learning rate against depth-LR multiplier"
    complete = [trial for trial in trials if trial.value is not None and set(PAIR) <= set(trial.params)]
    if len(complete) < 2:
        return Plot(title=title, caption="This needs two complete trials that differ in both.")
    definition = store.facts().definition or {}
    if all(str(definition.get(f"space.{name}", "")).startswith("Choice") for name in PAIR):
        return Plot(title=title, caption="The mean of the complete trials in each cell.", figure=_table(complete))
    figure = empty(height=420, xaxis_title="base learning rate", yaxis_title="depth-LR multiplier")
    drawn = [trial for trial in trials if set(PAIR) <= set(trial.params)]
    rates = [trial.params[PAIR[0]] for trial in drawn]
    _rates(figure, min(rates) / 1.2, max(rates) * 1.2)
    caption = "A dot is a complete trial, a cross a pruned or failed one."
    if len(complete) >= BETWEEN and _contour(figure, complete):
        caption += " The colours between the dots are interpolated on a fine grid."
    _add_dots(figure, drawn)
    return Plot(title=title, caption=caption, figure=figure)


def _table(complete: Sequence[TrialRecord]) -> Figure:
    """Draw the mean accuracy in each cell of a grid."""
    import pandas

    cells = pandas.DataFrame([trial.params | {"value": trial.value} for trial in complete])
    means = cells.pivot_table("value", index=PAIR[1], columns=PAIR[0])
    z = means.values.tolist()
    axis = {"type": "category", "showgrid": False}
    x, y = axis | {"title": "base learning rate"}, axis | {"title": "depth-LR multiplier"}
    figure = empty(xaxis=x, yaxis=y)
    figure.add_heatmap(
        x=[f"{column:g}" for column in means.columns],
        y=[f"{row:g}" for row in means.index],
        z=z,
        text=[["" if math.isnan(value) else percent(value) for value in row] for row in z],
        texttemplate="%{text}",
        textfont={"size": 15},
        colorscale=SCALE,
        xgap=3,
        ygap=3,
        showscale=False,
        hovertemplate="base LR %{x}, multiplier %{y}: %{text}<extra></extra>",
    )
    return figure


def _rates(figure: Figure, low: float, high: float) -> None:
    """Set a logarithmic axis of learning rates with few ticks."""
    step: Any = 1 if high > 100 * low else "D2"
    ends = [math.log10(low), math.log10(high)]
    figure.update_xaxes(type="log", dtick=step, tickformat=".0e", range=ends)


def _contour(figure: Figure, complete: Sequence[TrialRecord]) -> bool:
    """Draw a linear interpolation inside the trials' convex hull; return False if they are collinear."""
    import numpy
    from scipy.interpolate import griddata
    from scipy.spatial import QhullError

    x = numpy.log10([trial.params[PAIR[0]] for trial in complete])
    y = numpy.array([trial.params[PAIR[1]] for trial in complete])
    values = numpy.array([trial.value for trial in complete])
    columns, rows = numpy.linspace(x.min(), x.max(), GRID), numpy.linspace(y.min(), y.max(), GRID)
    try:
        between = griddata((x, y), values, tuple(numpy.meshgrid(columns, rows)), rescale=True)
    except QhullError:
        return False
    figure.add_contour(
        x=(10**columns).tolist(),
        y=rows.tolist(),
        z=[[None if math.isnan(value) else round(value, 5) for value in row] for row in between.tolist()],
        colorscale=SCALE,
        zmin=values.min(),
        zmax=values.max(),
        ncontours=16,
        line={"width": 0.4, "color": LINE},
        showscale=False,
        hoverinfo="skip",
    )
    return True


def _add_dots(figure: Figure, trials: Sequence[TrialRecord]) -> None:
    crosses = {"symbol": "x-thin-open", "size": 7, "color": SOFT, "line": {"width": 1.5, "color": SOFT}}
    values = [trial.value for trial in trials if trial.value is not None]
    equal = min(values) == max(values)  # plotly's range for equal values extends below 0 and above 100 %
    dots = {
        "size": 11,
        "colorscale": SCALE,
        "line": {"width": 1.5, "color": INK},
        "cmin": 0.0 if equal else min(values),
        "cmax": 1.0 if equal else max(values),
        "colorbar": {"tickformat": SHARE, "thickness": 12, "outlinewidth": 0, "tickfont": {"color": SOFT}},
    }
    for whole in (False, True):
        group = [trial for trial in trials if (trial.value is not None) is whole]
        figure.add_scatter(
            x=[trial.params[PAIR[0]] for trial in group],
            y=[trial.params[PAIR[1]] for trial in group],
            mode="markers",
            marker=dots | {"color": [trial.value for trial in group]} if whole else crosses,
            text=[f"trial {trial.number}: {percent(trial.value) if whole else trial.state}" for trial in group],
            hovertemplate="%{text}<br>base LR %{x:.2e}<br>multiplier %{y:.2f}<extra></extra>",
            showlegend=False,
        )


def time_plot(trials: Sequence[TrialRecord]) -> Plot:
    """Draw the time of each trial."""
    title, ended = "Time of each trial", [trial for trial in trials if trial.seconds is not None]
    if not ended:
        return Plot(title=title, caption="No trial has ended yet.")
    figure = empty(height=280, legend=True, barmode="overlay", xaxis_title="trial", yaxis_title="seconds")
    for state, colour in STATES.items():
        if group := [trial for trial in ended if trial.state == state]:
            figure.add_bar(
                x=[trial.number for trial in group],
                y=[trial.seconds for trial in group],
                customdata=[len(trial.epochs) for trial in group],
                width=0.75,  # plotly's default grows with the gaps between trials of a state
                marker={"color": colour, "opacity": 0.8},
                name=state,
                hovertemplate=f"trial %{{x}}: %{{y:.1f}} s, %{{customdata}} epochs<extra>{state}</extra>",
            )
    figure.update_xaxes(whole_numbers(0, trials[-1].number, room=ROOM))
    caption = f"Training and validation time, by the trial's state.{_cost_of_backbones(ended)}"
    return Plot(title=title, caption=caption, figure=figure)


def _cost_of_backbones(trials: Sequence[TrialRecord]) -> str:
    """Return each backbone's median seconds per epoch, as a sentence, if several are searched."""
    seconds: dict[str, list[float]] = {}
    for trial in trials:
        if "backbone" in trial.params:
            seconds.setdefault(trial.params["backbone"], []).extend(epoch.seconds for epoch in trial.epochs)
    medians = {name: statistics.median(each) for name, each in seconds.items() if each}
    cheap = sorted(medians, key=medians.__getitem__)
    return f" Seconds per epoch: {', '.join(f'{name} {medians[name]:.1f}' for name in cheap)}." if cheap else ""
