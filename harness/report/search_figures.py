"""Figures of the search: how it went, what each trial learned, what matters, and where the good trials lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from harness.report.figures import (
    ACCENT,
    ACCURACIES,
    AMBER,
    INK,
    LINE,
    PAIR,
    SCALE,
    SHARE,
    SOFT,
    STATES,
    Plot,
    empty,
    table_of,
    whole_numbers,
)
from harness.report.importance import importance_plot
from harness.report.overview import subject
from harness.report.parallel import parallel_coordinates
from harness.store.store import Store, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ACCURACY = "validation accuracy"
PREDICTED = "predicted end"
ROOM = 0.6  # of a trial, beside the first and the last: half of a bar and a little
GRID = 160  # steps a side of the contour; with few, it ends in stairs before it comes to the outermost trials
BETWEEN = 6  # complete trials: with fewer, nothing is interpolated


def search_plots(store: Store, trials: Sequence[TrialRecord]) -> list[Plot]:
    """Every figure of the search; where there is none yet, the caption says why."""
    complete = [trial for trial in trials if trial.state == "complete"]
    plots = [_history(trials), _learning_curves(trials, store)]
    if not complete:
        return plots
    plots += [importance_plot(store, complete), _ladder(store), _landscape(store, trials)]
    if len(complete) > 1 and complete[0].params:
        caption = "A line a complete trial, from its parameters to its accuracy; the stronger its colour, the better."
        figure = parallel_coordinates(store.optuna_study)
        plots.append(Plot(title="Parallel coordinates", caption=caption, figure=figure, shape="long"))
    return plots


def _history(trials: Sequence[TrialRecord]) -> Plot:
    title = "Optimisation history"
    complete = [trial for trial in trials if trial.value is not None]
    if not complete:
        return Plot(title=title, caption="No trial is complete yet.", width="half")
    figure = empty(legend=True, xaxis_title="epochs trained so far", yaxis_title=ACCURACY)
    figure.update_yaxes(ACCURACIES)
    best: list[float] = []
    for trial in complete:
        best.append(max([*best[-1:], trial.value or 0.0]))
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
        cliponaxis=False,
    )
    pruned = [trial for trial in trials if trial.state == "pruned" and trial.curve]
    for name, group, symbol in (("complete", complete, "circle"), ("pruned", pruned, "x-thin-open")):
        if group:
            figure.add_scatter(
                x=[spent[trial.number] for trial in group],
                customdata=[trial.number for trial in group],
                y=[trial.value if trial.value is not None else list(trial.curve.values())[-1] for trial in group],
                mode="markers",
                marker={
                    "color": STATES[name],
                    "size": 8,
                    "symbol": symbol,
                    "line": {"width": 2, "color": STATES[name]},
                },
                name=name,
                hovertemplate=f"trial %{{customdata}}: %{{y:.2%}}<extra>{name}</extra>",
                cliponaxis=False,
            )
    figure.update_xaxes(whole_numbers(0, last, room=0.02 * last))
    caption = "Each complete trial's accuracy after its last epoch, over the epochs of all trials, and the best so far"
    crosses = "; a cross is a pruned trial, at its last epoch." if pruned else "."
    return Plot(title=title, caption=caption + crosses, figure=figure, width="half")


def _edge(colour: str) -> dict[str, Any]:
    """What a cross is drawn with."""
    return {"width": 2, "color": colour}


def _learning_curves(trials: Sequence[TrialRecord], store: Store) -> Plot:
    title, begun = "Learning curves", [trial for trial in trials if trial.curve]
    if not begun:
        return Plot(title=title, caption="No trial has ended an epoch yet.", width="half")
    figure = empty(legend=True, xaxis_title="epoch", yaxis_title=ACCURACY)
    last = max(max(trial.curve) for trial in begun)
    figure.update_xaxes(whole_numbers(1, last, room=max(0.04 * (last - 1), 0.1)))
    figure.update_yaxes(ACCURACIES)
    for state, colour in STATES.items():
        if group := [trial for trial in begun if trial.state == state]:
            _add_curves(figure, group, state, {"color": colour, "width": 1.2}, opacity=0.55)
    if (shown := subject(store)) is not None and shown.curve:
        word = "the best so far" if store.facts().final is None else "chosen"
        _add_curves(figure, [shown], f"trial {shown.number}, {word}", {"color": ACCENT, "width": 3.5})
    if pruned := [trial for trial in begun if trial.state == "pruned"]:
        _add_ends(figure, pruned, last, (store.facts().choice or {}).get("estimates") or {})
        figure.add_scatter(
            x=[max(trial.curve) for trial in pruned],
            y=[trial.curve[max(trial.curve)] for trial in pruned],
            mode="markers",
            marker={"symbol": "x-thin-open", "size": 8, "color": AMBER, "line": _edge(AMBER)},
            showlegend=False,
            hoverinfo="skip",
            cliponaxis=False,
        )
    caption = f"{ACCURACY.capitalize()} of each trial after each epoch; a cross marks where a trial was pruned"
    dotted = any(trace.name == PREDICTED for trace in figure.data)
    caption += ", the dotted line how it would have ended, with one standard deviation." if dotted else "."
    return Plot(title=title, caption=caption, figure=figure, width="half")


def _add_ends(
    figure: Figure, pruned: Sequence[TrialRecord], last: int, estimates: Mapping[str, tuple[float, float]]
) -> None:
    """How stopped trials would have ended, as the process expects by which the choice was made."""
    known = [trial for trial in pruned if str(trial.number) in estimates and max(trial.curve) < last]
    if not known:
        return
    points: list[tuple[int, int | None, float | None, float | None]] = []
    for trial in known:
        mean, deviation = estimates[str(trial.number)]
        stopped = max(trial.curve)
        points += [(trial.number, stopped, trial.curve[stopped], None), (trial.number, last, mean, deviation)]
        points.append((trial.number, None, None, None))
    figure.add_scatter(
        x=[epoch for _, epoch, _, _ in points],
        y=[value for _, _, value, _ in points],
        error_y={"array": [deviation for *_, deviation in points], "width": 3, "thickness": 1},
        customdata=[number for number, *_ in points],
        mode="lines",
        line={"color": AMBER, "width": 1.2, "dash": "dot"},
        opacity=0.55,
        name=PREDICTED,
        hovertemplate="trial %{customdata}, predicted end: %{y:.2%}<extra></extra>",
        cliponaxis=False,
    )


def _add_curves(
    figure: Figure, trials: Sequence[TrialRecord], name: str, line: dict[str, Any], opacity: float = 1.0
) -> None:
    """All of them as one trace with gaps, so that the legend names the state once."""
    points = [(trial.number, epoch, value) for trial in trials for epoch, value in [*trial.curve.items(), (None, None)]]
    figure.add_scatter(
        x=[epoch for _, epoch, _ in points],
        y=[value for _, _, value in points],
        customdata=[number for number, _, _ in points],
        mode="lines+markers",
        line=line,
        marker={"size": 4},
        opacity=opacity,
        name=name,
        hovertemplate="trial %{customdata}, epoch %{x}: %{y:.2%}<extra></extra>",
        cliponaxis=False,
    )


# -- learning rates ------------------------------------------------------------------------------------------------


def _ladder(store: Store) -> Plot:
    """The peak rate of every depth in the chosen configuration: base_lr * depth_lr_mult ** distance from the head."""
    title, chosen = "Learning rate over depth", subject(store)
    definition, depths = store.facts().definition or {}, store.facts().depths
    if depths is None or chosen is None:
        return Plot(title=title, caption="The depths of the backbone are not recorded.", width="half")
    values = definition | chosen.params
    rate, multiplier = values["optim.base_lr"], values["optim.depth_lr_mult"]
    names = [depth.rstrip(".") for depth in depths[values["optim.depth_by"]]]
    rates = [rate * multiplier ** (len(names) - 1 - place) for place in range(len(names))]
    moving = [(name, each) for name, each in zip(names, rates, strict=True) if each > 0]
    frozen = [name for name, each in zip(names, rates, strict=True) if each == 0]
    figure = empty(height=max(90 + 34 * len(names), 280), xaxis_title="peak learning rate")
    figure.update_yaxes(categoryorder="array", categoryarray=names, range=[-0.5, len(names) - 0.5])
    figure.add_scatter(
        x=[each for _, each in moving],
        y=[name for name, _ in moving],
        mode="lines+markers+text",
        text=[f"{each:.1e}" for _, each in moving],
        textposition="top center",
        textfont={"color": INK, "size": 11},
        cliponaxis=False,
        line={"color": LINE, "width": 2},
        marker={"color": ACCENT, "size": 11},
        hovertemplate="%{y}: %{x:.3e}<extra></extra>",
    )
    low, high = min(each for _, each in moving), max(each for _, each in moving)
    _rates(figure, low / 2, high * 2)
    still = f" Frozen: {', '.join(frozen)}." if frozen else ""
    caption = (
        f"Trial {chosen.number}: the head learns at {rate:.3g}, and each depth below it at {multiplier:.3g} times the "
        f"rate of the one above.{still}"
    )
    return Plot(title=title, caption=caption, figure=figure, width="half")


def _landscape(store: Store, trials: Sequence[TrialRecord]) -> Plot:
    """Validation accuracy over base LR and multiplier: a table for a grid, a contour between the dots otherwise."""
    title = "Base learning rate against depth-LR multiplier"
    complete = [trial for trial in trials if trial.value is not None and set(PAIR) <= set(trial.params)]
    if len(complete) < 2:
        return Plot(title=title, caption="It needs two complete trials that differ in both.")
    definition = store.facts().definition or {}
    if all(str(definition.get(f"space.{name}", "")).startswith("Choice") for name in PAIR):
        return Plot(title=title, caption="The mean of the complete trials in each cell.", figure=table_of(complete))
    figure = empty(height=420, xaxis_title="base learning rate", yaxis_title="depth-LR multiplier")
    drawn = [trial for trial in trials if set(PAIR) <= set(trial.params)]
    rates = [trial.params[PAIR[0]] for trial in drawn]
    _rates(figure, min(rates) / 1.2, max(rates) * 1.2)
    between = len(complete) >= BETWEEN and _contour(figure, complete)
    _add_dots(figure, drawn)
    caption = "A dot is a complete trial, a cross one that was pruned or failed."
    colours = (
        " The colours between the dots are interpolated on a fine grid; outside of them nothing is known."
        if between
        else ""
    )
    return Plot(title=title, caption=caption + colours, figure=figure)


def _rates(figure: Figure, low: float, high: float) -> None:
    """A logarithmic axis of learning rates with few marks."""
    step: Any = 1 if high > 100 * low else "D2"
    ends = [math.log10(low), math.log10(high)]
    figure.update_xaxes(type="log", dtick=step, tickformat=".0e", range=ends)


def _contour(figure: Figure, complete: Sequence[TrialRecord]) -> bool:
    """Linear interpolation inside of the hull of the trials; False when they lie on a line."""
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
    dots = {
        "size": 11,
        "colorscale": SCALE,
        "line": {"width": 1.5, "color": INK},
        **_ends([trial.value for trial in trials if trial.value is not None]),
        "colorbar": {"tickformat": SHARE, "thickness": 12, "outlinewidth": 0, "tickfont": {"color": SOFT}},
    }
    for whole in (False, True):
        group = [trial for trial in trials if (trial.value is not None) is whole]
        figure.add_scatter(
            x=[trial.params[PAIR[0]] for trial in group],
            y=[trial.params[PAIR[1]] for trial in group],
            mode="markers",
            marker=dots | {"color": [trial.value for trial in group]} if whole else crosses,
            text=[
                f"trial {trial.number}: {f'{100 * trial.value:.2f} %' if trial.value is not None else trial.state}"
                for trial in group
            ],
            hovertemplate="%{text}<br>base LR %{x:.2e}<br>multiplier %{y:.2f}<extra></extra>",
            showlegend=False,
        )


def _ends(values: Sequence[float]) -> dict[str, float]:
    """Where the colours of accuracies end: plotly's own ends of equal ones lie below 0 and above 100 %."""
    low, high = min(values), max(values)
    return {"cmin": low, "cmax": high} if low < high else {"cmin": 0.0, "cmax": 1.0}


def time_plot(trials: Sequence[TrialRecord]) -> Plot:
    """How long each trial took."""
    title, ended = "Time of each trial", [trial for trial in trials if trial.seconds is not None]
    if not ended:
        return Plot(title=title, caption="No trial has ended yet.")
    figure = empty(height=280, legend=True, xaxis_title="trial", yaxis_title="seconds")
    for state, colour in STATES.items():
        if group := [trial for trial in ended if trial.state == state]:
            figure.add_bar(
                x=[trial.number for trial in group],
                y=[trial.seconds for trial in group],
                customdata=[len(trial.epochs) for trial in group],
                width=0.75,  # plotly's own is as wide as the widest gap between two of a state
                marker={"color": colour, "opacity": 0.8},
                name=state,
                hovertemplate=f"trial %{{x}}: %{{y:.1f}} s, %{{customdata}} epochs<extra>{state}</extra>",
            )
    figure.update_xaxes(whole_numbers(0, trials[-1].number, room=ROOM))
    figure.update_layout(barmode="overlay")
    return Plot(title=title, caption="Training and validation together, by how the trial ended.", figure=figure)
