"""Ask a sampler for a configuration, given a history of trials.

Several workers ask at different times, so every suggestion has its own history: the trials with a lower
number that had ended, and the parameters of those that were running. Their numbers are stored with the trial, so
that the suggestion can be repeated (`harness.search.replay`). With one worker, all lower numbers are in the history.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
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
from harness.store.records import has_diverged


class ShownStudy(optuna.Study):
    """A study with given trials."""

    shown: list[FrozenTrial]

    @classmethod
    def of(cls, study: optuna.Study, trials: list[FrozenTrial], **changes: object) -> ShownStudy:
        """Copy `study`, with other trials and the attributes in `changes`."""
        made = cls.__new__(cls)
        made.__setstate__({key: value for key, value in study.__dict__.items() if key != "_thread_local"} | changes)
        made.shown = trials
        return made

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self.shown if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


class _Storage:
    """A storage without samplers' system attributes: a suggestion depends on its history alone.

    Optuna's genetic algorithms store the parents of a generation; they find the same ones again in the history. Other
    samplers store parameters before they write them; a running trial is in the history once it has them all.
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
    """Suggest a trial's parameters and write them to the storage of `of`; existing ones stay.

    The sampler is built anew for every parameter, seeded from the study's seed, the trial's number and the path. It
    therefore suggests the same after a kill as without one. Its `after_trial` is not called: it finds results in the
    history, and some of Optuna's samplers would stop the study there.
    """
    if (given := study.given_params(number)) is not None:
        of._storage.set_trial_system_attr(trial_id, "fixed_params", given)
    shown = ShownStudy.of(of, history, _storage=_Storage(of._storage))
    shown.sampler = _sampler(study, derive_seed(study.seed, "ask", number), history)
    trial = optuna.Trial(shown, trial_id)
    # Optuna samples joint parameters at the first suggestion; do it now, whatever was suggested before.
    _ = trial.relative_params
    for path, dimension in study.space.items():
        # A fresh stream for each parameter: a process may die between two.
        shown.sampler = _sampler(study, derive_seed(study.seed, "ask", number, path), history)
        _suggest(trial, path, dimension)
    return dict(trial.params)


def _suggest(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    """Have the study's sampler suggest a value of a dimension."""
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(path, dimension.labels)
    if isinstance(dimension, Int):
        return trial.suggest_int(path, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_float(path, dimension.low, dimension.high, log=dimension.log)


def _checked(sampler: optuna.samplers.BaseSampler, name: str) -> optuna.samplers.BaseSampler:
    """Check a sampler's suggestions; Optuna does this only for jointly sampled ones.

    Its errors and invalid suggestions become InputError; Optuna's and the database's own errors do not.
    """
    independent, relative = sampler.sample_independent, sampler.sample_relative

    def sample_independent(of: optuna.Study, trial: FrozenTrial, path: str, distribution: BaseDistribution) -> Any:
        value = _answer(name, trial.number, independent, of, trial, path, distribution)
        try:
            fits = distribution._contains(distribution.to_internal_repr(value))
        except (ValueError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"{name} suggests {value!r} for {path}, which is outside of {distribution}; fix it.")
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
            f"{name} failed when asked for trial {number} ({type(error).__name__}: {first_line(error)}); fix "
            "the sampler and run the same command again."
        ) from error


def _sampler(study: Study, seed: int, history: list[FrozenTrial]) -> optuna.samplers.BaseSampler:
    """Build the study's sampler. TPE counts the best tenth of the trials as good, but none that diverged."""
    sampler = _checked(study.sampler.build(study, seed), study.sampler.name)
    if isinstance(sampler, optuna.samplers.TPESampler):
        ended = [trial for trial in history if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        sound = len(ended) - sum(map(has_diverged, ended))
        sampler._gamma = lambda count: min(default_gamma(count), sound)
    return sampler
