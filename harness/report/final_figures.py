"""Figures of the final run: accuracy per class, confusion matrix, calibration."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from harness.final.predictions import calibration_sentence, from_record
from harness.report.figures import ACCENT, ACCURACIES, INK, LINE, SOFT, Plot, empty, error_bars

FEW = 10  # predictions: with fewer, a bar says little
NAMED = 20  # classes; with more, their names do not fit on the axes
# Make confusions of a few percent visible beside a diagonal of nearly one.
STEPS = (0.0, 0.04, 0.15, 0.5, 1.0)


def final_plots(record: Mapping[str, Any], tested: Mapping[str, Any]) -> list[Plot]:
    """Return the figures for the attribute "predictions" and the result of `predictions.described`."""
    return [_per_class(tested["per_class"]), _confusion(record), _reliability(tested)]


def _per_class(rows: Sequence[Mapping[str, Any]]) -> Plot:
    figure = empty(height=300, xaxis_range=[-0.8, len(rows) - 0.2], yaxis=ACCURACIES)
    figure.add_scatter(
        # Names are escaped, because plotly interprets tags.
        x=[html.escape(row["class"]) for row in rows],
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
    matrix, names = found.matrix.tolist(), [html.escape(name) for name in found.classes]
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
