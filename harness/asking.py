"""What a sampler is shown when it is asked for a configuration, and asking it.

Several workers ask at different moments, so every question comes with what was known then: the trials with a lower
number that had ended, and the parameters of those that were running. Which ones that were is kept with the trial, and
the same question can be put again (`harness.replay`). A study with one worker has seen all lower numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import OptunaError
from optuna.samplers._tpe.sampler import default_gamma
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from harness.errors import InputError, first_line
from harness.history import ShownStudy
from harness.search import suggest
from harness.seeds import derive_seed

if TYPE_CHECKING:
    from harness.config import Study

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Seen:
    """What was not known of the lower numbers: `open` had not ended, and of those `running` had their parameters."""

    open: tuple[int, ...] = ()
    running: tuple[int, ...] = ()

    @staticmethod
    def now(trials: Sequence[FrozenTrial], number: int, space: Iterable[str]) -> Seen:
        """What can be known at this moment to trial `number`."""
        lower = [trial for trial in trials if trial.number < number and trial.state not in FINISHED]
        running = [trial.number for trial in lower if all(path in trial.params for path in space)]
        return Seen(tuple(trial.number for trial in lower), tuple(running))

    @staticmethod
    def of(trial: FrozenTrial) -> Seen:
        """What is kept with a trial; nothing is, if all lower numbers had ended."""
        kept = trial.user_attrs.get("seen")
        return Seen() if kept is None else Seen.from_dict(kept)

    def history(self, trials: Sequence[FrozenTrial], number: int) -> list[FrozenTrial]:
        """The trials as they were known to trial `number`; of running and diverged ones the parameters alone."""
        known = [
            _without_values(trial) if has_diverged(trial) else trial
            for trial in trials
            if trial.number < number and trial.number not in self.open
        ]
        running = [_without_values(trial, TrialState.RUNNING) for trial in trials if trial.number in self.running]
        return sorted(known + running, key=lambda trial: trial.number)

    def to_dict(self) -> dict[str, list[int]]:
        return {"open": list(self.open), "running": list(self.running)}

    @staticmethod
    def from_dict(record: dict[str, list[int]]) -> Seen:
        return Seen(tuple(record["open"]), tuple(record["running"]))


def has_diverged(trial: FrozenTrial) -> bool:
    """Whether a trial, which is told as pruned, ended with a loss or gradient that was no number."""
    return trial.state is TrialState.PRUNED and trial.user_attrs.get("outcome", {}).get("state") == "diverged"


def _without_values(trial: FrozenTrial, state: TrialState = TrialState.PRUNED) -> FrozenTrial:
    """A trial of which the parameters alone are shown; TPE puts a pruned one without values behind all others."""
    return FrozenTrial(
        number=trial.number,
        state=state,
        value=None,
        datetime_start=trial.datetime_start,
        datetime_complete=None if state is TrialState.RUNNING else trial.datetime_complete,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={} if state is TrialState.RUNNING else trial.user_attrs,
        system_attrs={},
        intermediate_values={},
        trial_id=trial._trial_id,
    )


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
        suggest(trial, path, dimension)
    return dict(trial.params)


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
        found: dict[str, Any] = _answer(name, trial.number, relative, of, trial, space)
        return found

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
