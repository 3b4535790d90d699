"""Who chooses the next configuration and who stops a trial: Optuna's samplers and pruners by name, and two of our own.

Both are described by data in a study file and built anew for every question, because a seeded sampler that lives on
would restart its stream when a study is resumed.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from harness.errors import InputError
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


def rehearse(study: Study) -> None:
    """Ask for trials in memory and judge them, as the study will.

    Optuna looks at some arguments only when it needs them: n_startup_trials="x" is found at the first question, others
    after the trials that are drawn at random. Raises InputError when the sampler or the pruner cannot work.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _blaming(study.pruner):
        memory = optuna.create_study(direction="maximize", pruner=study.pruner.build())
    options = dict(getattr(study.sampler, "options", ()))
    random = [value for value in options.values() if isinstance(value, int) and value <= REHEARSED]
    for number in range(min(study.trials, max([10, *random]) + 2)):  # Optuna's samplers draw 10 at random
        with _blaming(study.sampler):
            memory.sampler = study.sampler.build(study, number)
            trial = memory.ask()
            for path, dimension in study.space.items():
                suggest(trial, path, dimension)
        with _blaming(study.pruner):
            for epoch in range(1, 4):
                trial.report(1 / (number + epoch), epoch)
                trial.should_prune()
        memory.tell(trial, 1 / (number + 1))


@contextmanager
def _blaming(part: Sampler | Grid | Pruner) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        options = ", ".join(f"{name}={value!r}" for name, value in getattr(part, "options", ()))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{getattr(part, 'name', 'grid')}({options}) cannot work on this study ({reason}); correct its arguments."
        ) from error


@dataclass(frozen=True)
class Sampler:
    """An Optuna sampler: the name of its class and its arguments, e.g. Sampler("TPESampler", n_startup_trials=5)."""

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
        built: optuna.samplers.BaseSampler
        built = _make(optuna.samplers, self.name, "Sampler", {**dict(self.options), "seed": seed})
        return built


REHEARSED = 64  # a sampler with more random trials than this is not rehearsed beyond them

# What keeps state of its own in the storage or the process, and could not repeat an uninterrupted study.
NOT_RESUMABLE = {
    "GridSampler": "grid()",
    "BruteForceSampler": "grid()",
    "QMCSampler": 'Sampler("RandomSampler")',
    "PartialFixedSampler": "a space without the fixed fields",
    "SuccessiveHalvingPruner": "asha()",
    "HyperbandPruner": "asha()",
}


@dataclass(frozen=True)
class Grid:
    """Every combination of a space of choices, once: trial 0 is the base, then the others in order."""

    def check(self, study: Study) -> None:
        for path, dimension in study.space.items():
            if not isinstance(dimension, Choice):
                raise InputError(f"The grid needs a Choice for {path}, not {dimension}; list the values to try.")
        if study.trials > len(self.points(study)):
            raise InputError(
                f"The grid of study {study.name!r} has {len(self.points(study))} points; "
                f"ask for at most that many trials, not {study.trials}."
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
        self.build()

    def build(self) -> optuna.pruners.BasePruner:
        built: optuna.pruners.BasePruner
        if self.name == "Asha":
            built = _call(Asha, self.name, dict(self.options))
        else:
            built = _make(optuna.pruners, self.name, "Pruner", dict(self.options))
        return built


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


def _make(module: Any, name: str, suffix: str, options: Mapping[str, Any]) -> Any:
    if name in NOT_RESUMABLE:
        raise InputError(f"{name} cannot be resumed as if it had not stopped; use {NOT_RESUMABLE[name]} instead.")
    known = {each for each in vars(module) if each.endswith(suffix) and not each.startswith("Base")}
    if name not in known:
        ours = ["Asha"] if suffix == "Pruner" else []
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
    built = {key: value.build() if isinstance(value, Pruner) else value for key, value in options.items()}
    try:
        with warnings.catch_warnings():  # who names it need not be told with a line of its source
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return kind(**built)
    except (TypeError, ValueError, ImportError) as error:
        given = {option: value for option, value in options.items() if option != "seed"}  # the seed is the study's
        raise InputError(f"{name} cannot be made with {given}: {error}; correct its arguments.") from error


def tpe(**options: Any) -> Sampler:
    """The tree-structured Parzen estimator (Bergstra et al., 2011), multivariate: Optuna's default."""
    return Sampler("TPESampler", **options)


def grid() -> Grid:
    return Grid()


def asha(*, min_epochs: int = 5, reduction: int = 2) -> Pruner:
    return Pruner("Asha", min_epochs=min_epochs, reduction=reduction)


def no_pruning() -> Pruner:
    return Pruner("NopPruner")
