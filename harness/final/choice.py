"""Choose a trial by its lower bound, not by its highest value.

The highest of many validation accuracies is partly luck. A Gaussian process over all trials treats each as a
measurement with the noise of its validation images, and smooths it over its neighbours. The trial with the highest
posterior mean minus one standard deviation is chosen; the base wins if it is less than an image below.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.base.packing import unpack, unpack_bits
from harness.config.events import Event
from harness.config.final_result import value_of
from harness.config.space import Choice, Space
from harness.final.retrain import Context, Retraining
from harness.search.extrapolation import clipped, epochs_of, extrapolated, thinned

if TYPE_CHECKING:
    from harness.config.study import Study
    from harness.store.records import TrialRecord
    from harness.store.store import Store

MOST = 300  # trials that the process is fitted to (`harness.search.extrapolation.thinned`)
EQUAL = 1e-9  # differences below are of rounding
FEWEST = 4  # with fewer, nothing is fitted
FORESEEING = 20  # with fewer, a process overestimates unexplored regions
MORE = 10  # trials whose gain is estimated
DRAWS, PLACES = 200, 500  # of the posterior, at so many configurations


def record_choice(study: Study, store: Store) -> None:
    """Choose among the current trials, once."""
    if not (study.final.rerank or store.choice()):
        store.set_as_leader({"choice": choose(store.trials(), study.space)})


def rerank(context: Context) -> Iterator[Event]:
    """Retrain the best `final.rerank` configurations on `final.seeds` fresh seeds each, and record the choice.

    Each training is recorded as it ends, so none is done twice. Does nothing if `final.rerank` is 0.
    """
    study, store = context.study, context.store
    candidates = store.candidates(study.final.rerank)
    if len(candidates) < 2:
        return
    numbers = [trial.number for trial in candidates]
    kept: dict[str, Any] = store.facts().rerank or {}
    results: dict[str, list[dict[str, Any]]] = kept.get("results", {})
    if kept.get("candidates") == numbers and kept.get("chosen") is not None:
        return
    missing = [
        Retraining(context, "rerank", trial, number)
        for trial in candidates
        for number in range(len(results.get(str(trial.number), [])), study.final.seeds)
    ]
    yield from context.ahead(missing)
    for retraining in missing:
        yield from retraining.train()
        training = retraining.trained()
        val = training.progress.epochs[-1].val
        if retraining.diverged:
            assert training.val is not None, "reranking needs validation images"
            counted = {"correct": 0, "total": len(training.val), "accuracy": 0.0, "score": 0.0}
        else:
            assert val is not None, "reranking needs validation images"
            counted = {"correct": val.correct, "total": val.total, "accuracy": val.accuracy, "score": val.value}
        results.setdefault(str(retraining.trial.number), []).append(retraining.record(training) | counted)
        store.set_as_leader({"rerank": {"candidates": numbers, "results": results, "chosen": None}})
        yield from retraining.end()
    # Of equal means, the one that the search ranked higher, which comes first.
    chosen = max(numbers, key=lambda number: statistics.fmean(value_of(each) for each in results[str(number)]))
    store.set_as_leader({"rerank": {"candidates": numbers, "results": results, "chosen": chosen}})


def choose(trials: Sequence[TrialRecord], space: Space) -> dict[str, Any] | None:
    """Return the choice as a record for the storage; None if no trial is complete.

    `trial` is the chosen one, `highest` the one with the highest value, `trials` how many had ended. `estimates` are
    [mean, standard deviation] of each trial's final validation accuracy by its number, and `more` what further trials
    would gain (`_prospects`); None if no process was fitted.
    """
    candidates = [trial for trial in trials if trial.state == "complete"]
    if not candidates:
        return None
    highest = min(candidates, key=lambda trial: (-(trial.value or 0.0), trial.number)).number
    ended = sum(trial.state != "running" for trial in trials)
    made = {"trials": ended, "trial": highest, "highest": highest, "estimates": None, "more": None}
    fitted = _fitted(trials, space)
    if fitted is None:
        return made
    numbers, points, process = fitted
    mean, deviation = process.predict(points, return_std=True)
    estimates = dict(zip(numbers, zip(mean.tolist(), deviation.tolist(), strict=True), strict=True))
    bounds = {trial.number: -math.inf for trial in candidates}
    bounds |= {number: m - s for number, (m, s) in estimates.items() if number in bounds}
    chosen = min(bounds, key=lambda number: (-bounds[number], number))
    base = next((trial for trial in candidates if trial.number == 0), None)
    if base is not None and bounds[chosen] - bounds[0] < 1 / _images(base):
        chosen = 0
    return made | {
        "trial": chosen,
        "estimates": {str(number): [m, s] for number, (m, s) in sorted(estimates.items())},
        "more": _prospects(trials, chosen, space),
    }


def ablation_path(
    trials: Sequence[TrialRecord], space: Space, base: dict[str, Any], chosen: dict[str, Any]
) -> list[str]:
    """Return the fields in which two configurations differ, the one with the highest predicted gain first at each step.

    Without a prediction, as few trials are, in the order of the space.
    """
    left, path, params = [name for name in space if base.get(name) != chosen.get(name)], [], dict(base)
    fitted = _fitted(trials, space)
    while left:
        values = [0.0] * len(left)
        if fitted is not None:
            values = fitted[2].predict(np.array([_point(space, params | {name: chosen[name]}) for name in left]))
        name = left.pop(int(np.argmax(values)))
        path.append(name)
        params[name] = chosen[name]
    return path


def _fitted(
    trials: Sequence[TrialRecord], space: Space, share: float = 1.0
) -> tuple[list[int], NDArray[Any], Any] | None:
    """Return numbers and coordinates of finished trials, and a Gaussian process over their final accuracies.

    None if they are too few, or all alike.

    A Matérn kernel of order 5/2 with a length scale per dimension, by maximum likelihood (Rasmussen & Williams, 2006,
    chapters 4 and 5); the noise is the variance over the validation images, binomial for accuracy, plus
    a fitted part. It predicts the value itself, without noise.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    ended = [trial for trial in trials if trial.state != "running"]
    trials = [trial for trial in ended if trial.curve or trial.state == "diverged"]
    # A curve that diverged says nothing about its end: it is the worst, as for the samplers.
    curves = [{} if trial.state == "diverged" else trial.curve for trial in trials]
    ends = extrapolated(curves, [trial.value for trial in trials], [epochs_of(trial.params) for trial in trials])
    ends = clipped(ends, share)  # the best may be close together, and the base far below
    # Candidates come first, and the highest of them always stays.
    ranked = sorted(range(len(trials)), key=lambda n: (trials[n].number != 0, trials[n].value is None, -ends[n]))
    kept = sorted(thinned(ranked, MOST))
    if len(kept) < FEWEST or not space:
        return None
    values = np.array([ends[each] for each in kept])
    points = np.array([_point(space, trials[each].params) for each in kept])
    scale = float(values.std())
    if np.ptp(values) < EQUAL or np.ptp(points, axis=0).max() < EQUAL:
        return None
    accuracy = np.clip(values, 0.01, 0.99)
    known = accuracy * (1 - accuracy) / np.array([_images(trials[each]) for each in kept])
    for place, each in enumerate(kept):
        if (found := per_image(trials[each])) is not None and found.dtype != bool:
            known[place] = found.var() / len(found)
    kernel = ConstantKernel(1.0, (0.1, 10.0)) * Matern(np.full(points.shape[1], 0.5), (0.1, 10.0), nu=2.5)
    noisy = kernel + WhiteKernel(0.01, (1e-6, 0.25))
    process = GaussianProcessRegressor(noisy, alpha=known / scale**2 + 1e-9, normalize_y=True)
    with warnings.catch_warnings():  # a length scale at its limit: an irrelevant dimension
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(points, values)
    process.kernel_ = process.kernel_.k1
    return [trials[each].number for each in kept], points, process


