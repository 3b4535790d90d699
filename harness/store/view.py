"""A study as its storage has it, to look at."""

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
from harness.store.records import FINISHED, StudyFacts, TrialRecord, record_of

P = ParamSpec("P")
T = TypeVar("T")
ViewT = TypeVar("ViewT", bound="StudyView")


def outlasting(method: Callable[Concatenate[ViewT, P], T]) -> Callable[Concatenate[ViewT, P], T]:
    """A method that waits while another program locks the database. Raises Halt when the database fails.

    Each of these methods may be cut off anywhere and called again, for a process may die anywhere in it.
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
    """What is known of one study in an Optuna storage.

    `as_of_now`: everything is read once, so that what is shown of a running study fits together.
    """

    def __init__(self, url: str, optuna_study: optuna.Study, as_of_now: bool = False) -> None:
        self.url = url
        self._study = optuna_study
        self._as_of_now = as_of_now
        self._attributes: dict[str, Any] | None = None
        self._trials: list[FrozenTrial] | None = None

    def check_file(self) -> None:
        """Raise Halt when the database is not where it was opened."""

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
        """What the last trial that has ended was computed with (`harness.base.environment`)."""
        return next((trial.environments[-1] for trial in reversed(self.trials()) if trial.environments), None)

    def counts(self) -> dict[str, int]:
        """Trials by state; a diverged trial is a failed one here."""
        named = ["failed" if trial.state == "diverged" else trial.state for trial in self.trials()]
        return {state: named.count(state) for state in ("complete", "pruned", "failed", "running")}

    def best(self) -> TrialRecord | None:
        """The complete trial with the highest value, the earliest of equals."""
        return next(iter(self.candidates(1)), None)

    def candidates(self, count: int) -> list[TrialRecord]:
        """The complete trials with the highest values, at most `count`, the best first, the earliest of equals."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:count]

    def chosen(self) -> TrialRecord | None:
        """The trial that the final run retrains, as `harness.final.choice` chose it; before, the best.

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
        """What `harness.final.choice` has chosen, and why; None before, and when trials have ended since."""
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
