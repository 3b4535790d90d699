"""What the storage says, as one object, as tables, and as a page with plots. Nothing is computed from anywhere else."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.database import holder, sqlite_file
from harness.errors import masked
from harness.files import replace_file
from harness.storage import Store, TrialRecord

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

ACCURACY = "validation accuracy"


def overview(name: str, store: Store, tracking: str) -> dict[str, Any]:
    """The study as one JSON object (`show --json`)."""
    best, final = store.best(), store.attribute("final")
    if final is not None:
        final = final | {"per_seed": [{k: v for k, v in seed.items() if k != "epochs"} for seed in final["per_seed"]]}
    keys = ("accuracy", "correct", "total", "per_seed", "interval", "spread", "trial", "fit_on", "test_openings")
    return {
        "study": name,
        "trials": counts(store),
        "best": None if best is None else {"number": best.number, "value": best.value, "params": best.params},
        "final": None if final is None else {key: final[key] for key in keys},
        "runtime": store.attribute("runtime"),
        "storage": masked(store.url),
        "tracking": masked(tracking),
    }


def counts(store: Store) -> dict[str, int]:
    """Trials by state; one that has begun and is not finished is running, or interrupted when no process is there."""
    counted = store.counts()
    unfinished = {"running": 0, "interrupted": counted["running"]} if _abandoned(store) else {"interrupted": 0}
    return counted | unfinished


def _abandoned(store: Store) -> bool:
    """Whether no process works on this study. On a database server nobody can tell."""
    file = sqlite_file(store.url)
    return file is not None and holder(file) is None


def _trials(store: Store) -> list[TrialRecord]:
    """All trials, the interrupted ones under that name."""
    trials = store.trials()
    if not any(trial.state == "running" for trial in trials) or not _abandoned(store):
        return trials
    return [dataclasses.replace(each, state="interrupted") if each.state == "running" else each for each in trials]


def summary(name: str, store: Store, tracking: str) -> str:
    """The study in a few lines (`show`)."""
    counted = counts(store)
    del counted["running" if counted["interrupted"] else "interrupted"]
    best = store.best()
    values = {} if best is None else best.params
    shown = [
        f"{key} = {value:.4g}" if isinstance(value, float) else f"{key} = {value}" for key, value in values.items()
    ]
    params = "\n          " + ", ".join(shown) if shown else ""
    return "\n".join(
        [
            f"study     {name}: {', '.join(f'{number} {state}' for state, number in counted.items())}",
            f"best      {verdict(store)}{params}",
            f"final     {final_sentence(store.attribute('final'))}",
            f"runtime   {in_words(store.attribute('runtime'))}",
            f"storage   {masked(store.url)}",
            f"tracking  {masked(tracking)}",
        ]
    )


def in_words(runtime: dict[str, Any] | None) -> str:
    """The decided engine as a person says it."""
    if runtime is None:
        return "not decided yet"
    layout = "channels last" if runtime["channels_last"] else "channels first"
    compiled = ", compiled" if runtime.get("compile") else ""
    return f"{runtime['device']}, {runtime['precision']}, {layout}{compiled}"


def digest(store: Store) -> str:
    """A sha256 over what two runs of the same study must agree on.

    Trial numbers, parameters, states, values and intermediate values, and each final seed's result and weights. Times
    and places are left out.
    """
    final = store.attribute("final")
    seeds = [] if final is None else final["per_seed"]
    content = {
        "trials": [
            [trial.number, trial.params, trial.state, trial.value, list(trial.curve.items())]
            for trial in store.trials()
        ],
        "final": None if final is None else final["trial"],
        "seeds": [[seed.get(key) for key in ("seed", "correct", "total", "weights")] for seed in seeds],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def verdict(store: Store) -> str:
    """One sentence about the search: does the best trial beat the base configuration, trial 0?"""
    best = store.best()
    if best is None:
        return "No trial is complete yet."
    base = next((trial for trial in store.trials() if trial.number == 0), None)
    sentence = f"Best is trial {best.number} with a validation accuracy of {percent(best.value)}"
    if best.number == 0:
        return sentence + ": no trial beats the base configuration, trial 0."
    if base is None or base.value is None:
        return sentence + "; the base configuration, trial 0, did not complete."
    points = 100 * (best.value - base.value)  # type: ignore[operator]
    return sentence + f", {points:.2f} points above the base configuration, trial 0."


def final_sentence(final: dict[str, Any] | None) -> str:
    """The final result in one sentence, with what it was measured on."""
    if final is None:
        return "The test set has not been opened."
    low, high = final["interval"]
    seeds = len(final["per_seed"])
    spread = (
        "" if final["spread"] is None else f", standard deviation {100 * final['spread']:.2f} points over the seeds"
    )
    opened = final["test_openings"]
    times = "once" if opened == 1 else f"{opened} times, so this number is no longer untouched by selection"
    return (
        f"Test accuracy {percent(final['accuracy'])} ({final['correct']:,} correct of {final['total']:,}: {seeds} seed"
        f"{'s' if seeds > 1 else ''} on {final['per_seed'][0]['total']:,} test images; 95 % interval {percent(low)} to "
        f"{percent(high)}{spread}), trial {final['trial']} retrained on {final['fit_on']}. "
        f"The test set was opened {times}."
    )


def frame(store: Store) -> pandas.DataFrame:
    """One row a trial: number, state, value, epochs, seconds, reason, and each parameter."""
    import pandas

    rows = [
        {
            "number": trial.number,
            "state": trial.state,
            "value": trial.value,
            "epochs": len(trial.curve),
            "seconds": trial.seconds,
            "reason": trial.reason,
            **trial.params,
        }
        for trial in _trials(store)
    ]
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["number", "state", "value"])


def write_report(name: str, store: Store, tracking: str, folder: Path) -> Path:
    """Write report.html and trials.csv into `folder`; returns the page's path. Raises Halt when there is no room."""
    page = folder / "report.html"
    replace_file(folder / "trials.csv", frame(store).to_csv(index=False).encode())
    replace_file(page, _page(name, store, tracking).encode())
    return page