def _prospects(trials: Sequence[TrialRecord], chosen: int, space: Space) -> dict[str, float] | None:
    """Return the accuracy that MORE trials would gain over the chosen one, and a bound for any number.

    None if there are too few trials.

    Thompson sampling (Thompson, 1933) places the trials by one half of the draws, the other half evaluates them; the
    bound takes the best configuration of each draw.
    """
    # It knows bad configurations as such, and not how bad they are: on the scale of the worst, unexplored regions seem
    # to promise several times what they hold (RESULTS.md).
    fitted = _fitted(trials, space, share=0.5)
    if fitted is None or len(fitted[0]) < FORESEEING:
        return None
    numbers, points, process = fitted
    rng = np.random.default_rng(0)
    places = [points[numbers.index(chosen)], *(_drawn(space, rng) for _ in range(PLACES))]
    mean, covariance = process.predict(np.array(places), return_cov=True)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0))
    draws = mean[:, None] + root @ np.random.default_rng(0).standard_normal((len(places), DRAWS))
    gains = draws[1:] - draws[0]
    tried = gains[:, :MORE].argmax(axis=0)
    judged = gains[:, DRAWS // 2 :]
    gain = judged[tried].max(axis=0).clip(min=0)
    return {"trials": MORE, "gain": float(gain.mean()), "bound": float(judged.max(axis=0).clip(min=0).mean())}


def _drawn(space: Space, rng: Any) -> list[float]:
    found: list[float] = []
    for dimension in space.values():
        if isinstance(dimension, Choice):
            option = rng.integers(len(dimension.options))
            found += [float(option == each) for each in range(len(dimension.options))]
        else:
            found.append(float(rng.random()))
    return found


def _images(trial: TrialRecord) -> float:
    """Return the number of validation images of a trial; infinity if it is unknown."""
    val = trial.epochs[-1].val if trial.epochs else None
    return math.inf if val is None else val.total


def per_image(trial: TrialRecord) -> NDArray[Any] | None:
    """Return numbers per validation image whose mean is the trial's value: hits, or the objective's contributions."""
    val = trial.epochs[-1].val if trial.epochs else None
    if val is None or (val.hits is None and val.contributions is None):
        return None
    return unpack(val.contributions, "float32") if val.contributions else unpack_bits(val.hits or "", val.total)


def _point(space: Space, params: dict[str, Any]) -> list[float]:
    """Return a configuration's coordinates in 0..1; a choice has one for each of its options."""
    found: list[float] = []
    for path, dimension in space.items():
        value = params.get(path)
        if isinstance(dimension, Choice):
            found += [float(value == each) for each in dimension.labels]
        elif value is None:
            found.append(0.5)
        else:
            low, high, at = dimension.low, dimension.high, min(max(value, dimension.low), dimension.high)
            if dimension.log:
                low, high, at = math.log(low), math.log(high), math.log(at)
            found.append((at - low) / (high - low))
    return found
