"""Sentences about a search and its final run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from harness.base.errors import InputError
from harness.base.packing import unpack, unpack_bits
from harness.base.words import OBJECTIVES, percent
from harness.config.final_result import FinalResult, value_of
from harness.final.predictions import from_record
from harness.final.statistics import ALPHA, compare
from harness.store.ledger import openings
from harness.store.store import Store

SHOWN = 3  # names in a sentence


def verdict(store: Store) -> str:
    """State whether the best trial beats the base configuration, trial 0."""
    best = store.best()
    if best is None:
        return "No trial is complete yet."
    base = next((trial for trial in store.trials() if trial.number == 0), None)
    noun = OBJECTIVES[store.facts().objective]
    sentence = f"Best is trial {best.number} with a validation {noun} of {percent(best.value)}"
    if best.number != 0 and (chosen := store.chosen()) is not None and chosen.number == 0:
        return (
            f"The base configuration, trial 0, was chosen, with a validation {noun} of {percent(chosen.value)}: "
            f"no trial is shown to beat it (trial {best.number} has the highest, {percent(best.value)})."
        )
    if best.number == 0:
        return sentence + ": no trial beats the base configuration, trial 0."
    if base is None or base.value is None:
        running = base is None or base.state == "running"
        return (
            sentence + f"; the base configuration, trial 0, {'is not complete yet' if running else 'did not complete'}."
        )
    points = 100 * (best.value - base.value)  # type: ignore[operator]
    return sentence + f", {points:.2f} points above the base configuration, trial 0."


def earlier_sentence(store: Store) -> str | None:
    """Return which earlier trials the sampler has as history; None if none."""
    after = store.facts().after
    if after is None:
        return None
    count = f"{len(after['trials'])} of the {after['of']} trials"
    return f"The sampler's history begins with {count} of study {after['study']}."


def stop_sentence(store: Store) -> str | None:
    """State why the search stopped early; None if it did not."""
    facts = store.facts()
    if facts.stopped is None or store.finished() > facts.stopped["trials"]:
        return None
    return f"The search stopped after {facts.stopped['trials']} of {facts.wanted} trials: {facts.stopped['reason']}."


def ablation_sentences(record: Mapping[str, Any]) -> list[str]:
    """Describe an ablation's record (`harness.study.ablate`): the gain of each field, in points."""
    steps = [record["results"].get(str(step), []) for step in range(len(record["fields"]) + 1)]
    if any(len(results) < len(record["seeds"]) for results in steps):
        return ["The ablation is not complete; run the same command again."]
    scores = [_scores(results) for results in steps]
    seeds, images = scores[0].shape
    ends = [percent(float(each.mean())) for each in (scores[0], scores[-1])]
    lines = [
        f"From the base ({ends[0]}) to trial {record['trial']} ({ends[1]}), field by field; each step trained on "
        f"{seeds} seed{'s' if seeds > 1 else ''} and judged on {images:,} validation images."
    ]
    for path, before, after in zip(record["fields"], scores, scores[1:], strict=False):
        found, (old, new) = compare(after, before), record["values"][path]
        line = f"{path} from {short(old)} to {short(new)}: {100 * found.difference:+.2f} points"
        if found.low is not None and found.high is not None and found.p is not None:
            line += f" ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
            line += "" if found.p < ALPHA else ", no difference shown"
        lines.append(f"{line}.")
    return [*lines, "The trial was chosen on these images, so its gains are biased upwards."]


def _scores(results: Sequence[Mapping[str, Any]]) -> NDArray[Any]:
    """Return hits or contributions [seeds, images]."""
    return numpy.stack(
        [
            unpack(each["contributions"], "float32")
            if each["contributions"]
            else unpack_bits(each["hits"], each["images"])
            for each in results
        ]
    )


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def all_equal(store: Store) -> bool:
    """Return whether several trials are finished and all have the same configuration."""
    params = [trial.params for trial in store.trials() if trial.state != "running"]
    return len(params) > 1 and all(each == params[0] for each in params)


def conclusion(store: Store) -> str:
    """State whether any configuration is shown to be better than another.

    If the study has continued since the test set was opened, the sentence refers to that moment.
    """
    sentence, when = _compared(store), _when(store)
    return f"{when}: {sentence[0].lower()}{sentence[1:]}" if when else sentence


def _when(store: Store) -> str | None:
    """Return the moment that the final result refers to; None for now."""
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
        return "The best configuration is compared with the base only once the test set is opened."
    if final.trial == 0:
        return "No configuration is shown to be better than another: the base configuration itself was chosen."
    base, found = final.base, final.comparison
    if base is not None and len(base.per_seed) == 1:
        return (
            "No configuration is shown to be better than another: with one seed of the base, the spread of seeds "
            "is unknown; set final.seeds to 2 or more."
        )
    if found is not None and found.p is None and found.images < 2:
        return "No configuration is shown to be better than another: with one test image, the spread is unknown."
    if found is not None and found.p is None and found.seeds > 1:
        return (
            "No configuration is shown to be better than another: all images and seeds differ alike, by "
            f"{100 * found.difference:+.2f} points, so the spread is unknown."
        )
    if found is None or found.p is None:
        return "The best configuration was not compared with the base configuration on the test set."
    difference, low, high = (f"{100 * each:+.2f}" for each in (found.difference, found.low or 0.0, found.high or 0.0))
    noun = OBJECTIVES[final.objective]
    sentence = (
        f"the test {noun} of the best minus that of the base is {difference} points (95 % interval {low} to {high}, "
        f"p = {found.p:.2g}), over {found.seeds} seeds of each and {found.images:,} test images"
    )
    if found.p >= ALPHA:
        return f"No configuration is shown to be better than another: {sentence}."
    word = "better" if found.difference > 0 else "worse"
    return f"The best configuration is {word} than the base configuration: {sentence}."


