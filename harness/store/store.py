"""A study's Optuna storage: asking for trials, telling how they end, alone or with others. It is the truth."""

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

from harness.base.keys import trial_key
from harness.base.processes import in_words
from harness.config.events import Completed, Diverged, EpochResult, Failed, Pruned, TrialOutcome
from harness.config.study import Study
from harness.store import leases, ledger, queue
from harness.store.leases import LeaseLost, Leases
from harness.store.ledger import Line
from harness.store.locks import OpenedFile
from harness.store.queue import NoTrialFree as NoTrialFree
from harness.store.records import Snapshot
from harness.store.records import TrialRecord as TrialRecord
from harness.store.view import StudyView, outlasting

FINAL = "final"  # the key of what comes after the search
SET_ATTRIBUTE = sqlalchemy.text(
    "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, :key, :value) "
    "ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json"
)
# A diverged trial is told as pruned: Optuna's samplers ignore failures and would try its region again.
TOLD_AS = {
    Completed: TrialState.COMPLETE,
    Failed: TrialState.FAIL,
    Pruned: TrialState.PRUNED,
    Diverged: TrialState.PRUNED,
}
POLL_SECONDS = 0.5  # between two looks at what other processes are at


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial that is to be evaluated: new, or left behind by a process that died."""

    number: int
    params: dict[str, Any]
    resumed: bool


class Store(StudyView):
    """One study in an Optuna storage, to work on. Made by `open_store` (to run) or `read_store` (to look)."""

    def __init__(
        self,
        url: str,
        optuna_study: optuna.Study,
        as_of_now: bool = False,
        engine: sqlalchemy.Engine | None = None,
        leases: Leases | None = None,
        file: OpenedFile | None = None,
    ) -> None:
        """Without `leases` nobody else may work on the study; `engine` tells who does. `file` is looked after."""
        super().__init__(url, optuna_study, as_of_now)
        self._engine = engine
        self._leases = leases
        self._file = file
        self._leads = False
        self._curves: dict[int, dict[int, float]] = {}  # of the trials asked for: accuracy by epoch, as it is stored

    # -- several processes ----------------------------------------------------------------------------------------

    @property
    def leases(self) -> Leases:
        """What this process holds of the study; a store that is only looked at has none."""
        assert self._leases is not None
        return self._leases

    def of(self, owner: str) -> Store:
        """This study as a process elsewhere works on it through this one, with leases of its own."""
        return Store(self.url, self._study, engine=self._engine, leases=self.leases.of(owner))

    @outlasting
    def active_workers(self) -> dict[str, str]:
        """What other processes are at now: the owner (machine, process) by trial, or "final"."""
        if self._leases is not None:
            return self._leases.others()
        return {} if self._engine is None else leases.holders(self._engine, self.uid)

    @contextlib.contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """One process at a time; waits for another one that is inside."""
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
        """Whether what comes after the search is this process's to do; it stays so until the store is closed."""
        self._leads = self._claim(FINAL)
        return self._leads

    def follow(self) -> None:
        """Leave what comes after the search to others again."""
        self._leads = False
        self._release(FINAL)

    @outlasting
    def check_lead(self) -> None:
        """Raise LeaseLost when this process led, and another one does now, for this one was thought dead."""
        if self._leases is not None and self._leads:
            self._leases.confirm(FINAL)

    def leader(self) -> str | None:
        """Which other process does what comes after the search, for people to read; None when none does."""
        owner = self.active_workers().get(FINAL)
        return None if owner is None else f"process {in_words(owner)}"

    def check_file(self) -> None:
        """Raise Halt when the study's file was deleted, replaced or moved while this process runs it."""
        if self._file is not None:
            self._file.check()

    # -- writing ------------------------------------------------------------------------------------------------

    @outlasting
    def set_attribute(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)
        self._attributes = None

    @outlasting
    def set_as_leader(self, values: Mapping[str, Any]) -> None:
        """Write attributes of the study, all of them or none.

        Raises LeaseLost, with nothing written, when this process led, and another one does now. In memory, where no
        other process is, they are written one after the other.
        """
        if self._engine is None:
            for name, value in values.items():
                self._study.set_user_attr(name, value)
        else:
            with self._engine.begin() as connection:
                if self._leads:
                    self.leases.confirm(FINAL, connection)  # first: from here on nobody else writes or leads
                rows = [
                    {"study": self._study._study_id, "key": name, "value": json.dumps(value)}
                    for name, value in values.items()
                ]
                connection.execute(SET_ATTRIBUTE, rows)
        self._attributes = None

    def extended_ledger(self, entry: Line) -> list[Line]:
        """The ledger with one more line, not written yet. Raises InputError when a line is not as it was written."""
        return ledger.appended(self.ledger(), self.uid, entry)

    def add_to_ledger(self, entry: Line) -> None:
        """Write a line, as the leader."""
        self.set_as_leader({"ledger": self.extended_ledger(entry)})

    @outlasting
    def ask(self, study: Study, at_most: int | None = None) -> Asked:
        """The next trial to evaluate: an interrupted one first, under its own number and parameters, else a new one.

        It is this process's until it is told, or the process is thought dead. Raises NoTrialFree when those that have
        ended and those that other workers are at make `at_most`.
        """
        number, resumed = queue.take(study, self._study, self._engine, self._leases, at_most)
        trials = self._study.get_trials(deepcopy=False)
        taken = trials[number]
        try:
            if "seen" in taken.user_attrs:
                seen = Snapshot.of(taken)
            elif (seen := Snapshot.now(trials, taken.number, study.space)).open:  # kept before the first parameter is
                self._check(taken.number)
                self._study._storage.set_trial_user_attr(taken._trial_id, "seen", dataclasses.asdict(seen))
            history = seen.history(trials, taken.number)
            params = study.sampler.ask(study, self._study, taken._trial_id, taken.number, history)
        except (LeaseLost, UpdateFinishedTrialError) as error:  # this process stood still, and another one went on
            raise NoTrialFree from error
        self._curves[taken.number] = dict(taken.intermediate_values)
        return Asked(number=taken.number, params=params, resumed=resumed)

    @outlasting
    def check(self, asked: Asked) -> None:
        """Raise LeaseLost when another process has taken up this trial, for this one was thought dead."""
        self._check(asked.number)

    def _check(self, number: int) -> None:
        if self._leases is not None:
            self._leases.check(trial_key(number))

    @contextlib.contextmanager
    def _ending(self, asked: Asked) -> Iterator[None]:
        """Raise LeaseLost when a trial has ended by another process.

        By this one it has when it is told again, for the database's answer was lost.
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

        An epoch that is redone with another result replaces the one before, so that the trial's curve, epochs and value
        agree, and is named on stderr: the trial went on where the same steps give other bits.
        """
        self.check(asked)
        curve = self._curves[asked.number]
        known = curve.get(epoch)
        if known == value:
            return
        if known is not None:
            text = f"Trial {asked.number} gives {value:.4f} in the redone epoch {epoch}, not {known:.4f} as before"
            print(f"{text}; from here on it is not the uninterrupted trial.", file=sys.stderr)
        with self._ending(asked):
            self._study._storage.set_trial_intermediate_value(self._id(asked), epoch, value)
        curve[epoch] = value

    @outlasting
    def should_prune(self, asked: Asked, epoch: int) -> bool:
        """The pruner's verdict after `epoch`; an epoch that an earlier process went beyond was judged then."""
        pruner = self._study.pruner
        # At the rungs of one that names them alone: who asks it reads all trials.
        here = getattr(pruner, "rung", lambda _: not isinstance(pruner, optuna.pruners.NopPruner))
        if epoch != max(self._curves[asked.number], default=None) or not here(epoch):
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
        """End a trial. What belongs to it is written before its state, so a finished trial is always whole.

        `environments` are those that it was trained in, one after the other (`harness.base.environment`).
        """
        self.check(asked)
        # Which images the last epoch has right says what choosing among trials is worth; of the others nobody asks it.
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


def wanted(study: Study, store: Store) -> int:
    """How many finished trials there should be: the most that a command asks for that works on the study."""
    return max(study.trials, store.facts().wanted)
