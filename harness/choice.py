"""Which of the trials is handed out: the one with the best lower bound, not the one with the best luck.

The highest of many validation accuracies is high by chance, too. A Gaussian process over all trials takes each for a
measurement with the noise of its validation images, and weighs it against its neighbours. The trial whose posterior
mean minus one standard deviation is highest is chosen; a difference that is less than an image goes to the base.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.extrapolation import clipped, extrapolated
from harness.space import Choice, Space

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from harness.config import Study
    from harness.records import TrialRecord
    from harness.storage import Store

MOST = 300  # trials that the process is fitted to: the best by their predicted ends
FEWEST = 4  # with fewer a fit says nothing


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The posterior of one trial's final validation accuracy."""

    mean: float
    deviation: float  # standard deviation

    @property
    def bound(self) -> float:
        return self.mean - self.deviation


def record_choice(study: Study, store: Store) -> None:
    """Choose among the trials that there are, once; a final result from before there were choices stays."""
    kept = store.attribute("choice")
    if study.final.rerank or (kept is None and store.has_final()):
        return
    if kept is None or kept["trials"] != store.finished():
        store.set_as_leader({"choice": choose(store.trials(), study.space)})


def choose(trials: Sequence[TrialRecord], space: Space) -> dict[str, Any] | None:
    """The choice as the storage keeps it; None where no trial is complete.

    `trial` is the chosen one, `highest` the one with the highest value, `trials` how many had ended; `estimates` are
    [mean, standard deviation] of these two and the base, or None where no process was fitted.
    """
    candidates = [trial for trial in trials if trial.state == "complete"]
    if not candidates:
        return None
    highest = min(candidates, key=lambda trial: (-(trial.value or 0.0), trial.number)).number
    base = next((trial for trial in candidates if trial.number == 0), None)
    found = estimates([trial for trial in trials if trial.curve and trial.state != "running"], space)
    chosen = highest
    if found is not None:
        among = [trial.number for trial in candidates if trial.number in found]
        chosen = min(among, key=lambda number: (-found[number].bound, number))
        if base is not None and found[chosen].bound - found[0].bound < 1 / _images(base):
            chosen = 0
    shown = {chosen, highest} | (set() if base is None else {base.number})
    return {
        "trials": sum(trial.state != "running" for trial in trials),
        "trial": chosen,
        "highest": highest,
        "estimates": None
        if found is None
        else {str(number): [found[number].mean, found[number].deviation] for number in sorted(shown)},
    }


def estimates(trials: Sequence[TrialRecord], space: Space) -> dict[int, Estimate] | None:
    """The posterior of each trial's final value by its number, from finished trials with a value.

    None where the trials are too few, or all alike. A Matérn kernel of order 5/2 with a length for each dimension, by
    maximum likelihood (Rasmussen & Williams, 2006, chapters 4 and 5); the noise is that of the validation images, a
    binomial variance, and what else the trials show of it.
    """
    ends = clipped(extrapolated([trial.curve for trial in trials], [trial.value for trial in trials]))
    kept = sorted(range(len(trials)), key=lambda each: (trials[each].number != 0, -ends[each], trials[each].number))
    kept = sorted(kept[:MOST])
    if len(kept) < FEWEST or not space:
        return None

    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    values = np.array([ends[each] for each in kept])
    points = np.array([_point(space, trials[each].params) for each in kept])
    scale = values.std()
    if not scale > 0 or not points.std(axis=0).any():
        return None
    accuracy = np.clip(values, 0.01, 0.99)
    known = accuracy * (1 - accuracy) / np.array([_images(trials[each]) for each in kept])
    kernel = ConstantKernel(1.0, (0.1, 10.0)) * Matern(np.full(points.shape[1], 0.5), (0.1, 10.0), nu=2.5)
    model = GaussianProcessRegressor(kernel + WhiteKernel(0.01, (1e-6, 1.0)), alpha=known / scale**2 + 1e-9)
    with warnings.catch_warnings():  # a length at its limit: the dimension does not matter
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(points, (values - values.mean()) / scale)
    mean, variance = _posterior(model, points)
    return {
        trials[each].number: Estimate(
            mean=float(values.mean() + scale * mean[row]), deviation=float(scale * math.sqrt(max(variance[row], 0.0)))
        )
        for row, each in enumerate(kept)
    }


def _posterior(model: Any, points: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and variance of the function itself, without the noise that the kernel holds."""
    mean, deviation = model.predict(points, return_std=True)
    return mean, deviation**2 - model.kernel_.k2.noise_level


def _images(trial: TrialRecord) -> float:
    """The validation images that a trial was measured on; without end where nothing is known of them."""
    val = trial.epochs[-1].val if trial.epochs else None
    return math.inf if val is None else val.total


def _point(space: Space, params: dict[str, Any]) -> list[float]:
    """A configuration as coordinates between 0 and 1; a choice has one for each of its options."""
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
