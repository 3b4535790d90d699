"""Several studies side by side, from their storages alone: as one JSON object, and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.errors import InputError
from harness.base.files import replace_file
from harness.base.words import OBJECTIVES, duration, percent
from harness.config.find import find
from harness.config.study import Study
from harness.final.predictions import Predictions, from_record
from harness.final.statistics import ALPHA
from harness.report import comparison, figures
from harness.report.figures import ACCENT, ACCURACIES, AMBER, BLUE, INK, RED, Plot
from harness.report.overview import cost, counts, in_words, state_of, trial_records
from harness.report.write import ends_of, rendered, strip
from harness.store.opening import read_store, url_of
from harness.store.store import Store, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = (ACCENT, AMBER, BLUE, RED, INK)
DASHES = ("solid", "8px,4px", "2px,3px", "8px,3px,2px,3px")  # with the colours, lines of twenty kinds
HOUR_SECONDS = 3600
LONGEST = 200  # characters of names in a file's name
FINGERPRINTS = {"content of data": "fingerprint of the images", "content of weights": "fingerprint of the weights"}


def compared(names: Sequence[str], storage: str | None = None) -> tuple[dict[str, Any], Path]:
    """Compare studies, by their names or files; return the comparison, ready for JSON, and the folder of its page.

    `storage` is the URL of their database if they share one. Reads only, and opens no test set. Raises InputError for
    fewer than two studies, the same one twice, and one without results.
    """
    if len(names) < 2:
        raise InputError(f"A comparison needs two studies or more; name another one besides {names[0]!r}.")
    founds = [find(name) for name in names]
    urls = [url_of(found, storage) for found in founds]
    own = [found.study.name for found in founds]
    studies: dict[str, tuple[Study, Store]] = {}
    known: dict[str, str] = {}  # what each study is called in `names`
    with ExitStack() as opened:
        for given, found, url in zip(names, founds, urls, strict=True):
            store = opened.enter_context(read_store(found.study.name, url))
            key = store.uid or f"{url} {found.study.name}"
            if key in known:
                raise InputError(f"{known[key]!r} and {given!r} are the same study; give different ones.")
            known[key] = given
            studies[found.study.name if own.count(found.study.name) == 1 else given] = found.study, store
        return _comparison(studies, comparison.in_reach(urls)), founds[0].beside(urls[0], ".report")


def _comparison(studies: Mapping[str, tuple[Study, Store]], reach: Sequence[str]) -> dict[str, Any]:
    definitions = {name: _definition(*each) for name, each in studies.items()}
    tested = {name: _tested(name, store) for name, (_, store) in studies.items()}
    pairs = comparison.pairs(tested)
    return {
        "studies": {name: _outline(*each) for name, each in studies.items()},
        "conclusion": comparison.conclusion(pairs),
        "definitions": _differing(definitions),
        "best_so_far": {name: best_so_far(trial_records(store)) for name, (_, store) in studies.items()},
        "tests": [asdict(each) | {"sentence": comparison.sentence(each)} for each in pairs],
        "openings": comparison.openings(reach, list(definitions.values()), list(tested.values())),
    }


def _outline(study: Study, store: Store) -> dict[str, Any]:
    """Return a study's state, cost and results."""
    facts, best = store.facts(), store.best()
    final, spent = facts.final, cost(trial_records(store), facts.definition or {})
    test = None
    if final is not None:
        test = {name: getattr(final, name) for name in ("trial", "value", "interval", "spread", "images", "fit_on")}
        test["seeds"] = [seed.value for seed in final.per_seed]
    return {
        "state": state_of(store),
        "trials": counts(store),
        "finished": store.finished(),
        "asked": facts.limited(facts.wanted or study.trials),
        "epochs": spent["epochs"],
        "seconds": spent["seconds"],
        "runtime": in_words(facts.runtime),
        "device": (store.environment() or {}).get("device"),
        "objective": facts.objective,
        "best": None if best is None else {"number": best.number, "value": best.value},
        "test": test,
        "fault": store.ledger_fault(),
    }