def figures(store: Store) -> dict[str, tuple[Figure | None, str]]:
    """Title to figure and caption; where there is no figure yet, the caption says why."""
    from optuna import visualization as plots

    study, trials = store.optuna_study, _trials(store)
    complete = [trial for trial in trials if trial.state == "complete"]
    names = sorted({name for trial in trials for name in trial.params})
    curves = _learning_curves(trials), "Validation accuracy after each epoch; a cross marks where a trial was pruned."
    if not complete:
        return {"Optimisation history": (None, "No trial is complete yet."), "Learning curves": curves}
    history = plots.plot_optimization_history(study, target_name=ACCURACY)
    made: dict[str, tuple[Figure | None, str]] = {
        "Optimisation history": (history, "Complete trials, and the best up to each of them."),
        "Learning curves": curves,
    }
    if len({trial.value for trial in complete}) < 2:
        return made | {"Importances": (None, "Importances need two complete trials with different results.")}
    few = " With so few, take it as a hint at most." if len(complete) < 20 else ""
    made["Importances"] = (
        plots.plot_param_importances(study, target_name=ACCURACY),
        f"PED-ANOVA over {len(complete)} complete trials.{few}",
    )
    pair: list[str] = [name for name in ("optim.base_lr", "optim.depth_lr_mult") if name in names]
    if len(pair) == 2:
        contour = plots.plot_contour(study, params=pair, target_name=ACCURACY)
        made["Base LR against depth-LR multiplier"] = contour, "Interpolated between complete trials (the dots)."
    parallel = plots.plot_parallel_coordinate(study, params=names, target_name=ACCURACY)
    made["Parallel coordinates"] = parallel, "A line a complete trial."
    made["Slices"] = (
        plots.plot_slice(study, params=names, target_name=ACCURACY),
        "A dot a complete trial; darker is later.",
    )
    return made


