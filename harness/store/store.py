"""A study's Optuna storage, the source of truth: ask for trials, report, tell, with one or more workers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from harness.base.errors import InputError
from harness.base.keys import trial_key
from harness.base.processes import in_words
from harness.config.events import Completed, Diverged, EpochResult, Failed, Pruned, TrialOutcome
from harness.config.study import Study
from harness.store import leases, ledger, queue
from harness.store.leases import LeaseLost, Leases
from harness.store.ledger import Line
from harness.store.locks import OpenedFile
from harness.store.queue import NoTrialFree as NoTrialFree
from harness.store.records import BY_HAND, SKIP, Snapshot, record_of
from harness.store.records import TrialRecord as TrialRecord
from harness.store.view import StudyView, outlasting

FINAL = "final"  # the lease key of the final run
SET_ATTRIBUTE = sqlalchemy.text(
    "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, :key, :value) "
    "ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json"
)
# Optuna is told that a diverged trial is pruned: its samplers ignore failures and would try the region again.
TOLD_AS = {
    Completed: TrialState.COMPLETE,
    Failed: TrialState.FAIL,
    Pruned: TrialState.PRUNED,
    Diverged: TrialState.PRUNED,
}
POLL_SECONDS = 0.5  # between two attempts to claim a key
# Between two looks for a skipped trial, by the kind of database: a server has many workers.
LOOK_SECONDS = {"sqlite": 1.0, "postgresql": 10.0}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial to evaluate: new, or abandoned by a dead process."""

    number: int
    params: dict[str, Any]
    resumed: bool


