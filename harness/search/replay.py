"""The `replay` command: ask the sampler again for every suggestion of a study, each with its own history.

This works for parallel searches too: each trial stores the history of its suggestion (`harness.search.suggest`), and
sampler, seed and history give the same parameters again. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.base.environment import versions
from harness.base.errors import InputError
from harness.config.find import run_command
from harness.config.study import Study
from harness.store.database import outlast
from harness.store.records import Snapshot
from harness.store.store import Store

RELEVANT = ("python", "optuna", "torch")  # of the stored versions; Optuna's Gaussian process uses torch


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A trial's suggestion as stored, and as the sampler gives it now."""

    number: int
    stored: dict[str, Any]
    asked: dict[str, Any]

    @property
    def same(self) -> bool:
        return self.stored == self.asked

    def line(self) -> str:
        stored = {path: self.stored.get(path, "missing") for path in self.asked}
        differing = [path for path in self.asked if stored[path] != self.asked[path]]
        parts = [f"{path} is {stored[path]}, replayed {self.asked[path]}" for path in differing]
        return f"trial {self.number}: {'; '.join(parts)}"


def replay(study: Study, trials: Sequence[FrozenTrial], after: Mapping[str, Any] | None = None) -> Iterator[Replayed]:
    """Ask for all trials again, by number. For trials neither complete nor pruned, compare the existing parameters.

    `trials` are all of the study's, `after` is its attribute with those of an earlier one. If a process died while it
    asked, its trial has a part of its parameters until a worker resumes it, or failed with that part.
    """
    memory = optuna.create_study(direction="maximize", pruner=study.pruner.of(study))
    memory.set_user_attr("after", after)
    for trial in sorted(trials, key=lambda each: each.number):
        trial_id = memory._storage.create_new_trial(memory._study_id, _as_new(trial))
        whole = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if not (whole or trial.params):
            continue
        history = Snapshot.of(trial).history(trials, trial.number)
        asked = study.sampler.ask(study, memory, trial_id, trial.number, history)
        expected = {path: value for path, value in asked.items() if whole or path in trial.params}
        yield Replayed(number=trial.number, stored=dict(trial.params), asked=expected)


def _as_new(trial: FrozenTrial) -> FrozenTrial:
    """Return the trial as it was before the suggestion; a study's first trial has fixed parameters."""
    given = {key: value for key, value in trial.system_attrs.items() if key == "fixed_params"}
    return optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=given)


def replay_study(study: Study, store: Store) -> bool:
    """Print each suggestion that differs, and a conclusion; return whether none does.

    Raises InputError if there are no suggestions yet.
    """
    asked, differing = 0, []
    trials = outlast(store.url, lambda: store.optuna_study.get_trials(deepcopy=False))
    for each in replay(study, trials, store.facts().after):
        asked += 1
        if not each.same:
            differing.append(each.number)
            print(each.line(), flush=True)
    if not asked:
        raise InputError(f"Study {study.name!r} has no trials yet; run it with '{run_command(study.name)}'.")
    print(_conclusion(asked, differing, store.facts().versions))
    return not differing


def _conclusion(asked: int, differing: Sequence[int], known: dict[str, str] | None) -> str:
    if not differing:
        return f"All {asked} suggestions are the same when replayed." if asked > 1 else "The suggestion is the same."
    text = f"{len(differing)} of {asked} suggestions differ"
    if len(differing) > 1:
        text += f", first that of trial {differing[0]}; later ones may depend on it"
    here = versions()
    other = [f"{name} was {known[name]}, is {here[name]}" for name in RELEVANT if known and known[name] != here[name]]
    return f"{text}. The study ran with other versions ({', '.join(other)}); samplers change." if other else f"{text}."
