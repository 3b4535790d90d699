"""A read-only view of a study's storage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.base.errors import Halt, InputError
from harness.config.study import Study
from harness.store import ledger
from harness.store.database import Unreadable, outlast
from harness.store.ledger import Line
from harness.store.records import StudyFacts, TrialRecord, record_of

P = ParamSpec("P")
T = TypeVar("T")
ViewT = TypeVar("ViewT", bound="StudyView")


def outlasting(method: Callable[Concatenate[ViewT, P], T]) -> Callable[Concatenate[ViewT, P], T]:
    """Make a method retry while another program locks the database, and raise Halt if the database fails.

    Each of these methods may be interrupted anywhere and called again, because a process may die anywhere in it.
    """

    @functools.wraps(method)
    def patient(self: ViewT, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return outlast(self.url, lambda: method(self, *args, **kwargs))
        except Halt:
            self.check_file()
            raise

    return patient


class StudyView:
    """One study in an Optuna storage, read-only.

    `as_of_now`: everything is read once, for a consistent view of a running study.
    """

    def __init__(self, url: str, optuna_study: optuna.Study, as_of_now: bool = False) -> None:
        self.url = url
        self._study = optuna_study
        self._as_of_now = as_of_now
        self._attributes: dict[str, Any] | None = None
        self._trials: list[FrozenTrial] | None = None

    def check_file(self) -> None:
        """Raise Halt if the database was moved or deleted."""

    @property
    def optuna_study(self) -> optuna.Study:
        """The Optuna study, for Optuna's plots and importances."""
        return self._study

    @outlasting
    def attributes(self) -> dict[str, Any]:
        """Return the study's user attributes. Raises InputError if one is not JSON.

        A ledger that is not JSON is returned as text: `ledger_fault` reports it.
        """
        if self._attributes is None or not self._as_of_now:
            self._attributes = self._study.user_attrs
        for name, value in self._attributes.items():
            if isinstance(value, Unreadable) and name != "ledger":
                raise InputError(f"In {self.url}, the study's {name!r} is not JSON; restore the storage from a backup.")
        return self._attributes

    @property
    def uid(self) -> str:
        """The study's unique id; empty before its first start."""
        return self.attributes().get("uid", "")

    def facts(self) -> StudyFacts:
        """Return the study's attributes. Raises InputError if one is not JSON, or incomplete."""
        attributes = self.attributes()
        try:
            return StudyFacts.of(attributes)
        except InputError as error:
            raise InputError(f"In {self.url}, {error}; restore the storage from a backup.") from error

    def _all_trials(self) -> list[FrozenTrial]:
        if self._trials is None or not self._as_of_now:
            self._trials = self._study.get_trials(deepcopy=False)
        return self._trials

    @outlasting
    def finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self._all_trials())

    @outlasting
    def trials(self) -> list[TrialRecord]:
        """Return all trials that have started, by number."""
        waiting = TrialState.WAITING
        return [record_of(trial) for trial in self._all_trials() if trial.state is not waiting]

    def environment(self) -> dict[str, str] | None:
        """Return the environment of the last finished trial (`harness.base.environment`)."""
        return next((trial.environments[-1] for trial in reversed(self.trials()) if trial.environments), None)

    def counts(self) -> dict[str, int]:
        """Return the number of trials by state; diverged trials count as failed."""
        named = ["failed" if trial.state == "diverged" else trial.state for trial in self.trials()]
        return {state: named.count(state) for state in ("complete", "pruned", "failed", "running")}

    def best(self) -> TrialRecord | None:
        """Return the complete trial with the highest value, the earliest of equals."""
        return next(iter(self.candidates(1)), None)

    def candidates(self, count: int) -> list[TrialRecord]:
        """Return at most `count` complete trials with the highest values, best first, the earliest of equals."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:count]

    def chosen(self) -> TrialRecord | None:
        """Return the trial that the final run retrains, as `harness.final.choice` chose it; before that, the best.

        None if there is none, and while the best trials are reranked.
        """
        record = self.facts().rerank
        if record is None:
            choice = self.choice()
            return self.best() if choice is None else next(t for t in self.trials() if t.number == choice["trial"])
        asked = (self.facts().definition or {}).get("final.rerank", len(record["candidates"]))
        candidates = self.candidates(int(asked))  # may be more than when there were fewer trials
        if [trial.number for trial in candidates] != record["candidates"]:
            return None
        return next((trial for trial in candidates if trial.number == record["chosen"]), None)

    def choice(self) -> dict[str, Any] | None:
        """Return the record of `harness.final.choice`; None before the choice, and if trials have ended since."""
        record: dict[str, Any] | None = self.facts().choice
        return record if record is not None and record["trials"] == self.finished() else None

    def has_final(self) -> bool:
        """Return whether the chosen trial has a final result."""
        final, chosen = self.facts().final, self.chosen()
        return final is not None and chosen is not None and final.trial == chosen.number

    def ledger(self) -> list[Line]:
        """Return the openings of the test set and their results. Raises InputError if a line was changed."""
        if (wrong := self.ledger_fault()) is not None:
            raise InputError(f"In {self.url}, {wrong}; the test set stays closed. Restore the storage from a backup.")
        return self.attributes().get("ledger") or []

    def ledger_lines(self) -> list[Line]:
        """Return the readable lines of the ledger, even if it has a fault."""
        return ledger.readable(self.attributes().get("ledger"))

    def ledger_fault(self) -> str | None:
        """Return what is wrong with the test ledger, as a clause; None if nothing is."""
        final, lines = self.facts().final, self.attributes().get("ledger")
        lines = [] if lines is None else lines
        known = None if final is None else final.ledger
        fault = ledger.fault(lines, self.uid, known)
        return fault if fault is not None or final is None else ledger.difference(lines, final)

    def opened_for(self) -> int | None:
        """Return the trial of the last recorded test result, by the ledger if there is one; None if there is none."""
        final, found = self.facts().final, ledger.results(self.ledger_lines())
        if found:
            return int(found[-1]["trial"])
        return None if final is None else final.trial

    def needs_reason(self) -> bool:
        """Return whether the known test result is of another trial than the chosen one.

        An opening that was interrupted before its result was recorded resumes without a reason.
        """
        opened, chosen = self.opened_for(), self.chosen()
        if opened is None or chosen is None or opened == chosen.number:
            return False
        lines = self.ledger_lines()
        return not lines or lines[-1]["trial"] != chosen.number

    def why_closed(self) -> str | None:
        """Return why the test set stays closed, and how to open it; None if it may be opened."""
        chosen = self.chosen()
        if chosen is None or not self.needs_reason():
            return None
        return (
            f"The validation images now choose trial {chosen.number}, but the test result of trial "
            f"{self.opened_for()} is known; the test set stays closed, because a second test would be biased. "
            'To open it again anyway, add --reopen-test "why" to the command.'
        )

    def is_complete(self, study: Study) -> bool:
        """Return whether the trials, the final result, and their publication in MLflow are complete."""
        asked = self.facts().limited(study.trials, study.limits())
        enough = self.finished() >= asked and self.facts().published == self.finished()
        return enough and self.is_settled()

    def is_settled(self) -> bool:
        """Return whether nothing is left after the search, except to open the test set again for a reason."""
        outgrown = self.facts().choice is not None and self.choice() is None
        return self.best() is None or (not outgrown and (self.has_final() or self.needs_reason()))