class Store(StudyView):
    """One study in an Optuna storage, made by `open_store` (to run) or `read_store` (read-only)."""

    def __init__(
        self,
        url: str,
        optuna_study: optuna.Study,
        as_of_now: bool = False,
        engine: sqlalchemy.Engine | None = None,
        leases: Leases | None = None,
        file: OpenedFile | None = None,
    ) -> None:
        """Without `leases`, no other process may work on the study. `engine` finds workers; `file` is checked."""
        super().__init__(url, optuna_study, as_of_now)
        self._engine = engine
        self._leases = leases
        self._file = file
        self._leads = False
        self._looked = 0.0  # time of the last look for a skipped trial
        self._curves: dict[int, dict[int, float]] = {}  # of this process's trials: stored accuracy by epoch

    # -- several processes ----------------------------------------------------------------------------------------

    @property
    def leases(self) -> Leases:
        """The leases of this process; a read-only store has none."""
        assert self._leases is not None
        return self._leases

    def of(self, owner: str) -> Store:
        """Return this study for a remote process that works through this one, with its own leases."""
        return Store(self.url, self._study, engine=self._engine, leases=self.leases.of(owner))

    @outlasting
    def active_workers(self) -> dict[str, str]:
        """Return the leases of other processes: the owner (machine, process) by trial, "final" or command."""
        if self._leases is not None:
            return self._leases.others()
        return {} if self._engine is None else leases.holders(self._engine, self.uid)

    @contextlib.contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """Hold a key; wait while another process holds it."""
        while not self._claim(key):
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self._release(key)

    @outlasting
    def _claim(self, key: str) -> bool:
        return self._leases is None or self._leases.claim(key)

    @outlasting
    def _release(self, key: str) -> None:
        if self._leases is not None:
            self._leases.release(key)

    def lead(self) -> bool:
        """Claim the final run, until the store is closed; return whether this process leads it."""
        self._leads = self._claim(FINAL)
        return self._leads

    def follow(self) -> None:
        """Release the final run."""
        self._leads = False
        self._release(FINAL)

    @outlasting
    def check_lead(self) -> None:
        """Raise LeaseLost if this process led the final run, and another one has taken it over."""
        if self._leases is not None and self._leads:
            self._leases.confirm(FINAL)

    def leader(self) -> str | None:
        """Return the name of the other process that leads the final run; None if there is none."""
        owner = self.active_workers().get(FINAL)
        return None if owner is None else f"process {in_words(owner)}"

    def check_file(self) -> None:
        """Raise Halt if the study's file was deleted, replaced or moved while this process runs it."""
        if self._file is not None:
            self._file.check()

    # -- writing ------------------------------------------------------------------------------------------------

    @outlasting
    def set_attribute(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)
        self._attributes = None

    @outlasting
    def set_as_leader(self, values: Mapping[str, Any]) -> None:
        """Write attributes of the study in one transaction.

        Raises LeaseLost, with nothing written, if this process led and another one does now. In memory, without other
        processes, they are written one after the other.
        """
        if self._engine is None:
            for name, value in values.items():
                self._study.set_user_attr(name, value)
        else:
            with self._engine.begin() as connection:
                if self._leads:
                    self.leases.confirm(FINAL, connection)  # first: it blocks other leaders until the commit
                rows = [
                    {"study": self._study._study_id, "key": name, "value": json.dumps(value)}
                    for name, value in values.items()
                ]
                connection.execute(SET_ATTRIBUTE, rows)
        self._attributes = None

    def extended_ledger(self, entry: Line) -> list[Line]:
        """Return the ledger with one more line, not written yet. Raises InputError if a line was changed."""
        return ledger.appended(self.ledger(), self.uid, entry)

    def add_to_ledger(self, entry: Line) -> None:
        """Append a line, as the leader."""
        self.set_as_leader({"ledger": self.extended_ledger(entry)})

    @outlasting
    def ask(self, study: Study, at_most: int | None = None) -> Asked:
        """Return the next trial to evaluate: an interrupted one with its number and parameters, else a new one.

        This process holds its lease until `tell`. Raises NoTrialFree if trials, also of other workers, make `at_most`.
        """

        def most() -> int | None:
            limits = study.limits()
            return self.facts().limited(at_most, limits) if at_most and any(limits.values()) else at_most

        number, resumed = queue.take(study, self._study, self._engine, self._leases, most)
        trials = self._study.get_trials(deepcopy=False)
        taken = trials[number]
        try:
            if "seen" in taken.user_attrs:
                seen = Snapshot.of(taken)
            elif (seen := Snapshot.now(trials, taken.number, study.space)).open:  # stored before the first parameter
                self._check(taken.number)
                self._study._storage.set_trial_user_attr(taken._trial_id, "seen", dataclasses.asdict(seen))
            history = seen.history(trials, taken.number)
            params = study.sampler.ask(study, self._study, taken._trial_id, taken.number, history)
        except (LeaseLost, UpdateFinishedTrialError) as error:  # this process stalled, and another one took over
            raise NoTrialFree from error
        self._curves[taken.number] = dict(taken.intermediate_values)
        return Asked(number=taken.number, params=params, resumed=resumed)

    @outlasting
    def queue(self, params: Mapping[str, Any]) -> int:
        """Queue a configuration for the next worker that asks; return its number. Raises InputError if it is known."""
        with contextlib.nullcontext() if self._leases is None else self._leases.exclusive():
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if dict(params) in (trial.params, trial.system_attrs.get("fixed_params")):
                    raise InputError(f"Trial {trial.number} has this configuration already; try another.")
            self._study.enqueue_trial(dict(params), user_attrs={BY_HAND: True})
            return self._study.get_trials(deepcopy=False)[-1].number

    @outlasting
    def skip(self, number: int) -> None:
        """Ask the worker of a trial to end it. Raises InputError unless the trial is unfinished."""
        trial = next((each for each in self._study.get_trials(deepcopy=False) if each.number == number), None)
        if trial is None or trial.state is TrialState.WAITING:
            raise InputError(f"There is no trial {number} yet; `report` lists the trials.")
        if trial.state.is_finished():
            raise InputError(
                f"Trial {number} has ended ({record_of(trial).state}); only an unfinished one can be skipped."
            )
        try:
            self._study._storage.set_trial_user_attr(trial._trial_id, SKIP, True)
        except UpdateFinishedTrialError as error:
            raise InputError(f"Trial {number} has just ended.") from error

    @outlasting
    def is_skipped(self, asked: Asked) -> bool:
        """Return whether the user has asked to end this trial; reads the database every LOOK_SECONDS."""
        kind = "sqlite" if self._engine is None else self._engine.dialect.name
        if time.monotonic() - self._looked < LOOK_SECONDS[kind]:
            return False
        self._looked = time.monotonic()
        return SKIP in self._study._storage.get_trial(self._id(asked)).user_attrs

    @outlasting
    def spend(self, asked: Asked, seconds: float) -> None:
        """Record the time of an unfinished trial so far."""
        with self._ending(asked):
            self._study._storage.set_trial_user_attr(self._id(asked), "seconds", seconds)

    @outlasting
    def stop(self, limits: Mapping[str, Any], reason: str) -> int:
        """Record that the search needs no more trials than there are, running ones included; return their number."""
        with contextlib.nullcontext() if self._leases is None else self._leases.exclusive():
            trials = sum(each.state is not TrialState.WAITING for each in self._study.get_trials(deepcopy=False))
            self.set_attribute("stopped", {"trials": trials, "reason": reason, "limits": dict(limits)})
            return trials

    @outlasting
    def check(self, asked: Asked) -> None:
        """Raise LeaseLost if another process has taken over this trial."""
        self._check(asked.number)

    def _check(self, number: int) -> None:
        if self._leases is not None:
            self._leases.check(trial_key(number))

    @contextlib.contextmanager
    def _ending(self, asked: Asked) -> Iterator[None]:
        """Raise LeaseLost if another process has ended the trial.

        If this process has, the database's answer was lost and `tell` is repeated.
        """
        try:
            yield
        except UpdateFinishedTrialError as error:
            if self._leases is None:
                raise LeaseLost(trial_key(asked.number)) from error
            self._leases.confirm(trial_key(asked.number))

    def _id(self, asked: Asked) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, asked.number)

    @outlasting
    def report(self, asked: Asked, epoch: int, value: float) -> None:
        """Record the validation accuracy after an epoch.

        A repeated epoch with another result replaces the old one, so that the trial's curve, epochs and value agree.
        It is named on stderr: the trial resumed where the same steps give other bits.
        """
        self.check(asked)
        curve = self._curves[asked.number]
        known = curve.get(epoch)
        if known == value:
            return
        if known is not None:
            text = f"Trial {asked.number} gives {value:.4f} in the repeated epoch {epoch}, not {known:.4f} as before"
            print(f"{text}; it now differs from the uninterrupted trial.", file=sys.stderr)
        with self._ending(asked):
            self._study._storage.set_trial_intermediate_value(self._id(asked), epoch, value)
        curve[epoch] = value

    @outlasting
    def should_prune(self, asked: Asked, epoch: int) -> bool:
        """Return whether to prune after `epoch`; not the base, nor at an epoch that an earlier process passed."""
        pruner = self._study.pruner
        # A pruner with rungs is asked at its rungs only: asking reads all trials.
        here = getattr(pruner, "rung", lambda _: not isinstance(pruner, optuna.pruners.NopPruner))
        if asked.number == 0 or epoch != max(self._curves[asked.number], default=None) or not here(epoch):
            return False
        return pruner.prune(self._study, self._study._storage.get_trial(self._id(asked)))

    @outlasting
    def tell(
        self,
        asked: Asked,
        outcome: TrialOutcome,
        epochs: Sequence[EpochResult],
        seconds: float,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """End a trial. Its attributes are written before its state, so a finished trial is always complete.

        `environments` are those that it was trained in, in order (`harness.base.environment`).
        """
        self.check(asked)
        # The final run's statistics need the correct images of the last epoch only.
        kept = [*(each.without_hits() for each in epochs[:-1]), *epochs[-1:]]
        described = dataclasses.asdict(outcome) | {"state": outcome.state}
        if isinstance(outcome, Diverged):
            described["reason"] = outcome.reason
        attributes = {
            "epochs": [result.to_dict() for result in kept],
            "seconds": seconds,
            "environments": [dict(each) for each in environments],
            "outcome": described,
        }
        with self._ending(asked):
            for name, value in attributes.items():
                self._study._storage.set_trial_user_attr(self._id(asked), name, value)
            reached = outcome.value if isinstance(outcome, Completed) else None
            self._study.tell(asked.number, reached, TOLD_AS[type(outcome)])
        if self._leases is not None:
            self._leases.release(trial_key(asked.number))


def wanted(study: Study, store: StudyView) -> int:
    """Return the requested number of finished trials: the maximum over the commands that run the study.

    It is smaller if one of the study's limits has stopped the search.
    """
    facts = store.facts()
    return facts.limited(max(study.trials, facts.wanted), study.limits())
