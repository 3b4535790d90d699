"""What a sampler is shown when it is asked for a configuration, and asking it.

Several workers ask at different moments, so every question comes with what was known then: the trials with a lower
number that had ended, and the parameters of those that were running. Which ones that were is kept with the trial, and
the same question can be put again (`harness.cli.replay`). A study with one worker has seen all lower numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import OptunaError
from optuna.samplers._tpe.sampler import default_gamma
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from harness.base.errors import InputError, first_line
from harness.base.seeds import derive_seed
from harness.config.space import Choice, Dimension, Int
from harness.config.study import Study
from harness.search.history import ShownStudy
from harness.store.records import has_diverged


class _Storage:
    """A storage without what samplers note for others: what a suggestion has seen is its history alone.

    Optuna's genetic algorithms note the parents of a generation; they find the same ones again in the history. Other
    samplers note the parameters that they are about to write; a running trial is shown when it has them all.
    """

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        pass

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if "relative_params" not in key:
            self._storage.set_trial_system_attr(trial_id, key, value)


def ask(study: Study, of: optuna.Study, trial_id: int, number: int, history: list[FrozenTrial]) -> dict[str, Any]:
    """The parameters of a trial, written to the storage of `of`; what it has already stays.

    The sampler is made anew for every question, seeded from the study's seed, the trial's number and the question. It
    therefore answers the same after a kill as without one. It is not told how trials end, for it sees that in the
    history the next time; some of Optuna's would stop the study then.
    """
    shown = ShownStudy.of(of, history, _storage=_Storage(of._storage))
    shown.sampler = _sampler(study, derive_seed(study.seed, "ask", number), history)
    trial = optuna.Trial(shown, trial_id)
    # Optuna draws jointly sampled parameters at the first question; have it drawn now, whatever was asked before.
    _ = trial.relative_params
    for path, dimension in study.space.items():
        # A fresh stream for each parameter: a process may die between two of them.
        shown.sampler = _sampler(study, derive_seed(study.seed, "ask", number, path), history)
        _suggest(trial, path, dimension)
    return dict(trial.params)


def _suggest(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    """Have the study's sampler choose a value of one dimension."""
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(path, dimension.labels)
    if isinstance(dimension, Int):
        return trial.suggest_int(path, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_float(path, dimension.low, dimension.high, log=dimension.log)


def _checked(sampler: optuna.samplers.BaseSampler, name: str) -> optuna.samplers.BaseSampler:
    """The sampler with its answers checked, which Optuna does of those that it draws jointly alone.

    What it raises or suggests comes out as InputError; Optuna's and the database's own errors stay what they are.
    """
    independent, relative = sampler.sample_independent, sampler.sample_relative

    def sample_independent(of: optuna.Study, trial: FrozenTrial, path: str, distribution: BaseDistribution) -> Any:
        value = _answer(name, trial.number, independent, of, trial, path, distribution)
        try:
            fits = distribution._contains(distribution.to_internal_repr(value))
        except (ValueError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"{name} suggests {value!r} for {path}, which is outside of {distribution}; mend it.")
        return value

    def sample_relative(of: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return _answer(name, trial.number, relative, of, trial, space)

    sampler.sample_independent = sample_independent  # type: ignore[method-assign, assignment]
    sampler.sample_relative = sample_relative  # type: ignore[method-assign, assignment]
    return sampler


def _answer(name: str, number: int, question: Callable[..., Any], *about: Any) -> Any:
    try:
        return question(*about)
    except (InputError, OptunaError, SQLAlchemyError):
        raise
    except Exception as error:
        if ":" not in name:  # Optuna's own: the rehearsal says which argument is wrong
            raise
        raise InputError(
            f"{name} failed when it was asked for trial {number} ({type(error).__name__}: {first_line(error)}); mend "
            "the sampler, and the same command goes on."
        ) from error


def _sampler(study: Study, seed: int, history: list[FrozenTrial]) -> optuna.samplers.BaseSampler:
    """The study's sampler, made anew. TPE takes the best tenth of the trials for good, but none that diverged."""
    sampler = _checked(study.sampler.build(study, seed), study.sampler.name)
    if isinstance(sampler, optuna.samplers.TPESampler):
        ended = [trial for trial in history if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        sound = len(ended) - sum(map(has_diverged, ended))
        sampler._gamma = lambda count: min(default_gamma(count), sound)
    return sampler
