"""Shared parts of the figures, and the figures of the test result: accuracy per class, confusions, calibration.

Colours are CSS variables; the page gives them light and dark values.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.final.predictions import calibration_sentence, from_record

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, SOFT, LINE = "var(--ink)", "var(--soft)", "var(--line)"
PAPER, SURFACE = "var(--paper)", "var(--surface)"
ACCENT, AMBER, BLUE, RED = "var(--accent)", "var(--amber)", "var(--blue)", "var(--red)"
STATES = {"complete": ACCENT, "pruned": AMBER, "diverged": RED, "failed": RED, "running": BLUE, "interrupted": BLUE}
SCALE = [[step / 4, f"var(--scale-{step})"] for step in range(5)]
SHARE = ".2~%"  # percent without trailing zeros
# Limit an axis of accuracies to 0 and 1.
ACCURACIES = {"tickformat": SHARE, "minallowed": 0, "maxallowed": 1}
HEIGHT = 360
MARKS = 10  # at most, on an axis of whole numbers
FEW = 10  # predictions: with fewer, a bar says little
IN_A_MATRIX = 500  # classes; with more the page would be many megabytes
NAMED = 20  # classes; with more, their names do not fit on the axes
# Make confusions of a few percent visible beside a diagonal of nearly one.
STEPS = (0.0, 0.04, 0.15, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure with title and caption; without a figure the caption says why."""

    title: str
    caption: str
    figure: Figure | None = None
    width: Literal["full", "half"] = "full"
    shape: Literal["plain", "square", "long"] = "plain"  # a long one scrolls sideways on a phone


def whole_numbers(first: int, last: int, room: float) -> dict[str, Any]:
    """Return an axis from `first` to `last` with `room` on both sides and integer ticks; plotly adds halves."""
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    step = next(step for step in steps if last - first < MARKS * step)
    return {"range": [first - room, last + room], "tick0": 0, "dtick": step, "tickformat": "d"}


def error_bars(spans: Sequence[tuple[float, float, float]], **style: Any) -> dict[str, Any]:
    """Return error bars for values, each with the low and high end of its interval."""
    above, below = [high - value for value, _, high in spans], [value - low for value, low, _ in spans]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **style}


def add_lines(
    figure: Figure, lines: Sequence[tuple[str, Iterable[Any]]], mode: str = "lines+markers", **style: Any
) -> None:
    """Draw lines, each with a text and points (x, y), as one trace with gaps: the legend names it once."""
    points = [(text, x, y) for text, line in lines for x, y in [*line, (None, None)]]
    x, y = [x for _, x, _ in points], [y for _, _, y in points]
    figure.add_scatter(x=x, y=y, text=[text for text, _, _ in points], mode=mode, **style)


def empty(height: int = HEIGHT, legend: bool = False, **layout: Any) -> Figure:
    """Return an empty figure in the report's style."""
    import plotly.graph_objects as go

    whole = {"data": {"scatter": [{"cliponaxis": False}]}}  # do not clip markers on the edges
    figure = go.Figure(layout={"template": whole})
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": SOFT, "size": 12.5, "family": "system-ui, sans-serif"},
        margin={"l": 8, "r": 12, "t": 34 if legend else 8, "b": 8},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"color": INK}},
        hoverlabel={"bgcolor": SURFACE, "bordercolor": LINE, "font": {"color": INK}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": SOFT, "activecolor": ACCENT},
    )
    figure.update_layout(**layout)
    axis = {"gridcolor": LINE, "linecolor": LINE, "zeroline": False, "automargin": True}
    figure.update_xaxes(**axis, title={"standoff": 10, "font": {"size": 12.5}})
    figure.update_yaxes(**axis, title={"standoff": 10, "font": {"size": 12.5}})
    return figure


def final_plots(record: Mapping[str, Any], tested: Mapping[str, Any]) -> list[Plot]:
    """Return the figures for the attribute "predictions" and the result of `predictions.described`."""
    confusion = [_confusion(record)] if len(record["classes"]) <= IN_A_MATRIX else []
    return [_per_class(tested["per_class"]), *confusion, _reliability(tested)]