def best_so_far(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return the best value after each finished trial, from the first complete one on, and what it took.

    Trials, epochs and seconds of training are added up in the order of the trials' numbers.
    """
    points: list[dict[str, Any]] = []
    epochs, seconds, best = 0, 0.0, None
    ended = [trial for trial in trials if trial.state not in ("running", "interrupted")]
    for number, trial in enumerate(ended, 1):
        epochs, seconds = epochs + len(trial.epochs), seconds + (trial.seconds or 0.0)
        best = max((value for value in (best, trial.value) if value is not None), default=None)
        points.append({"trials": number, "epochs": epochs, "seconds": seconds, "value": best})
    return [point for point in points if point["value"] is not None]


def _definition(study: Study, store: Store) -> dict[str, Any]:
    """Return the stored definition; fields that are newer than the study have their defaults."""
    now, stored = study.definition(), store.facts().definition or {}
    return {path: stored.get(path, now.get(path)) for path in now | stored if path in stored or study.has_default(path)}


def _differing(definitions: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the fields that differ, each with the values of the studies that have it."""
    paths = dict.fromkeys(path for each in definitions.values() for path in each)
    found = [(path, {name: each[path] for name, each in definitions.items() if path in each}) for path in paths]
    return [
        {"path": path, "values": values}
        for path, values in found
        if len(values) < len(definitions) or any(value != next(iter(values.values())) for value in values.values())
    ]


def _tested(name: str, store: Store) -> Predictions | str:
    """Return a study's test predictions, or a sentence that says why there are none."""
    facts = store.facts()
    if facts.final is None:
        return f"{name} is not tested."
    if facts.predictions is None:  # the result was restored from the ledger
        return f"The predictions of {name} are not recorded."
    try:
        return from_record(facts.predictions)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


# -- the page ------------------------------------------------------------------------------------------------------


def write_comparison(found: Mapping[str, Any], folder: Path) -> Path:
    """Write the page of a comparison into `folder`; return its path. Raises Halt if the disk is full."""
    others = "-".join(Path(name).stem for name in list(found["studies"])[1:])
    written = folder / f"compare-{others[:LONGEST]}.html"
    replace_file(written, rendered("compare.html", _view(found)).encode())
    return written


def _view(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the page's template."""
    tests = {name: each["test"] for name, each in found["studies"].items() if each["test"] is not None}
    ends = ends_of([share for test in tests.values() for share in (*test["interval"], *test["seeds"])] or [0.0])
    return {
        "found": found,
        "names": list(found["studies"]),
        "styles": _styles(found),
        "strips": {name: strip(test["value"], test["interval"], test["seeds"], ends) for name, test in tests.items()},
        "rows": outline_rows(found),
        "definitions": definition_rows(found),
        "plots": _plots(found),
        "measured": _measured(found),
        "alpha": ALPHA,
    }


def outline_rows(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the studies' states, costs and results as the rows of a table with a column for each study."""
    outlines = list(found["studies"].values())
    tests = [each["test"] for each in outlines]
    nouns = [OBJECTIVES[each["objective"]] for each in outlines]
    noun, mixed = (nouns[0], False) if len(set(nouns)) == 1 else ("value", True)

    def shown(values: Iterable[float | None]) -> list[str]:
        said = zip(map(percent, values), nouns, strict=True)
        return [f"{value} {of}" if mixed and value != percent(None) else value for value, of in said]

    def of_test(text: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [percent(None) if test is None else text(test) for test in tests]

    best = [each["best"] for each in outlines]
    return [
        ("state", [each["state"] for each in outlines]),
        ("trials", [f"{each['finished']:,} of {each['asked']:,}" for each in outlines]),
        ("epochs", [f"{each['epochs']:,}" for each in outlines]),
        ("training", [duration(each["seconds"]) for each in outlines]),
        ("trained on", [each["device"] or percent(None) for each in outlines]),
        (f"best validation {noun}", shown(None if each is None else each["value"] for each in best)),
        (f"test {noun}", shown(None if test is None else test["value"] for test in tests)),
        ("95 % interval", of_test(lambda test: " to ".join(percent(share) for share in test["interval"]))),
        ("test images", of_test(lambda test: f"{test['images']:,}")),
        ("seeds", of_test(lambda test: str(len(test["seeds"])))),
    ]


def definition_rows(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the differing fields as the rows of such a table, with a dash for a field that a study does not have."""
    return [
        (
            FINGERPRINTS.get(each["path"], each["path"]),
            [_text(each["values"][name]) if name in each["values"] else percent(None) for name in found["studies"]],
        )
        for each in found["definitions"]
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _styles(found: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return each study's colour, and the dashes of its line."""
    names = list(found["studies"])
    return {name: (COLOURS[place % 5], DASHES[place % 4]) for place, name in enumerate(names)}


def _measured(found: Mapping[str, Any]) -> str:
    """Return what the values of the figures are, and what keeps them from being comparable."""
    nouns = {name: OBJECTIVES[each["objective"]] for name, each in found["studies"].items()}
    said = f"The highest validation {next(iter(nouns.values()))} so far."
    if len(set(nouns.values())) > 1:
        listed = ", ".join(f"{noun} of {name}" for name, noun in nouns.items())
        said = f"The highest value so far, of different objectives: {listed}."
    if any(each["path"] == "content of data" for each in found["definitions"]):
        said += " The images differ in size, number or content, so compare the values with care."
    if len({each["device"] for each in found["studies"].values() if each["device"]}) > 1:
        said += " The studies trained on different hardware."
    return said


def _plots(found: Mapping[str, Any]) -> list[Plot]:
    """Draw the best value so far over trials, epochs and time."""
    curves = {name: points for name, points in found["best_so_far"].items() if points}
    if not curves:
        return []
    hours = any(points[-1]["seconds"] >= HOUR_SECONDS for points in curves.values())
    unit, one = ("hours", HOUR_SECONDS) if hours else ("minutes", 60)
    return [
        Plot(title="Over trials", caption="Finished ones.", figure=_figure(found, curves, "trials", "trials", 1)),
        Plot(
            title="Over epochs", caption="Of all finished trials.", figure=_figure(found, curves, "epochs", "epochs", 1)
        ),
        Plot(
            title=f"Over {unit}",
            caption="Training of all finished trials.",
            figure=_figure(found, curves, "seconds", unit, one),
        ),
    ]


def _figure(
    found: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, Any]]], key: str, unit: str, one: int
) -> Figure:
    figure = figures.empty(height=300, xaxis_title=unit, xaxis_rangemode="tozero", yaxis=ACCURACIES)
    for name, points in curves.items():
        colour, dash = _styles(found)[name]
        figure.add_scatter(
            x=[point[key] / one for point in points],
            y=[point["value"] for point in points],
            mode="lines+markers",
            line={"color": colour, "width": 2, "shape": "hv", "dash": dash},
            marker={"size": [0] * (len(points) - 1) + [8], "opacity": 1, "line": {"width": 0}},  # a point at the end
            name=name,
            hovertemplate=f"%{{y:.2%}} after %{{x:.4~g}} {unit}<extra>{name}</extra>",
        )
    return figure
