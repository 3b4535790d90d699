"""A study's report: one self-contained page, and its trials as a table.

Every number on the page comes from `overview.overview`, which `show --json` prints; the figures use the same storage.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.base.files import replace_file
from harness.base.words import OBJECTIVES, duration, money, percent, rate
from harness.config.final_result import FinalResult, value_of
from harness.final import sentences
from harness.final.pruning_cost import audit_sentences
from harness.report.figures import final_plots
from harness.report.overview import (
    cost_sentences,
    frame,
    in_words,
    overview,
    price_sentence,
    subject,
    suspects_frame,
    trial_records,
)
from harness.report.search_figures import search_plots, time_plot
from harness.store.store import Store, TrialRecord


def write_report(name: str, store: Store, tracking: str, folder: Path) -> Path:
    """Write report.html and trials.csv into `folder`, and suspects.csv if there are any; return the page's path.

    Raises Halt if the disk is full.
    """
    written = folder / "report.html"
    replace_file(folder / "trials.csv", frame(store).to_csv(index=False).encode())
    if (record := store.facts().suspects) is None:
        (folder / "suspects.csv").unlink(missing_ok=True)
    else:
        replace_file(folder / "suspects.csv", suspects_frame(record).to_csv(index=False).encode())
    replace_file(written, rendered("report.html", _view(name, store, tracking)).encode())
    return written


def rendered(template: str, view: Mapping[str, Any]) -> str:
    """Render `view` as a page with all text escaped, one copy of plotly.js, and no fonts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("harness.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "value_of": value_of,
        "short": _short,
        "percent": percent,
        "duration": duration,
        "money": money,
        "rate": rate,
        "quote": shlex.quote,
    }
    # Of a study, only the figures are marked as safe, and they escape "<".
    return environment.get_template(template).render(**view, plotly=Markup(get_plotlyjs()))


def _short(value: Any) -> str:
    """Return a table cell's text; empty for None and NaN."""
    return "" if value is None or value != value else sentences.short(value)


def _view(name: str, store: Store, tracking: str) -> dict[str, Any]:
    """Return the variables of the page's template."""
    seen, trials = overview(name, store, tracking), trial_records(store)
    final, tested, about = store.facts().final, seen["test"], subject(store)
    return {
        "name": name,
        "seen": seen,
        "objective": OBJECTIVES[store.facts().objective if final is None else final.objective],
        "value": None if final is None else final.value,
        "measured": final is not None and final.objective not in ("accuracy", "balanced_accuracy"),
        "leads": sentences.all_equal(store) or (final is not None and final.trial == 0),
        "sentence": sentences.test_sentence(store),
        "verdict": sentences.verdict(store),
        "remarks": _remarks(store, final),
        "strip": None if final is None else _strip(final),
        "subject": about,
        "parameters": [] if about is None else _parameters(store, about, trials),
        "search": search_plots(store, trials),
        "test": [] if tested is None else final_plots(store.facts().predictions or {}, tested),
        "thumbnails": store.facts().thumbnails,
        "suspects": (store.facts().suspects or {}).get("thumbnails", []),
        "cost": _cost(seen, store.facts().objective),
        "time": time_plot(trials),
        "failures": [trial for trial in trials if trial.state in ("failed", "diverged")],
        "values": {trial.number: trial.value for trial in trials},
        "table": _table(store),
        "places": _places(seen),
    }


def _strip(final: FinalResult) -> dict[str, Any]:
    """Return positions of interval, seeds and base on the strip."""
    base, seeds = final.base, [seed.value for seed in final.per_seed]
    ends = ends_of([*final.interval, *seeds, *([] if base is None else [base.value])])
    other = None if base is None else (place(base.value, ends), percent(base.value))
    return strip(final.value, final.interval, seeds, ends) | {"base": other}


def ends_of(points: Sequence[float]) -> tuple[int, int]:
    """Return the ends of a strip, in tenths: multiples of 10 %, so that they do not look like an interval."""
    first = min(math.floor(10 * min(points)), 9)
    return first, max(math.ceil(10 * max(points)), first + 1)


def place(value: float, ends: tuple[int, int]) -> float:
    """Return a position on the strip, in percent of its width."""
    first, last = ends
    return round(100 * (10 * value - first) / (last - first), 2)


def strip(value: float, interval: Sequence[float], seeds: Sequence[float], ends: tuple[int, int]) -> dict[str, Any]:
    """Return positions of a test result, its interval and its seeds on a strip."""
    low, high = (place(each, ends) for each in interval)
    first, last = ends
    return {
        "low": low,
        "width": round(high - low, 2),
        "mean": place(value, ends),
        "seeds": [(place(seed, ends), percent(seed)) for seed in seeds],
        "base": None,
        "ends": (f"{10 * first} %", f"{10 * last} %"),
        "interval": tuple(percent(each) for each in interval),
    }


def _parameters(store: Store, about: TrialRecord, trials: Sequence[TrialRecord]) -> list[tuple[str, Any, Any, str]]:
    """Return each searched field: its value in the trial, in the base configuration, and its search range."""
    base = next((trial.params for trial in trials if trial.number == 0), {})
    searched = store.optuna_study.get_trials(deepcopy=False)[about.number].distributions
    return [(name, value, base.get(name), _in_words(searched[name])) for name, value in about.params.items()]


def _in_words(distribution: Any) -> str:
    """Return a search range as text."""
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(str(choice) for choice in distribution.choices)
    return f"{distribution.low:g} to {distribution.high:g}" + (", logarithmic" if distribution.log else "")


def _remarks(store: Store, final: FinalResult | None) -> list[str]:
    """Return sentences on the choice, the base configuration's result, and the bias of the best score."""
    lines = [sentences.earlier_sentence(store), sentences.stop_sentence(store)]
    lines += [sentences.choice_sentence(store), sentences.prospect_sentence(store)]
    if final is not None:
        if (base := final.base) is not None:
            seeds = len(base.per_seed)
            measured = "" if base.objective == "accuracy" else f"{OBJECTIVES[base.objective]}; "
            lines.append(
                f"The base configuration, trial {base.trial}, trained in the same way, reaches "
                f"{percent(base.value)} ({measured}{base.correct:,} correct of {base.total:,}: {seeds} "
                f"seed{'s' if seeds > 1 else ''})."
            )
        complete = [trial for trial in store.trials() if trial.state == "complete"]
        unknown = "The selection bias of the best validation score is not recorded." if len(complete) > 1 else None
        lines += [sentences.selection_sentence(final) or unknown, store.why_closed()]
    return [*filter(None, lines)]


def _cost(seen: Mapping[str, Any], objective: str) -> list[str]:
    """Return the search's time, what pruning saved, and the money; an audit replaces the second."""
    spent, *saved = cost_sentences(seen["cost"])
    lines = [spent, *(saved if seen["audit"] is None else audit_sentences(seen["audit"], objective))]
    return [*lines, *filter(None, [price_sentence(seen["price"])])]


def _table(store: Store) -> dict[str, Any]:
    """Return the table of all trials, reasons last, without empty columns."""
    table = frame(store).dropna(axis="columns", how="all")
    table = table[sorted(table.columns, key=lambda column: column == "reason")]
    rows = table.astype(object).where(table.notna(), None)
    return {"columns": [str(column) for column in table.columns], "rows": rows.values.tolist()}


def _places(seen: Mapping[str, Any]) -> dict[str, str]:
    """Return hardware, versions and locations."""
    places = {"runtime": in_words(seen["runtime"]), **(seen["environment"] or {"versions": "not recorded"})}
    return places | {name: seen[name] for name in ("storage", "tracking")}
