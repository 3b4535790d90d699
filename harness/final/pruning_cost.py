"""What pruning saved and what it cost, from pruned trials that were drawn at random and trained to the end.

The functions take learning curves, and are independent of storages and models; `harness.study.audit` trains. Scipy is
imported when something is computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy

from harness.base.seeds import derive_seed
from harness.base.words import OBJECTIVES, duration, percent
from harness.final.statistics import CONFIDENCE

FEW = 10  # a rank correlation over fewer trials is called a hint
LOST = -math.inf  # the final value of a diverged trial: below all others


@dataclass(frozen=True, kw_only=True)
class Course:
    """A trial in an audit: the planned epochs, the trained ones, and how long they took."""

    number: int
    state: str  # complete, pruned, or another, where only the time counts
    epochs: int  # planned
    curve: tuple[float, ...]  # validation accuracy after each epoch that was trained
    seconds: float  # in total
    epoch_seconds: float  # an epoch, on average


# -- the sample ----------------------------------------------------------------------------------------------------


def drawing_order(numbers: Collection[int], seed: int) -> list[int]:
    """Return the trials in a uniformly random order, which depends on the numbers and the seed alone."""
    return sorted(numbers, key=lambda number: (derive_seed("audit", seed, number), number))


def draw(numbers: Collection[int], fraction: float, seed: int, done: Collection[int] = ()) -> list[int]:
    """The trials to audit: the first of the drawing order, at least `fraction` of all and at least one.

    A larger fraction extends the sample of a smaller one. Those `done` at the front of the order stay in it.
    """
    order = drawing_order(numbers, seed)
    count = max(1, math.ceil(fraction * len(order) - 1e-9))  # 0.07 * 100 is a little more than 7
    return order[: max(count, len(_front(order, done)))]


def _front(order: Sequence[int], done: Collection[int]) -> list[int]:
    """The part of the order before the first trial that is not done: a sample of that size."""
    return list(takewhile(lambda number: number in done, order))


# -- the record ----------------------------------------------------------------------------------------------------


def record(trials: Sequence[Course], results: Mapping[str, Mapping[str, Any]], asked: int, seed: int) -> dict[str, Any]:
    """Return an audit's record for the storage and `show --json`; `asked` is the size of the whole sample.

    `better` and what follows from it (`share_better`, `interval`) are lower bounds: the winner's value was selected as
    the highest, so it is biased upwards, and those of the audited trials were not.
    `results` are the audited trials by number: each one's whole "curve", which is shorter than planned if the trial
    diverged. Only the front of the drawing order counts, as it alone is a random sample. Raises ValueError if no
    trial is complete, or the first one of the order is not audited.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    pruned = {trial.number: trial for trial in trials if trial.state == "pruned"}
    done = [int(number) for number in results]
    sample = [pruned[number] for number in _front(drawing_order(pruned, seed), done)]
    if not complete or not sample:
        raise ValueError("An audit needs a complete trial and an audited one.")
    curves = {trial.number: tuple(results[str(trial.number)]["curve"]) for trial in sample}
    ends = {trial.number: _end(curves[trial.number], trial.epochs) for trial in sample}
    winner = min(complete, key=lambda trial: (-trial.curve[-1], trial.number))
    best = min(ends, key=lambda number: (-ends[number], number))
    better = sum(end > winner.curve[-1] for end in ends.values())
    return {
        "seed": seed,
        "finished": len(trials),
        "pruned": len(pruned),
        "asked": asked,
        "audited": len(sample),
        "winner": {"trial": winner.number, "value": winner.curve[-1]},
        "best_audited": {"trial": best, "value": None if ends[best] == LOST else ends[best]},
        "better": better,
        "better_is_lower_bound": True,
        "tied": sum(end == winner.curve[-1] for end in ends.values()),
        "diverged": sum(end == LOST for end in ends.values()),
        "share_better": better / len(sample),
        "interval": list(share_interval(better, len(sample), len(pruned))),
        "saved": saved(trials),
        "correlation": _correlations(complete, list(pruned.values()), curves),
        "results": {number: dict(result) for number, result in results.items()},
    }


def _end(curve: Sequence[float], epochs: int) -> float:
    return curve[-1] if len(curve) == epochs else LOST