def _per_class(rows: Sequence[Mapping[str, Any]]) -> Plot:
    figure = empty(height=300, xaxis_range=[-0.8, len(rows) - 0.2], yaxis=ACCURACIES)
    figure.add_scatter(
        # Names are escaped, because plotly interprets tags; it has no &quot;.
        x=[html.escape(row["class"], quote=False) for row in rows],
        y=[row["accuracy"] for row in rows],
        mode="markers",
        marker={"color": ACCENT, "size": 8 if len(rows) <= NAMED else 6},
        error_y=error_bars([(row["accuracy"], *row["interval"]) for row in rows], color=SOFT, thickness=1, width=0),
        customdata=[[row["correct"], row["total"], *row["interval"]] for row in rows],
        hovertemplate="%{x}: %{y:.1%} (%{customdata[0]} of %{customdata[1]}; 95 % interval "
        "%{customdata[2]:.0%} to %{customdata[3]:.0%})<extra></extra>",
    )
    # Labels are names, never numbers: folders may be named 1 to 102.
    figure.update_xaxes(type="category", showticklabels=len(rows) <= NAMED, showgrid=False, ticks="", tickangle=-40)
    perfect = sum(row["accuracy"] == 1 for row in rows)
    caption = (
        f"Test accuracy of each of the {len(rows)} classes, worst first, {perfect} of them without errors; the lines "
        "are 95 % intervals, wide for classes with few test images."
    )
    return Plot(title="Accuracy of each class", caption=caption, figure=figure)


def _confusion(record: Mapping[str, Any]) -> Plot:
    found = from_record(record)
    matrix, names = found.matrix.tolist(), [html.escape(name, quote=False) for name in found.classes]
    axis = {"type": "category", "showticklabels": len(names) <= NAMED, "showgrid": False, "ticks": "", "mirror": True}
    x, y = axis | {"title": "predicted", "tickangle": -50}, axis | {"title": "true", "autorange": "reversed"}
    figure = empty(height=560, xaxis=x, yaxis=y)
    figure.add_heatmap(
        x=names,
        y=names,
        z=[[count / sum(row) if count else None for count in row] for row in matrix],
        customdata=matrix,
        zmin=0,
        zmax=1,
        colorscale=[[stop, f"var(--scale-{place})"] for place, stop in enumerate(STEPS)],
        colorbar={"tickformat": ".0%", "thickness": 10, "outlinewidth": 0, "tickfont": {"color": SOFT}},
        hovertemplate="%{y}<br>predicted as %{x}<br>%{customdata} times, %{z:.1%}<extra></extra>",
    )
    caption = (
        "Each row is a true class with the shares of its predicted classes; the diagonal is correct. The colour scale "
        "emphasizes rare confusions."
    )
    return Plot(title="Confusion matrix", caption=caption, figure=figure, width="half", shape="square")


def _reliability(tested: Mapping[str, Any]) -> Plot:
    bins, seeds = tested["calibration"], tested["seeds"]
    axis = {"range": [0, 1], "dtick": 0.2, "tickformat": ".0%"}
    x, y = axis | {"title": "confidence"}, axis | {"title": "accuracy"}
    figure = empty(height=460, xaxis=x, yaxis=y, margin_r=28)  # room for the last tick label
    middles = [(each["low"] + each["high"]) / 2 for each in bins]
    shades = [0.35 if each["count"] >= FEW else 0.12 for each in bins]
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": SOFT, "dash": "dot", "width": 1.5}, hoverinfo="skip"
    )
    figure.add_bar(
        x=middles,
        y=[each["accuracy"] for each in bins],
        width=[0.92 * (each["high"] - each["low"]) for each in bins],
        marker={"color": ACCENT, "opacity": shades, "line": {"color": LINE}},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[each["confidence"] for each in bins],
        y=[each["accuracy"] for each in bins],
        mode="markers",
        marker={"color": INK, "size": 9},
        customdata=[each["count"] for each in bins],
        hovertemplate="confidence %{x:.1%}, accuracy %{y:.1%}<br>%{customdata:,} predictions<extra></extra>",
    )
    figure.add_scatter(  # not the bars' own text, which is hidden for a bar of height 0
        x=middles,
        y=[0.0 for _ in bins],
        mode="text",
        text=[f"{each['count']:,}" for each in bins],
        textposition="top center",
        textfont={"color": INK, "size": 11},
        hoverinfo="skip",
    )
    caption = (
        f"Accuracy of predictions by confidence, {f'over all {seeds} seeds' if seeds > 1 else 'of seed 0'}: "
        f"on the dotted line, predictions with 80 % confidence are right in 80 %. The numbers "
        f"count the predictions; bars of fewer than {FEW} are pale. {calibration_sentence(tested)}"
    )
    return Plot(title="Calibration", caption=caption, figure=figure, width="half", shape="square")
