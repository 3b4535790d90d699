"""Shared parts of a report's figures. Colours are CSS variables; the page gives them light and dark values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
