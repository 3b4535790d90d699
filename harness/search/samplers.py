"""Samplers: Optuna's by name, and two of our own.

They are data in a study file and built anew for every suggestion, because a long-lived seeded sampler
would restart its stream when a study is resumed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from harness.base.errors import InputError
from harness.config.space import Choice, Dimension, Int, encode, is_plain
from harness.config.study import Study
from harness.search import suggest
from harness.search.extrapolation import ENDED, ExtrapolatingGPSampler, complete, final_values, thinned
from harness.store.records import has_diverged, without_values


class _Asked:
    """Base class of sampler descriptions."""

    def ask(
        self, study: Study, of: optuna.Study, trial_id: int, number: int, history: list[FrozenTrial]
    ) -> dict[str, Any]:
        if study.after is not None:
            history = with_earlier(study, of.user_attrs["after"]["trials"], history)
        return suggest.ask(study, of, trial_id, number, history)


@dataclass(frozen=True)
class Sampler(_Asked):
    """An Optuna sampler: the name of its class and its arguments, e.g. Sampler("TPESampler", n_startup_trials=5).

    For another class with Optuna's interface and an argument seed, write Sampler("package.module:Class", ...).
    """

    name: str
    options: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, **options: Any) -> None:
        check_options(name, options, "")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    def check(self, study: Study) -> None:
        """Raise InputError unless Optuna has this sampler, it takes these arguments, and a study can resume with it."""
        if "seed" in dict(self.options):
            raise InputError(f"{self.name} takes its seed from the study; write Study(seed=...) instead.")
        if self.name == "CmaEsSampler" and importlib.util.find_spec("cmaes") is None:
            raise InputError("CmaEsSampler needs the package cmaes; install it with `pip install cmaes`.")
        self.build(study, seed=0)

    def build(self, study: Study, seed: int) -> optuna.samplers.BaseSampler:
        options = {**dict(self.options), "seed": seed}
        if ":" in self.name:
            return call(_imported(self.name), self.name, options)
        return make(optuna.samplers, ExtrapolatingGPSampler, self.name, options)


# Pruners that keep state in the storage, and cannot repeat an uninterrupted study. `harness.search.rehearsal` finds
# samplers that cannot.
NOT_RESUMABLE = ("SuccessiveHalvingPruner", "HyperbandPruner")
MOST_EARLIER = 50  # trials of an earlier study and of this one, together


@dataclass(frozen=True)
class Grid(_Asked):
    """Every combination of a space of choices, once: trial 0 is the base, the others follow in order."""

    name: ClassVar[str] = "grid"

    def check(self, study: Study) -> None:
        for path, dimension in study.space.items():
            if not isinstance(dimension, Choice):
                raise InputError(f"The grid needs a Choice for {path}, not {dimension}; list the values to try.")
        if study.trials > len(self.points(study)):
            raise InputError(
                f"The grid of study {study.name!r} has {len(self.points(study))} points; "
                f"ask for at most that many trials, not {study.trials}, in the study file and with --trials."
            )

    def points(self, study: Study) -> list[dict[str, Any]]:
        base = encode(study.space, study.train)
        labels = [dimension.labels for dimension in study.space.values() if isinstance(dimension, Choice)]
        points = [dict(zip(study.space, values, strict=True)) for values in itertools.product(*labels)]
        return [base, *(point for point in points if point != base)]

    def build(self, study: Study, seed: int) -> optuna.samplers.BaseSampler:
        return _GridSampler(self.points(study))


class _GridSampler(optuna.samplers.RandomSampler):
    """A sampler of the n-th point for trial n. Optuna's GridSampler has its own order and stops the study itself."""

    def __init__(self, points: list[dict[str, Any]]) -> None:
        super().__init__()
        self._points = points

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._points[trial.number][param_name]


