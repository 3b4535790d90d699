"""The report as one HTML file: the templates beside this module, filled in; plotly.js is in it once, fonts are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.base.words import percent

TEMPLATES = Path(__file__).with_name("templates")


def render(view: Mapping[str, Any]) -> str:
    """The page that shows `view` (`harness.report`); every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "percent": percent}
    # Nothing of a study is marked as safe but the figures, which escape what opens a tag.
    return environment.get_template("report.html").render(**view, plotly=Markup(get_plotlyjs()))


def short(value: Any) -> str:
    """A value of a table's cell; nothing for nothing."""
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