def prospect_sentence(store: Store) -> str | None:
    """State the expected gain of further trials; None if it is unknown."""
    more = (store.choice() or {}).get("more")
    if more is None:
        return None
    gain, bound = (f"{100 * more[name]:.2f}" for name in ("gain", "bound"))
    return (
        f"Based on the trials so far, {more['trials']} more would gain about {gain} points of validation "
        f"{OBJECTIVES[store.facts().objective]}, and any number of them about {bound} at most."
    )


def choice_sentence(store: Store) -> str | None:
    """Explain the choice of the trial, and name the highest value; None without estimates."""
    record = store.choice()
    if record is None or record["estimates"] is None:
        return None
    values = {trial.number: trial.value for trial in store.trials()}
    chosen, highest = record["trial"], record["highest"]

    def estimated(number: int) -> str:
        mean, deviation = record["estimates"][str(number)]
        return f"{percent(mean)} ± {100 * deviation:.2f} points"

    name = f"Trial {chosen}" if chosen else "The base configuration, trial 0,"
    said = f"{name} was chosen: smoothed over its neighbours, its estimate is {estimated(chosen)}"
    if chosen == highest:
        return f"{said}, and no complete trial has a lower bound that is {'higher' if chosen else 'an image higher'}."
    bound = "without a lower bound that is higher" if chosen else "with no lower bound that is an image higher"
    return (
        f"{said}; trial {highest} has the highest measured value, {percent(values[highest])}, and an estimate of "
        f"{estimated(highest)}, {bound}."
    )


def rerank_sentence(record: dict[str, Any] | None) -> str | None:
    """Describe the reranking of the best trials; None if there was none."""
    if record is None or record["chosen"] is None:
        return None
    found = {number: [value_of(each) for each in record["results"][str(number)]] for number in record["candidates"]}
    seeds = len(found[record["chosen"]])
    listed = ", ".join(f"trial {number} {percent(statistics.fmean(values))}" for number, values in found.items())
    return f"On {seeds} fresh seed{'s' if seeds > 1 else ''} each: {listed}; trial {record['chosen']} was chosen."


def selection_sentence(final: FinalResult) -> str | None:
    """State by how much the best validation score is biased; None if it is unknown."""
    if (found := final.selection) is None:
        return None
    values = "accuracies" if final.objective == "accuracy" else f"values of {OBJECTIVES[final.objective]}"
    return (
        f"Selection bias: the highest of {found.candidates:,} validation {values}, measured on {found.images:,} "
        f"images, is about {100 * max(found.excess, 0):.2f} points too high (bootstrap over the images); if all "
        f"configurations were equally good, it would be {100 * found.excess_if_equal:.2f} points too high."
    )


def test_sentence(store: Store) -> str:
    """State the final result or, without one, the state of the test set."""
    opened = openings(store.ledger_lines())
    final = store.facts().final
    if final is None and opened:
        return (
            f"The test set was opened for trial {opened[-1]['trial']}, but no result is recorded yet; run the study "
            "again."
        )
    if final is None and (leader := store.leader()) is not None:
        return f"The final run is running in {leader}. {final_sentence(None)}"
    again = None
    if final is not None and len(opened) > final.test_openings:
        again = f"It was opened again for trial {opened[-1]['trial']}, whose result is not recorded yet."
    return " ".join(filter(None, (final_sentence(final), again, _untested(store))))


def _untested(store: Store) -> str | None:
    """Name the classes that the final result does not cover; None if it covers all."""
    if (record := store.facts().predictions) is None:
        return None
    try:
        found = from_record(record)
    except InputError:  # the report and `doctor` say it
        return None
    names = [name for number, name in enumerate(found.classes) if number not in found.labels]
    if not names:
        return None
    listed = ", ".join(map(repr, names[:SHOWN])) + (" and others" if len(names) > SHOWN else "")
    return f"It does not cover {len(names)} of the {len(found.classes)} classes, which have no test image: {listed}."


def final_sentence(final: FinalResult | None) -> str:
    """State the final result, and what it was measured on."""
    if final is None:
        return "The test set has not been opened."
    low, high = final.interval
    seeds, images, opened = len(final.per_seed), final.images, final.test_openings
    spread = "" if final.spread is None else f", standard deviation {100 * final.spread:.2f} points over the seeds"
    balanced, value, noun = final.balanced_accuracy, final.value, OBJECTIVES[final.objective]
    averaged = "" if balanced is None else f"; balanced over the classes {percent(balanced)}"
    counted = f"{final.correct:,} correct of {final.total:,}"
    if final.objective != "accuracy":
        counted, averaged = "mean", f"; accuracy {percent(final.accuracy)}, {counted}"
    flipped = (
        "" if final.flipped is None else f" Averaged over each image and its mirror image: {percent(final.flipped)}."
    )
    times = "once" if opened == 1 else f"{opened} times, so selection may have biased this number"
    return (
        f"Test {noun} {percent(value)} ({counted}: {seeds} seed"
        f"{'s' * (seeds > 1)} on {images:,} test image{'s' * (images > 1)}; 95 % interval {percent(low)} to "
        f"{percent(high)}{spread}{averaged}), trial {final.trial} retrained on {final.fit_on}.{flipped} "
        f"The test set was opened {times}."
    )
