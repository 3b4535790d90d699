"""Asking again for every suggestion of a study, each with the history that it had seen.

A parallel search is no worse understood than a serial one: what was known at each question is kept with the trial
(`harness.search.suggest`), and sampler, seed and history give the same parameters again. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.base.environment import versions
from harness.base.errors import InputError
from harness.config.study import Study
from harness.search import suggest
from harness.store.database import outlast
from harness.store.records import Snapshot
from harness.store.store import Store

RELEVANT = ("python", "optuna", "torch")  # of the versions that a study keeps; Optuna's Gaussian process uses torch


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A trial's suggestion as it is stored, and as the sampler gives it today."""

    number: int
    stored: dict[str, Any]
    asked: dict[str, Any]

    @property
    def same(self) -> bool:
        return self.stored == self.asked

    def line(self) -> str:
        stored = {path: self.stored.get(path, "missing") for path in self.asked}
        differing = [path for path in self.asked if stored[path] != self.asked[path]]
        parts = [f"{path} is {stored[path]}, asked again {self.asked[path]}" for path in differing]
        return f"trial {self.number}: {'; '.join(parts)}"


def replay(study: Study, trials: Sequence[FrozenTrial]) -> Iterator[Replayed]:
    """Ask for all trials again, by number. Of one that is not complete or pruned, what it has is compared.

    `trials` are all of the study's. A process may have died while it asked, and the trial has a part of its parameters
    until it is taken up, or was told as failed with that part.
    """
    memory = optuna.create_study(direction="maximize", pruner=study.pruner.of(study))
    for trial in sorted(trials, key=lambda each: each.number):
        trial_id = memory._storage.create_new_trial(memory._study_id, _as_new(trial))
        whole = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if not (whole or trial.params):
            continue
        history = Snapshot.of(trial).history(trials, trial.number)
        asked = suggest.ask(study, memory, trial_id, trial.number, history)
        expected = {path: value for path, value in asked.items() if whole or path in trial.params}
        yield Replayed(number=trial.number, stored=dict(trial.params), asked=expected)


def _as_new(trial: FrozenTrial) -> FrozenTrial:
    """The trial as it was before the question; the first of a study is given its parameters beforehand."""
    given = {key: value for key, value in trial.system_attrs.items() if key == "fixed_params"}
    return optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=given)


def replay_study(study: Study, store: Store) -> bool:
    """Print each suggestion that differs, and a closing sentence; whether none does.

    Raises InputError when nothing has been asked for yet.
    """
    asked, differing = 0, []
    for each in replay(study, outlast(store.url, lambda: store.optuna_study.get_trials(deepcopy=False))):
        asked += 1
        if not each.same:
            differing.append(each.number)
            print(each.line(), flush=True)
    if not asked:
        run = f"python run_study.py --study {study.name}"
        raise InputError(f"Study {study.name!r} has no trials yet; run it with '{run}'.")
    print(_conclusion(asked, differing, store.facts().versions))
    return not differing


def _conclusion(asked: int, differing: Sequence[int], known: dict[str, str] | None) -> str:
    if not differing:
        return f"All {asked} suggestions are asked again and the same." if asked > 1 else "The suggestion is the same."
    text = f"{len(differing)} of {asked} suggestions differ"
    if len(differing) > 1:
        text += f", the first is trial {differing[0]}'s; what was asked later may have seen it"
    here = versions()
    other = [f"{name} was {known[name]}, is {here[name]}" for name in RELEVANT if known and known[name] != here[name]]
    return (
        f"{text}. The study ran with other versions ({', '.join(other)}), and samplers change." if other else f"{text}."
    )
