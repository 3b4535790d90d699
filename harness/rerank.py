"""Choosing among the best few by fresh seeds: the scores that the search saw have been selected, new ones have not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from harness.results import Event
from harness.retraining import Place, Retraining


def rerank(place: Place) -> Iterator[Event]:
    """Retrain the best `final.rerank` configurations on `final.seeds` fresh seeds each, and record which is chosen.

    Each training is recorded as it ends, so none is done twice. Nothing happens when no choice is asked for.
    """
    study, store = place.study, place.store
    candidates = store.candidates(study.final.rerank)
    if len(candidates) < 2:
        return
    numbers = [trial.number for trial in candidates]
    kept: dict[str, Any] = store.facts().rerank or {}
    results: dict[str, list[dict[str, Any]]] = kept.get("results", {})
    if kept.get("candidates") == numbers and kept.get("chosen") is not None:
        return
    yield from place.ahead(
        [
            Retraining(place, "rerank", trial, number)
            for trial in candidates
            for number in range(len(results.get(str(trial.number), [])), study.final.seeds)
        ]
    )
    for trial in candidates:
        done = results.setdefault(str(trial.number), [])
        for number in range(len(done), study.final.seeds):
            retraining = Retraining(place, "rerank", trial, number)
            yield from retraining.train()
            training = retraining.trained()
            val = training.progress.epochs[-1].val
            assert val is not None, "a choice is made by the validation images"
            counted = {"correct": val.correct, "total": val.total, "accuracy": val.accuracy}
            done.append(retraining.record(training) | counted)
            store.set_as_leader({"rerank": {"candidates": numbers, "results": results, "chosen": None}})
            yield from retraining.end()
    # Equal means: the one that the search liked better, which comes first.
    chosen = max(numbers, key=lambda number: mean_accuracy(results[str(number)]))
    store.set_as_leader({"rerank": {"candidates": numbers, "results": results, "chosen": chosen}})


def mean_accuracy(results: list[dict[str, Any]]) -> float:
    return statistics.fmean(each["accuracy"] for each in results)