def _learning_curves(trials: list[TrialRecord]) -> Figure:
    import plotly.graph_objects as go

    colours = {
        "complete": "#2a9d8f",
        "pruned": "#e9a23b",
        "diverged": "#d1495b",
        "failed": "#d1495b",
        "running": "#4a7fd4",
        "interrupted": "#4a7fd4",
    }
    figure = go.Figure()
    seen = set()
    for trial in trials:
        epochs, values = list(trial.curve), list(trial.curve.values())
        ends = ["circle"] * (len(epochs) - 1) + ["x" if trial.state == "pruned" else "circle"]
        figure.add_scatter(
            x=epochs,
            y=values,
            mode="lines+markers",
            line={"color": colours[trial.state], "width": 1.5},
            marker={"symbol": ends, "size": [0] * (len(epochs) - 1) + [8]},
            name=trial.state,
            legendgroup=trial.state,
            showlegend=trial.state not in seen,
            hovertemplate=f"trial {trial.number}, epoch %{{x}}: %{{y:.2%}}<extra>{trial.state}</extra>",
        )
        seen.add(trial.state)
    figure.update_layout(xaxis_title="epoch", yaxis_title=ACCURACY, yaxis_tickformat=".0%")
    return figure


def _page(name: str, store: Store, tracking: str) -> str:
    parts, first = [], True
    for title, (figure, caption) in figures(store).items():
        body = ""
        if figure is not None:
            body, first = _figure_html(figure, first), False
        parts.append(
            f"<section><h2>{html.escape(title)}</h2><p class='caption'>{html.escape(caption)}</p>{body}</section>"
        )
    final = store.attribute("final")
    facts = {
        **counts(store),
        "storage": masked(store.url),
        "tracking": masked(tracking),
        **(store.attribute("runtime") or {}),
    }
    return _TEMPLATE.format(
        name=html.escape(name),
        headline="not measured yet" if final is None else percent(final["accuracy"]),
        final=html.escape(final_sentence(final)),
        verdict=html.escape(verdict(store)),
        best=_best_table(store),
        figures="\n".join(parts),
        trials=_trials_table(store),
        facts="".join(
            f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>" for key, value in facts.items()
        ),
    )


def _figure_html(figure: Figure, with_plotly: bool) -> str:
    # Neutral colours on a transparent ground read in light and dark alike.
    figure.update_layout(
        template="none",
        title=None,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#8a8f98", "family": "system-ui, sans-serif"},
        margin={"l": 60, "r": 30, "t": 30, "b": 60},
        height=440,
        width=None,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a8f98"},
        legend={"orientation": "h", "y": 1.12},
        colorway=["#2a9d8f", "#e9a23b", "#4a7fd4", "#d1495b"],
    )
    axes = {"gridcolor": "rgba(128,128,128,.2)", "zeroline": False, "automargin": True}
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes)
    figure.update_traces(marker_color="#2a9d8f", selector={"type": "bar"})
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=with_plotly, config={"responsive": True, "displaylogo": False}
    )
    return text


def _best_table(store: Store) -> str:
    best = store.best()
    if best is None:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{_short(value)}</td></tr>" for key, value in best.params.items()
    )
    return f"<table class='best'>{rows}</table>"


def _trials_table(store: Store) -> str:
    table = frame(store).dropna(axis="columns", how="all")
    if table.empty:
        return "<p>No trial has begun.</p>"
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in table.columns)
    body = "".join(
        f"<tr class='{row['state']}'>" + "".join(f"<td>{_short(value)}</td>" for value in row) + "</tr>"
        for _, row in table.iterrows()
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _short(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Study {name}</title>
<style>
:root {{ color-scheme: light dark; --line: rgba(128,128,128,.25); --soft: #8a8f98; --accent: #2a9d8f; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }}
h1 {{ font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .5rem; }}
.answer {{ font-size: 3.2rem; font-weight: 700; line-height: 1.15; color: var(--accent); margin: .2rem 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }}
tr.pruned td {{ color: var(--soft); }}
tr.failed td, tr.diverged td {{ color: #d1495b; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }}
dt {{ color: var(--soft); }} dd {{ margin: 0; overflow-wrap: anywhere; }}
section {{ border-top: 1px solid var(--line); margin-top: 1.5rem; }}
section h2 {{ margin: 1.2rem 0 0; }}
.caption {{ color: var(--soft); font-size: .9rem; margin: .1rem 0 .6rem; }}
</style>
</head>
<body>
<h1>Study {name}</h1>
<p class="answer">{headline}</p>
<p>{final}</p>
<p>{verdict}</p>
{best}
{figures}
<section><h2>Trials</h2>{trials}</section>
<section><h2>Where and with what</h2><dl>{facts}</dl></section>
</body>
</html>
"""