def earlier_trials(study: Study, trials: Iterable[FrozenTrial], definition: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trials of an earlier study that fit this one's space: parameters and (extrapolated) final values.

    None is the value of a trial that diverged. Failed and unfinished trials are left out.
    """
    ended = [without_values(each) if has_diverged(each) else each for each in trials if each.state in ENDED]
    return [
        {"params": params, "value": None if math.isnan(value) else value}
        for trial, value in zip(ended, final_values(ended), strict=True)
        if (params := study.params_of(trial.params, definition)) is not None
    ]


def with_earlier(study: Study, earlier: Sequence[Mapping[str, Any]], history: list[FrozenTrial]) -> list[FrozenTrial]:
    """Put an earlier study's trials before a history, and give both the scores of their ranks as values.

    Other data or epochs give values of another scale; ranks are comparable (Salinas et al., "A quantile-based approach
    for hyperparameter transfer learning", 2020). What is best there need not be best here: every trial of this study
    takes the place of an earlier one, until none of them is left among MOST_EARLIER.
    """
    if (most := MOST_EARLIER - len(history)) <= 0:
        return history
    shown = []
    ranges = {path: _distribution(dimension) for path, dimension in study.space.items()}
    scores = _scores([each["value"] for each in earlier])
    for place in sorted(thinned(sorted(range(len(earlier)), key=lambda place: (-scores[place], place)), most)):
        params = earlier[place]["params"]
        outcome = {"state": "diverged" if earlier[place]["value"] is None else "complete"}
        trial = optuna.trial.create_trial(
            params=params, distributions=ranges, value=scores[place], user_attrs={"outcome": outcome}
        )
        trial.number = trial._trial_id = place - len(earlier)
        shown.append(trial)
    ended = [trial for trial in history if trial.state in ENDED]
    shown += [complete(trial, score) for trial, score in zip(ended, _scores(final_values(ended)), strict=True)]
    return shown + [trial for trial in history if trial.state is TrialState.RUNNING]


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.labels)
    if isinstance(dimension, Int):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _scores(values: Sequence[float | None]) -> list[float]:
    """Return quantiles of the normal distribution for the ranks of values; None and NaN rank last, equal ones alike."""
    known = [-math.inf if value is None or math.isnan(value) else value for value in values]
    ranked = sorted(known)
    ranks = [(bisect_left(ranked, value) + bisect_right(ranked, value)) / 2 for value in known]
    return [NormalDist().inv_cdf(rank / len(known)) for rank in ranks]


def _imported(name: str) -> Any:
    """Import the sampler "package.module:Class". Raises InputError if there is none."""
    module, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"There is no sampler {name!r} ({error}); write package.module:Class.") from error
    if not (isinstance(found, type) and issubclass(found, optuna.samplers.BaseSampler)):
        raise InputError(f"{name} is not a sampler; give a subclass of optuna.samplers.BaseSampler.")
    return found


def make(module: Any, ours: type, name: str, options: Mapping[str, Any]) -> Any:
    """Build a sampler or pruner of Optuna's `module`, or of our class `ours`."""
    if name in NOT_RESUMABLE:
        raise InputError(f"{name} would not resume reproducibly; use asha() instead.")
    what = module.__name__.rpartition(".")[2].removesuffix("s")
    theirs = {each for each in vars(module) if each.endswith(what.capitalize()) and not each.startswith("Base")}
    known = [*sorted(theirs.difference(NOT_RESUMABLE)), ours.__name__]
    if name not in known:
        raise InputError(f"There is no {what} {name!r}; choose from {', '.join(known)}.")
    return call(ours if name == ours.__name__ else getattr(module, name), name, options)


def check_options(name: str, options: Mapping[str, Any], or_else: str) -> None:
    """Raise InputError unless a resumed study can compare these options, by their repr."""
    if not isinstance(name, str):
        raise InputError(f"A sampler or pruner is given by its name, a string, not {name!r}.")
    for option, value in options.items():
        if not is_plain(value):
            raise InputError(
                f"{name} cannot take {option}={value!r}, as a resumed study could not compare it; "
                f"give a number, a string, a list of them{or_else}, or leave {option} out."
            )


def call(kind: Any, name: str, options: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():  # the user chose the class by its name
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return kind(**options)
    except (TypeError, ValueError, ImportError) as error:
        given = {option: value for option, value in options.items() if option != "seed"}  # the seed is the study's
        hint = "add an argument seed to its class" if "seed" in str(error) else "correct its arguments"
        raise InputError(f"{name} cannot be built with {given}: {str(error).rstrip('.')}; {hint}.") from error


def tpe(**options: Any) -> Sampler:
    """The tree-structured Parzen estimator (Bergstra et al., 2011), multivariate: Optuna's default."""
    return Sampler("TPESampler", **options)


def gp(**options: Any) -> Sampler:
    """Optuna's Gaussian process, with pruned trials extrapolated (`harness.search.extrapolation`)."""
    return Sampler("ExtrapolatingGPSampler", **options)


def grid() -> Grid:
    return Grid()
