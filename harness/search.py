"""Who chooses the next configuration and who stops a trial: Optuna's samplers and pruners by name, and two of our own.

Both are described by data in a study file and built anew for every question, because a seeded sampler that lives on
would restart its stream when a study is resumed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from harness.errors import InputError
from harness.extrapolation import ExtrapolatingGPSampler
from harness.space import Choice, Dimension, Int, get, is_plain, label

if TYPE_CHECKING:
    from harness.config import Study


def suggest(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    """Have the study's sampler choose a value of one dimension."""
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(path, dimension.labels)
    if isinstance(dimension, Int):
        return trial.suggest_int(path, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_float(path, dimension.low, dimension.high, log=dimension.log)


@dataclass(frozen=True)
class Sampler:
    """An Optuna sampler: the name of its class and its arguments, e.g. Sampler("TPESampler", n_startup_trials=5).

    Any other class with Optuna's interface that takes a seed is given as Sampler("package.module:Class", ...).
    """

    name: str
    options: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, **options: Any) -> None:
        _check_options(name, options, "")
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
        built: optuna.samplers.BaseSampler
        if self.name == "ExtrapolatingGPSampler":
            built = _call(ExtrapolatingGPSampler, self.name, options)
        elif ":" in self.name:
            built = _call(_imported(self.name), self.name, options)
        else:
            built = _make(optuna.samplers, self.name, "Sampler", options)
        return built


# Pruners that keep marks of their own in the storage, and could not repeat an uninterrupted study. A sampler that
# could not is found by `harness.rehearsal`.
NOT_RESUMABLE = {
    "SuccessiveHalvingPruner": "asha()",
    "HyperbandPruner": "asha()",
}


@dataclass(frozen=True)
class Grid:
    """Every combination of a space of choices, once: trial 0 is the base, then the others in order."""

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
        base = {path: label(get(study.train, path)) for path in study.space}
        labels = [dimension.labels for dimension in study.space.values() if isinstance(dimension, Choice)]
        points = [dict(zip(study.space, values, strict=True)) for values in itertools.product(*labels)]
        return [base, *(point for point in points if point != base)]

    def build(self, study: Study, seed: int) -> optuna.samplers.BaseSampler:
        return _GridSampler(self.points(study))


class _GridSampler(optuna.samplers.BaseSampler):
    """The n-th trial takes the n-th point. Optuna's GridSampler keeps its own order and stops the study by itself."""

    def __init__(self, points: list[dict[str, Any]]) -> None:
        self._points = points

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._points[trial.number][param_name]


@dataclass(frozen=True)
class Pruner:
    """An Optuna pruner: the name of its class and its arguments, e.g. Pruner("MedianPruner", n_warmup_steps=5).

    One that asks another one takes it as an argument: Pruner("PatientPruner", wrapped_pruner=asha(), patience=2).
    """

    name: str
    options: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, **options: Any) -> None:
        inner = {option for option, value in options.items() if isinstance(value, Pruner)}
        _check_options(name, {k: v for k, v in options.items() if k not in inner}, ' or a Pruner("NAME")')
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        self.build(epochs=1, warmup_epochs=0)

    def build(self, epochs: int, warmup_epochs: float) -> optuna.pruners.BasePruner:
        """The pruner for trainings of so many epochs; shares of a training are told in epochs from here on."""
        options: dict[str, Any] = {
            name: value.build(epochs, warmup_epochs) if isinstance(value, Pruner) else value
            for name, value in self.options
        }
        built: optuna.pruners.BasePruner
        if self.name == "Asha":
            if "first" in options:
                options["min_epochs"] = first_rung(options.pop("first"), epochs, warmup_epochs)
            built = _call(Asha, self.name, options)
        else:
            built = _make(optuna.pruners, self.name, "Pruner", options)
        return built

    def of(self, study: Study) -> optuna.pruners.BasePruner:
        """The pruner for a study's trainings."""
        return self.build(study.train.epochs, study.train.optim.warmup_epochs)


def first_rung(share: float, epochs: int, warmup_epochs: float) -> int:
    """The epoch of the first rung at a share of the training: not before epoch 2, nor within the warm-up."""
    if not isinstance(share, float) or not 0 < share < 1:
        raise InputError(f"asha needs first between 0 and 1, a share of the epochs, not {share!r}.")
    return max(round(share * epochs), 2, math.floor(warmup_epochs) + 1)


