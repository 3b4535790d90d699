"""What the storage says, as one object, in a few lines, and as a table. Nothing is computed from anywhere else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.audit import audit_sentences
from harness.cost import cost
from harness.database import holder
from harness.errors import masked
from harness.evidence import ALPHA, comparison_sentence
from harness.files import sqlite_file
from harness.final_result import FinalResult
from harness.ledger import openings, seeds_of
from harness.predictions import described
from harness.storage import Store, TrialRecord
from harness.words import percent

if TYPE_CHECKING:
    import pandas


def overview(name: str, store: Store, tracking: str) -> dict[str, Any]:
    """The study as one JSON object (`show --json`); the report shows the same numbers."""
    best, chosen, final = store.best(), store.chosen(), _final(store)
    return {
        "study": name,
        "trials": counts(store),
        "best": None if best is None else {"number": best.number, "value": best.value, "params": best.params},
        "conclusion": conclusion(store),
        "final": final,
        "chosen": None if chosen is None else chosen.number,
        "choice": store.choice(),
        "rerank": _rerank(store),
        "ledger": {"lines": store.ledger_lines(), "fault": store.ledger_fault()},
        "duplicates": store.facts().duplicates,
        "audit": store.facts().audit,
        "test": None if final is None else _tested(store),
        "cost": cost(trial_records(store), store.facts().definition or {}),
        "runtime": store.facts().runtime,
        "environment": store.environment(),
        "command": store.facts().command,
        "storage": masked(store.url),
        "tracking": masked(tracking),
    }


def _final(store: Store) -> dict[str, Any] | None:
    """The final result without the epochs and the line of the ledger, which stand elsewhere."""
    if (final := store.facts().final) is None:
        return None
    shown = dataclasses.asdict(final)
    del shown["ledger"]
    for result in filter(None, (shown, shown["base"])):
        result["interval"] = list(result["interval"])
        result["per_seed"] = [_without_epochs(seed) for seed in result["per_seed"]]
    return shown


def _tested(store: Store) -> dict[str, Any] | None:
    """What the final run's predictions say; None where its end was cut off and mended from the ledger."""
    predictions = store.facts().predictions
    return None if predictions is None else described(predictions)


def _rerank(store: Store) -> dict[str, Any] | None:
    record = store.facts().rerank
    if record is None:
        return None
    results = {number: [_without_epochs(each) for each in found] for number, found in record["results"].items()}
    return record | {"results": results}


def _without_epochs(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "epochs"}


def subject(store: Store) -> TrialRecord | None:
    """The trial that a report is about: the one that was tested; before that the chosen one, or the best so far."""
    final = store.facts().final
    if final is None:
        return store.chosen() or store.best()
    return next(trial for trial in store.trials() if trial.number == final.trial)


def counts(store: Store) -> dict[str, int]:
    """Trials by state; one that has begun and is not finished is running, or interrupted when no process is there."""
    counted = store.counts()
    unfinished = {"running": 0, "interrupted": counted["running"]} if _abandoned(store) else {"interrupted": 0}
    return counted | unfinished


def finished_of(finished: int, asked: int) -> str:
    """How far the search is: a study may have more trials than a command asks for."""
    if finished > asked:
        return f"{finished} trials finished (asked for: {asked})"
    return f"{finished} of {asked} trials finished"


def _abandoned(store: Store) -> bool:
    """Whether no process works on this study."""
    file = sqlite_file(store.url)
    return not store.at_work() if file is None else holder(file) is None


def trial_records(store: Store) -> list[TrialRecord]:
    """All trials, the interrupted ones under that name."""
    trials = store.trials()
    if not any(trial.state == "running" for trial in trials) or not _abandoned(store):
        return trials
    return [dataclasses.replace(each, state="interrupted") if each.state == "running" else each for each in trials]


def summary(name: str, store: Store, tracking: str) -> str:
    """The study in a few lines (`show`)."""
    counted = counts(store)
    del counted["running" if counted["interrupted"] else "interrupted"]
    chosen = store.chosen()
    best = chosen if chosen is not None and chosen.number == 0 else store.best()
    params = f"\n          {in_short(best.params)}" if best is not None and best.params else ""
    fault = store.ledger_fault()
    return "\n".join(
        [
            *([] if fault is None else [f"warning   Do not trust this: {fault}."]),
            f"study     {name}: {', '.join(f'{number} {state}' for state, number in counted.items())}",
            f"best      {verdict(store)}{params}",
            *_chosen_line(store),
            f"final     {test_sentence(store)}",
            *(f"          {line}" for line in _remarks(store)),
            *_audit_lines(store),
            f"runtime   {in_words(store.facts().runtime)}",
            f"storage   {masked(store.url)}",
            f"tracking  {masked(tracking)}",
        ]
    )


