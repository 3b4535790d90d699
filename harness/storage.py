"""A study's Optuna storage: opening, resuming, and what counts as finished. The storage is the truth."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from harness import leases, ledger, taking
from harness.config import Study
from harness.database import Unreadable, outlast
from harness.errors import Halt, InputError
from harness.keys import trial_key
from harness.leases import LeaseLost, Leases
from harness.ledger import Line
from harness.locks import OpenedFile
from harness.processes import in_words
from harness.records import FINISHED, Seen, StudyFacts, record_of
from harness.records import TrialRecord as TrialRecord
from harness.results import Completed, Diverged, EpochResult, Failed, TrialOutcome
from harness.taking import NoTrialFree as NoTrialFree

P = ParamSpec("P")
T = TypeVar("T")
FINAL = "final"  # the key of what comes after the search
SET_ATTRIBUTE = sqlalchemy.text(
    "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, :key, :value) "
    "ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json"
)
POLL_SECONDS = 0.5  # between two looks at what other processes are at


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial that is to be evaluated: new, or left behind by a process that died."""

    number: int
    params: dict[str, Any]
    resumed: bool


def outlasting(method: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], T]:
    """A method of Store that waits while another program locks the database. Raises Halt when the database fails.

    Each of these methods may be cut off anywhere and called again, for a process may die anywhere in it.
    """

    @functools.wraps(method)
    def patient(self: Store, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return outlast(self.url, lambda: method(self, *args, **kwargs))
        except Halt:
            self.check_file()
            raise

    return patient


class Store:
    """One study in an Optuna storage. Made by `open_store` (to run) or `read_store` (to look).

    `as_of_now`: everything is read once, so that what is shown of a running study fits together.
    """

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
        self.url = url
        self._engine = engine
        self._study = optuna_study
        self._leases = leases
        self._file = file
        self._leads = False
        self._curves: dict[int, dict[int, float]] = {}  # of the trials asked for: accuracy by epoch, as it is stored
        self._as_of_now = as_of_now
        self._attributes: dict[str, Any] | None = None
        self._trials: list[FrozenTrial] | None = None

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def optuna_study(self) -> optuna.Study:
        """For Optuna's own plots and importances."""
        return self._study

    @outlasting
    def attributes(self) -> dict[str, Any]:
        """The study's user attributes. Raises InputError when one is no JSON.

        But for the ledger, whose text is then given as it is: its fault is named beside what is else known.
        """
        if self._attributes is None or not self._as_of_now:
            self._attributes = self._study.user_attrs
        for name, value in self._attributes.items():
            if isinstance(value, Unreadable) and name != "ledger":
                raise InputError(f"In {self.url}, the study's {name!r} is no JSON; take the storage from a copy.")
        return self._attributes

    @property
    def uid(self) -> str:
        """Which study this is, whatever else it keeps; empty before it has begun."""
        return self.attributes().get("uid", "")

    def facts(self) -> StudyFacts:
        """What is known of the whole study. Raises InputError when something of it is no JSON, or not whole."""
        attributes = self.attributes()
        try:
            return StudyFacts.of(attributes)
        except InputError as error:
            raise InputError(f"In {self.url}, {error}; take the storage from a copy.") from error

    def _all_trials(self) -> list[FrozenTrial]:
        if self._trials is None or not self._as_of_now:
            self._trials = self._study.get_trials(deepcopy=False)
        return self._trials

    @outlasting
    def finished(self) -> int:
        return sum(trial.state in FINISHED for trial in self._all_trials())

    @outlasting
    def trials(self) -> list[TrialRecord]:
        """All trials that have begun, by number."""
        waiting = TrialState.WAITING
        return [record_of(trial) for trial in self._all_trials() if trial.state is not waiting]

    def environment(self) -> dict[str, str] | None:
        """What the last trial that has ended was computed with (`harness.environment`)."""
        return next((trial.environments[-1] for trial in reversed(self.trials()) if trial.environments), None)

    def counts(self) -> dict[str, int]:
        """Trials by state; a diverged trial is a failed one here."""
        states = [trial.state for trial in self.trials()]
        return {
            "complete": states.count("complete"),
            "pruned": states.count("pruned"),
            "failed": states.count("failed") + states.count("diverged"),
            "running": states.count("running"),
        }

    def best(self) -> TrialRecord | None:
        """The complete trial with the highest value, the earliest of equals."""
        return next(iter(self.candidates(1)), None)

    def candidates(self, count: int) -> list[TrialRecord]:
        """The complete trials with the highest values, at most `count`, the best first, the earliest of equals."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:count]

    def chosen(self) -> TrialRecord | None:
        """The trial that the final run retrains, as `harness.rerank` or `harness.choice` chose it; before, the best.

        None before there is one, and while a second look is under way.
        """
        record = self.facts().rerank
        if record is None:
            choice = self.choice()
            return self.best() if choice is None else next(t for t in self.trials() if t.number == choice["trial"])
        candidates = self.candidates(len(record["candidates"]))
        if [trial.number for trial in candidates] != record["candidates"]:
            return None
        return next((trial for trial in candidates if trial.number == record["chosen"]), None)

    def choice(self) -> dict[str, Any] | None:
        """What `harness.choice` has chosen, and why; None before, and when trials have ended since."""
        record: dict[str, Any] | None = self.facts().choice
        return record if record is not None and record["trials"] == self.finished() else None

    def has_final(self) -> bool:
        """Whether the final result is there and belongs to the chosen trial."""
        final, chosen = self.facts().final, self.chosen()
        return final is not None and chosen is not None and final.trial == chosen.number

    def ledger(self) -> list[Line]:
        """The openings of the test set and their results. Raises InputError when a line is not as it was written."""
        if (wrong := self.ledger_fault()) is not None:
            raise InputError(f"In {self.url}, {wrong}; the test set stays closed. Take the storage from a copy.")
        return self.attributes().get("ledger") or []

    def ledger_lines(self) -> list[Line]:
        """What can be shown of the ledger, whether or not it has a fault."""
        return ledger.readable(self.attributes().get("ledger"))

    def ledger_fault(self) -> str | None:
        """What is wrong with the test ledger, in a sentence; None when nothing is."""
        final, lines = self.facts().final, self.attributes().get("ledger")
        lines = [] if lines is None else lines
        known = None if final is None else final.ledger
        fault = ledger.fault(lines, self.uid, known)
        return fault if fault is not None or final is None else ledger.difference(lines, final)

    def opened_for(self) -> int | None:
        """The trial whose test result was recorded last, by the ledger if there is one; None while none was."""
        final, found = self.facts().final, ledger.results(self.ledger_lines())
        if found:
            return int(found[-1]["trial"])
        return None if final is None else final.trial

    def needs_reason(self) -> bool:
        """Whether a test result is known of another trial than the one that is chosen now.

        An opening that was cut off before its result was recorded goes on without one.
        """
        opened, chosen = self.opened_for(), self.chosen()
        if opened is None or chosen is None or opened == chosen.number:
            return False
        lines = self.ledger_lines()
        return not lines or lines[-1]["trial"] != chosen.number

    def why_closed(self) -> str | None:
        """Why the test set stays closed, and what opens it, in a sentence; None when it need not."""
        chosen = self.chosen()
        if chosen is None or not self.needs_reason():
            return None
        return (
            f"Trial {chosen.number} is chosen by the validation images now, and the test result of trial "
            f"{self.opened_for()} is known; the test set stays closed, for a number chosen after looking is no test. "
            'To open it again all the same, add --reopen-test "why" to the command.'
        )

    def is_complete(self, study: Study) -> bool:
        """Whether nothing is missing: the trials, the final result, and their publication in MLflow."""
        enough = self.finished() >= study.trials and self.facts().published == self.finished()
        return enough and self.is_settled()

    def is_settled(self) -> bool:
        """Whether nothing comes after the search, unless somebody gives a reason to open the test set again."""
        outgrown = self.facts().choice is not None and self.choice() is None
        return self.best() is None or (not outgrown and (self.has_final() or self.needs_reason()))

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
    def at_work(self) -> dict[str, str]:
        """What other processes are at now: the owner (machine, process) by trial, or "final"."""
        if self._leases is not None:
            return self._leases.others()
        return {} if self._engine is None else leases.holders(self._engine, self.uid)

    @contextlib.contextmanager
    def alone(self, key: str) -> Iterator[None]:
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
        owner = self.at_work().get(FINAL)
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
        row, resumed = taking.take(study, self._study, self._engine, self._leases, at_most)
        trials = self._study.get_trials(deepcopy=False)
        taken = trials[row.number]
        try:
            if "seen" in taken.user_attrs:
                seen = Seen.of(taken)
            elif (seen := Seen.now(trials, taken.number, study.space)).open:  # kept before the first parameter is
                self._check(taken.number)
                self._study._storage.set_trial_user_attr(taken._trial_id, "seen", seen.to_dict())
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

        `environments` are those that it was trained in, one after the other (`harness.environment`).
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
            self._tell(asked, outcome, attributes)
        if self._leases is not None:
            self._leases.release(trial_key(asked.number))

    def _tell(self, asked: Asked, outcome: TrialOutcome, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            self._study._storage.set_trial_user_attr(self._id(asked), name, value)
        if isinstance(outcome, Completed):
            self._study.tell(asked.number, outcome.value)
        elif isinstance(outcome, Failed):
            self._study.tell(asked.number, state=TrialState.FAIL)
        else:
            # A diverged trial is told as pruned: Optuna's samplers ignore failures and would try its region again.
            self._study.tell(asked.number, state=TrialState.PRUNED)


def wanted(study: Study, store: Store) -> int:
    """How many finished trials there should be: the most that a command asks for that works on the study."""
    return max(study.trials, store.facts().wanted)
