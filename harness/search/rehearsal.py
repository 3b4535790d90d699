"""Run a study's sampler and pruner in memory, before any training.

Optuna checks some arguments only when it uses them: n_startup_trials="x" fails at the first suggestion, others
after the random trials. A resumed study also builds a new sampler, which has to suggest the same as the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.base.errors import InputError
from harness.config.space import Choice, Dimension, Float
from harness.config.study import PrunerLike, SamplerLike, Study
from harness.search import suggest
from harness.search.suggest import ShownStudy

DRAWN = 10  # trials that Optuna's samplers draw at random
MOST = 64  # a sampler with more random trials is not rehearsed beyond them
EPOCHS = 3
FEW = 4  # trials, or configurations: too few for a conclusion
MANY = 1000  # configurations, among which none should repeat


def rehearse(study: Study) -> None:
    """Ask for each trial twice and call the pruner, as the study will.

    Raises InputError if the sampler or the pruner fails, or the sampler is not deterministic or
    repeats itself.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _blaming(study.pruner):
        pruner = study.pruner.of(study)
    options = dict(getattr(study.sampler, "options", ()))
    drawn = [value for value in options.values() if isinstance(value, int) and value <= MOST]
    trials: list[FrozenTrial] = []
    for number in range(min(study.trials, max([DRAWN, *drawn]) + 2)):
        with _blaming(study.sampler):
            trial, again = (_asked(study, pruner, number, trials) for _ in range(2))
        if trial.params != again.params:
            raise InputError(
                f"{study.sampler.name} is not deterministic (trial {number}: "
                f"{trial.params}, then {again.params}), so a study could not be resumed; make it depend "
                "only on its seed and the trials that it gets."
            )
        with _blaming(study.pruner):
            _judge(pruner, trial, trials)
        trials.append(trial)
    _check_repetition(study, trials[1:])


def _check_repetition(study: Study, trials: list[FrozenTrial]) -> None:
    """Raise InputError if a sampler repeats itself, because it keeps its state outside the trials.

    `trials` are those after the base. In a space with few configurations, some may repeat.
    """
    different = {tuple(trial.params.items()) for trial in trials}
    size = math.prod(map(_values, study.space.values()))
    if len(trials) >= FEW and size > FEW and len(different) <= (len(trials) / 2 if size > MANY else 1):
        raise InputError(
            f"{study.sampler.name} suggests {len(different)} different "
            f"configuration{'s' if len(different) > 1 else ''} for {len(trials)} trials: it keeps its state "
            "where a resumed study cannot read it; use tpe(), gp(), or grid() for a list of points."
        )


def _values(dimension: Dimension) -> float:
    """The number of values."""
    if isinstance(dimension, Float):
        return math.inf
    return len(dimension.options) if isinstance(dimension, Choice) else dimension.high - dimension.low + 1


def _asked(study: Study, pruner: optuna.pruners.BasePruner, number: int, trials: list[FrozenTrial]) -> FrozenTrial:
    """Return a running trial with its parameters, in its own storage."""
    memory = optuna.create_study(direction="maximize", pruner=pruner)
    for _ in range(number + 1):  # so that the last one has this number
        trial_id = memory._storage.create_new_trial(memory._study_id)
    suggest.ask(study, memory, trial_id, number, trials)
    asked = memory._storage.get_trial(trial_id)
    asked.number = asked._trial_id = number
    return asked


def _judge(pruner: optuna.pruners.BasePruner, trial: FrozenTrial, others: list[FrozenTrial]) -> None:
    """Report values to the pruner, then end the trial as complete in any case."""
    shown = ShownStudy.of(optuna.create_study(direction="maximize", pruner=pruner), [*others, trial])
    for epoch in range(1, EPOCHS + 1):
        trial.intermediate_values[epoch] = 1 / (trial.number + epoch)
        pruner.prune(shown, trial)
    trial.state, trial.value = TrialState.COMPLETE, 1 / (trial.number + 1)
    trial.datetime_complete = trial.datetime_start


@contextmanager
def _blaming(part: SamplerLike | PrunerLike) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        options = ", ".join(f"{name}={value!r}" for name, value in getattr(part, "options", ()))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{part.name}({options}) fails on this study ({reason}); correct its arguments.") from error
