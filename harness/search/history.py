"""An Optuna study with given trials, for samplers and pruners."""

from __future__ import annotations

import copy
from collections.abc import Container

import optuna
from optuna.trial import FrozenTrial, TrialState


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