def share_interval(found: int, sample: int, population: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `population`, if `found` of a random `sample` belong to it.

    Exact and equal-tailed by the hypergeometric distribution (Wright, "Exact confidence bounds when sampling from small
    finite universes", 1991): all totals that neither tail rejects. With the whole population as the
    sample, both ends are the share itself.
    """
    from scipy.stats import hypergeom

    totals = numpy.arange(found, population - sample + found + 1)
    tail = (1 - CONFIDENCE) / 2
    as_many = hypergeom.sf(found - 1, population, totals, sample)
    as_few = hypergeom.cdf(found, population, totals, sample)
    possible = totals[(as_many > tail) & (as_few > tail)]
    return float(possible[0] / population), float(possible[-1] / population)


def saved(trials: Sequence[Course]) -> dict[str, float]:
    """Return the time of the epochs that pruned trials skipped, at each one's own pace, and its share of the search."""
    seconds = sum((each.epochs - len(each.curve)) * each.epoch_seconds for each in trials if each.state == "pruned")
    whole = seconds + sum(trial.seconds for trial in trials)
    return {"seconds": seconds, "hours": seconds / 3600, "share": seconds / whole if whole else 0.0}


def _correlations(
    complete: Sequence[Course], pruned: Sequence[Course], audited: Mapping[int, Sequence[float]]
) -> list[dict[str, Any]]:
    """Return, per epoch but the last, the correlation of its ranks with the final ones, and how many stopped."""
    weight = len(pruned) / len(audited)
    known: list[tuple[int, Sequence[float], float]] = [(trial.epochs, trial.curve, 1.0) for trial in complete]
    known += [(trial.epochs, audited[trial.number], weight) for trial in pruned if trial.number in audited]
    stopped = Counter(len(trial.curve) for trial in pruned)
    found = []
    for epoch in range(1, max(epochs for epochs, _, _ in known)):
        longer = [each for each in known if each[0] > epoch]
        then = [curve[epoch - 1] if epoch <= len(curve) else LOST for _, curve, _ in longer]
        ends = [_end(curve, epochs) for epochs, curve, _ in longer]
        rho = rank_correlation(then, ends, [weight for _, _, weight in longer])
        found.append({"epoch": epoch, "rho": rho, "trials": len(longer), "pruned": stopped[epoch]})
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation (1904) of weighted pairs; ties share a rank.

    Integer weights are equivalent to repeated pairs. None if one of the two is constant.
    """
    ranks = []
    for values in (numpy.asarray(first), numpy.asarray(second)):
        below, level = values < values[:, None], values == values[:, None]
        ranks.append((below + level / 2) @ numpy.asarray(weights))
    (one, both), (_, other) = numpy.cov(ranks, aweights=weights, ddof=0)
    spread = math.sqrt(one * other)
    return float(both / spread) if spread > 1e-9 else None


# -- sentences -----------------------------------------------------------------------------------------------------


def audit_sentences(record: Mapping[str, Any], objective: str) -> list[str]:
    """Describe an audit's record, for the command and the report."""
    time, share = duration(record["saved"]["seconds"]), percent(record["saved"]["share"])
    return [
        _sample_sentence(record),
        f"Pruning saved {time}, {share} of what the search would have taken without it.",
        *_winner_sentences(record, OBJECTIVES[objective]),
        *_rank_sentences(record),
        _repetition_sentence(record),
    ]


def _sample_sentence(record: Mapping[str, Any]) -> str:
    pruned, audited, missing = record["pruned"], record["audited"], record["asked"] - record["audited"]
    were = _was(pruned)
    which = "all of them" if audited == pruned else f"{audited:,} of them, drawn at random,"
    which = "that one" if pruned == 1 else which
    text = f"Of {record['finished']:,} trials {pruned:,} {were} pruned; {which} {_was(audited)} trained to the end."
    return f"{text} {missing:,} more {_was(missing)} requested; run the same command again." if missing > 0 else text


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _winner_sentences(record: Mapping[str, Any], noun: str) -> list[str]:
    winner, best, tied = record["winner"], record["best_audited"], record["tied"]
    low, high = record["interval"]
    too = f", {tied:,} would have tied with it" if tied else ""
    share = f"{percent(record['share_better'])} of the pruned trials"
    if record["audited"] < record["pruned"]:
        share += f", 95 % interval {percent(low)} to {percent(high)} (hypergeometric, exact)"
    first = (
        f"{record['better']:,} of the {record['audited']:,} would have beaten the winner, trial {winner['trial']} with "
        f"a validation {noun} of {percent(winner['value'])}{too}: {share}. That is a lower "
        "bound: the winner's value was selected as the highest, so it is biased upwards."
    )
    if best["value"] is None:
        return [first, "None of them finished: all diverged."]
    diverged = f"; {record['diverged']:,} diverged" if record["diverged"] else ""
    return [first, f"The best of them, trial {best['trial']}, reached {percent(best['value'])}{diverged}."]


def _rank_sentences(record: Mapping[str, Any]) -> list[str]:
    rungs = [each for each in record["correlation"] if each["pruned"] and each["rho"] is not None]
    if not rungs:
        return []
    found = ", ".join(f"{each['rho']:.2f} after epoch {each['epoch']}" for each in rungs)
    fewest = min(each["trials"] for each in rungs)
    hint = f" That is a hint only, from {fewest:,} trials." if fewest < FEW else ""
    return [f"At pruning epochs, the rank correlation with final values (Spearman) is {found}.{hint}"]


def _repetition_sentence(record: Mapping[str, Any]) -> str:
    results = sorted(record["results"].items(), key=lambda item: int(item[0]))
    unequal = [f"trial {number} ({each['explanation'].rstrip('.')})" for number, each in results if not each["same"]]
    if unequal:
        return f"Not repeated to the last bit, so other random draws were used: {'; '.join(unequal)}."
    return f"{'Each of them' if len(results) > 1 else 'It'} repeated its recorded epochs to the last bit."