class Asha(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning").

    Rungs stand at epochs min_epochs * reduction**k. A trial goes on beyond a rung when its value there is among the
    best 1/reduction of all trials that have reached the rung. The decisions are those of Optuna's
    SuccessiveHalvingPruner, but computed from the reported values alone: no marks are written into the storage, so a
    trial that was killed between a mark and its verdict is judged again in the same way.
    """

    def __init__(self, min_epochs: int = 5, reduction: int = 2) -> None:
        whole = isinstance(min_epochs, int) and isinstance(reduction, int)
        if not whole or min_epochs < 1 or reduction < 2:
            given = f"{min_epochs!r} and {reduction!r}"
            raise InputError(f"asha needs whole numbers, min_epochs >= 1 and reduction >= 2, not {given}.")
        self.min_epochs = min_epochs
        self.reduction = reduction

    def rung(self, epoch: int) -> bool:
        while epoch > self.min_epochs and epoch % self.reduction == 0:
            epoch //= self.reduction
        return epoch == self.min_epochs

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        epoch = trial.last_step
        if epoch is None or not self.rung(epoch):
            return False
        value = trial.intermediate_values[epoch]
        if math.isnan(value):
            return True
        reached = [
            other.intermediate_values[epoch]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and epoch in other.intermediate_values
        ]
        # A diverged trial reached the rung too; NaN must not enter the ranking.
        ranked = sorted([value, *(v for v in reached if not math.isnan(v))])
        promotable = max(len(ranked) // self.reduction, 1)
        if study.direction == optuna.study.StudyDirection.MAXIMIZE:
            return value < ranked[-promotable]
        return value > ranked[promotable - 1]


def may_prune(pruner: optuna.pruners.BasePruner, epoch: int) -> bool:
    """Whether the pruner could stop a trial after this epoch; if not, it need not be asked, for it reads all trials.

    Of Optuna's own nothing is known, they are asked after every epoch.
    """
    return pruner.rung(epoch) if isinstance(pruner, Asha) else not isinstance(pruner, optuna.pruners.NopPruner)


def _imported(name: str) -> Any:
    """The sampler's class of "package.module:Class"; raises InputError when there is none."""
    module, _, kind = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"There is no sampler {name!r} ({error}); write package.module:Class.") from error
    if not (isinstance(found, type) and issubclass(found, optuna.samplers.BaseSampler)):
        raise InputError(f"{name} is no sampler; give a class that is derived from optuna.samplers.BaseSampler.")
    return found


def _make(module: Any, name: str, suffix: str, options: Mapping[str, Any]) -> Any:
    if name in NOT_RESUMABLE:
        raise InputError(f"{name} cannot be resumed as if it had not stopped; use {NOT_RESUMABLE[name]} instead.")
    known = {each for each in vars(module) if each.endswith(suffix) and not each.startswith("Base")}
    if name not in known:
        ours = ["Asha"] if suffix == "Pruner" else ["ExtrapolatingGPSampler"]
        names = ", ".join(sorted(known - NOT_RESUMABLE.keys()) + ours)
        raise InputError(f"There is no {suffix.lower()} {name!r}; there are {names}.")
    return _call(getattr(module, name), name, options)


def _check_options(name: str, options: Mapping[str, Any], or_else: str) -> None:
    """Raise InputError unless a resumed study can tell that these are its options, by their text."""
    if not isinstance(name, str):
        raise InputError(f"A sampler or pruner is given by its name, a text, not {name!r}.")
    for option, value in options.items():
        if not is_plain(value):
            raise InputError(
                f"{name} cannot take {option}={value!r}, for a resumed study could not tell whether it is the same; "
                f"give a number, a text, a list of them{or_else}, or leave {option} out."
            )


def _call(kind: Any, name: str, options: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():  # who names it need not be told with a line of its source
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return kind(**options)
    except (TypeError, ValueError, ImportError) as error:
        given = {option: value for option, value in options.items() if option != "seed"}  # the seed is the study's
        hint = "give its class an argument seed" if "seed" in str(error) else "correct its arguments"
        raise InputError(f"{name} cannot be made with {given}: {str(error).rstrip('.')}; {hint}.") from error


def tpe(**options: Any) -> Sampler:
    """The tree-structured Parzen estimator (Bergstra et al., 2011), multivariate: Optuna's default."""
    return Sampler("TPESampler", **options)


def gp(**options: Any) -> Sampler:
    """Optuna's Gaussian process, shown how stopped trials would have ended (`harness.extrapolation`)."""
    return Sampler("ExtrapolatingGPSampler", **options)


def grid() -> Grid:
    return Grid()


def asha(*, first: float | None = None, min_epochs: int | None = None, reduction: int = 2) -> Pruner:
    """Asynchronous successive halving, with its first rung at a share of the epochs or at an epoch (by default 5).

    A share gives no rung before epoch 2, nor within the warm-up.
    """
    if first is None:
        return Pruner("Asha", min_epochs=5 if min_epochs is None else min_epochs, reduction=reduction)
    if min_epochs is not None:
        raise InputError("asha takes first, a share of the epochs, or min_epochs, not both.")
    return Pruner("Asha", first=first, reduction=reduction)


def no_pruning() -> Pruner:
    return Pruner("NopPruner")