def _chosen_line(store: Store) -> list[str]:
    """The configuration that was chosen, if it is another than the one with the highest value."""
    chosen, best = store.chosen(), store.best()
    if chosen is None or best is None or chosen.number in (0, best.number):  # of the base the line above tells
        return []
    how = "by its lower bound" if store.facts().rerank is None else "on fresh seeds"
    params = [f"          {in_short(chosen.params)}"] if chosen.params else []
    return [f"chosen    Trial {chosen.number}, {how}", *params]


def in_short(params: Mapping[str, Any], whole_paths: bool = True) -> str:
    """Values by name on one line; of a path into a configuration the last part alone where space is short."""
    shown = [
        (path if whole_paths else path.rsplit(".", 1)[-1], f"{value:.4g}" if isinstance(value, float) else value)
        for path, value in params.items()
    ]
    return ", ".join(f"{name} = {value}" for name, value in shown)


def _remarks(store: Store) -> list[str]:
    """What belongs to the final result."""
    final = store.facts().final
    chosen = [choice_sentence(store), prospect_sentence(store), rerank_sentence(store.facts().rerank)]
    lines = chosen if final is None else [store.why_closed(), conclusion(store), *chosen, selection_sentence(final)]
    return [*filter(None, lines)]


def _audit_lines(store: Store) -> list[str]:
    """What an audit found, if there was one."""
    record = store.facts().audit
    lines = [] if record is None else audit_sentences(record)
    return [f"{'' if number else 'audit':<10}{line}" for number, line in enumerate(lines)]


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
    final = store.facts().final
    content = {
        "trials": [
            [trial.number, trial.params, trial.state, trial.value, list(trial.curve.items())]
            for trial in store.trials()
        ],
        "final": None if final is None else final.trial,
        "seeds": [] if final is None else [list(seed.values()) for seed in seeds_of(final)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verdict(store: Store) -> str:
    """One sentence about the search: does the best trial beat the base configuration, trial 0?"""
    best = store.best()
    if best is None:
        return "No trial is complete yet."
    base = next((trial for trial in store.trials() if trial.number == 0), None)
    sentence = f"Best is trial {best.number} with a validation accuracy of {percent(best.value)}"
    if best.number != 0 and (chosen := store.chosen()) is not None and chosen.number == 0:
        return (
            f"The base configuration, trial 0, is the answer, with a validation accuracy of {percent(chosen.value)}: "
            f"no trial is shown to beat it (trial {best.number} has the highest, {percent(best.value)})."
        )
    if best.number == 0:
        return sentence + ": no trial beats the base configuration, trial 0."
    if base is None or base.value is None:
        return sentence + "; the base configuration, trial 0, did not complete."
    points = 100 * (best.value - base.value)  # type: ignore[operator]
    return sentence + f", {points:.2f} points above the base configuration, trial 0."


def all_equal(store: Store) -> bool:
    """Whether there are several finished trials, and all have the same configuration."""
    params = [trial.params for trial in store.trials() if trial.state != "running"]
    return len(params) > 1 and all(each == params[0] for each in params)


def conclusion(store: Store) -> str:
    """Whether any configuration is shown to be better than another, in a sentence.

    Of a study that has gone on since the test set was opened, it says that it is of that moment.
    """
    sentence, when = _compared(store), _when(store)
    return f"{when}: {sentence[0].lower()}{sentence[1:]}" if when else sentence


def _when(store: Store) -> str | None:
    """When what the final result says was known; None when that is now."""
    final = store.facts().final
    selection = None if final is None else final.selection
    if selection is not None and selection.candidates != store.counts()["complete"]:
        return f"When the test set was opened, with {selection.candidates:,} complete trials"
    return "When the test set was opened" if store.needs_reason() else None


def _compared(store: Store) -> str:
    if store.best() is None:
        return "No trial is complete yet."
    if all_equal(store):
        return f"No configuration is better than another: all {store.finished()} trials have the same one."
    final = store.facts().final
    if final is None:
        return "Whether the best configuration is better than the base is not known before the test set is opened."
    if final.trial == 0:
        return "No configuration is shown to be better than another: the base configuration itself was chosen."
    base, found = final.base, final.comparison
    if base is not None and len(base.per_seed) == 1:
        return (
            "No configuration is shown to be better than another: with one seed of the base, how far seeds lie apart "
            "is not known; final.seeds of 2 or more would tell."
        )
    if found is None or found.p is None:
        return "The best configuration was not compared with the base configuration on the test set."
    sentence = comparison_sentence(found)
    if found.p >= ALPHA:
        return f"No configuration is shown to be better than another: {sentence}."
    word = "better" if found.difference > 0 else "worse"
    return f"The best configuration is {word} than the base configuration: {sentence}."


def prospect_sentence(store: Store) -> str | None:
    """What further trials would bring, in a sentence; None where that is not known."""
    more = (store.choice() or {}).get("more")
    if more is None:
        return None
    gain, bound = (f"{100 * more[name]:.2f}" for name in ("gain", "bound"))
    return (
        f"{more['trials']} more trials would bring about {gain} points of validation accuracy, and any number of them "
        f"about {bound} at most, by what the trials so far show."
    )


def choice_sentence(store: Store) -> str | None:
    """Why this trial was chosen, with the highest value beside it; None where that needs no word."""
    record = store.choice()
    if record is None or record["estimates"] is None:
        return None
    values = {trial.number: trial.value for trial in store.trials()}
    chosen, highest = record["trial"], record["highest"]

    def estimated(number: int) -> str:
        mean, deviation = record["estimates"][str(number)]
        return f"{percent(mean)} ± {100 * deviation:.2f} points"

    name = f"Trial {chosen}" if chosen else "The base configuration, trial 0,"
    said = f"{name} was chosen: weighed against its neighbours it comes to {estimated(chosen)}"
    if chosen == highest:
        return f"{said}, and no trial has a lower bound that is {'higher' if chosen else 'an image higher'}."
    bound = "without a lower bound that is higher" if chosen else "with no lower bound that is an image higher"
    return (
        f"{said}; trial {highest} has the highest measured value, {percent(values[highest])}, and comes to "
        f"{estimated(highest)}, {bound}."
    )


def rerank_sentence(record: dict[str, Any] | None) -> str | None:
    """How the second look at the best ended, in a sentence; None when there was none."""
    if record is None or record["chosen"] is None:
        return None
    found = {number: [each["accuracy"] for each in record["results"][str(number)]] for number in record["candidates"]}
    seeds = len(found[record["chosen"]])
    listed = ", ".join(f"trial {number} {percent(statistics.fmean(values))}" for number, values in found.items())
    return f"On {seeds} fresh seed{'s' if seeds > 1 else ''} each: {listed}; trial {record['chosen']} was chosen."


def selection_sentence(final: FinalResult) -> str | None:
    """By how much the best validation score flatters, in a sentence; None when that is not known."""
    if (found := final.selection) is None:
        return None
    return (
        f"The best of the {found.candidates:,} trials that were complete when the test set was opened looks better "
        f"on the {found.images:,} validation images than it is: by {100 * max(found.excess, 0):.2f} points, as "
        f"they lie apart, by {100 * found.excess_if_equal:.2f} points if all were equally good (bootstrap over the "
        "images)."
    )


def test_sentence(store: Store) -> str:
    """The final result, or what has become of the test set without one, in a sentence or two."""
    opened = openings(store.ledger_lines())
    final = store.facts().final
    if final is None and opened:
        return (
            f"The test set was opened for trial {opened[-1]['trial']}, and no result is recorded yet: the study's "
            "command goes on."
        )
    if final is None and (leader := store.leader()) is not None:
        return f"The final run is under way in {leader}. {final_sentence(None)}"
    return final_sentence(final)


def final_sentence(final: FinalResult | None) -> str:
    """The final result in one sentence, with what it was measured on."""
    if final is None:
        return "The test set has not been opened."
    low, high = final.interval
    seeds, images, opened = len(final.per_seed), final.images, final.test_openings
    spread = "" if final.spread is None else f", standard deviation {100 * final.spread:.2f} points over the seeds"
    balanced = final.balanced_accuracy
    averaged = "" if balanced is None else f"; balanced over the classes {percent(balanced)}"
    times = "once" if opened == 1 else f"{opened} times, so this number is no longer untouched by selection"
    return (
        f"Test accuracy {percent(final.accuracy)} ({final.correct:,} correct of {final.total:,}: {seeds} seed"
        f"{'s' * (seeds > 1)} on {images:,} test image{'s' * (images > 1)}; 95 % interval {percent(low)} to "
        f"{percent(high)}{spread}{averaged}), trial {final.trial} retrained on {final.fit_on}. "
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
        for trial in trial_records(store)
    ]
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["number", "state", "value"])
