"""Choose a worker's next trial: an abandoned one, else a new one, and never one too many.

Workers do this one at a time (`Leases.exclusive`), and the others wait meanwhile: it takes a few short statements,
however many trials there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import optuna
import sqlalchemy
from optuna.trial import TrialState

from harness.base.keys import trial_key
from harness.config.space import encode
from harness.config.study import Study
from harness.store.leases import Leases

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
STATE = sqlalchemy.column("state", sqlalchemy.Enum(TrialState, name="trialstate"))
TRIALS = sqlalchemy.table("trials", *map(sqlalchemy.column, ("trial_id", "number", "study_id")), STATE)


class NoTrialFree(Exception):
    """Every requested trial has ended or is running on another worker; one may become free soon."""


@dataclass(frozen=True)
class Row:
    """A trial as the storage lists it: its id, its number in the study, its state."""

    trial_id: int
    number: int
    state: TrialState


def take(
    study: Study,
    of: optuna.Study,
    engine: sqlalchemy.Engine | None,
    held: Leases | None,
    most: Callable[[], int | None],
) -> tuple[int, bool]:
    """Claim a free trial, created if none is left over; return its number and whether it was running before.

    `engine` is that of the storage of `of`, None for one in memory. `most` returns how many trials there may be; it is
    called when no other worker can take one, or end the search. Raises NoTrialFree.
    """
    with contextlib.nullcontext() if held is None else held.exclusive():
        at_most = most()
        # Leases first: a worker ends its trial before it releases the lease, so one of the two queries sees it.
        others = {} if held is None else held.others()
        count, unfinished = _look(of, engine)
        if not count:
            of.enqueue_trial(encode(study.space, study.train))
            count, unfinished = _look(of, engine)
        free = [row for row in unfinished if trial_key(row.number) not in others]
        if at_most is not None and count - len(free) >= at_most:
            raise NoTrialFree
        row = free[0] if free else _made(of, engine, at_most)
        if held is not None:
            _claim(of, engine, held, row)
        if row.state is TrialState.WAITING:
            of._storage.set_trial_state_values(row.trial_id, TrialState.RUNNING)
        return row.number, bool(free) and row.state is TrialState.RUNNING


def _claim(of: optuna.Study, engine: sqlalchemy.Engine | None, held: Leases, row: Row) -> None:
    if not held.claim(trial_key(row.number)):  # its owner has returned
        raise NoTrialFree
    if row not in _look(of, engine)[1]:  # its stalled owner has just ended it
        held.release(trial_key(row.number))
        raise NoTrialFree


def _made(of: optuna.Study, engine: sqlalchemy.Engine | None, at_most: int | None) -> Row:
    trial_id = of._storage.create_new_trial(of._study_id)
    row = next(each for each in _look(of, engine)[1] if each.trial_id == trial_id)
    if at_most is not None and row.number >= at_most:
        # This process stalled here until the server gave its lock to another.
        of._storage.set_trial_state_values(trial_id, TrialState.WAITING)
        raise NoTrialFree
    return row


def _look(of: optuna.Study, engine: sqlalchemy.Engine | None) -> tuple[int, list[Row]]:
    """Return the number of trials, and the unfinished ones by number; Optuna would read all their data."""
    if engine is None:
        trials = of.get_trials(deepcopy=False)
        kept = [Row(each._trial_id, each.number, each.state) for each in trials if each.state in UNFINISHED]
        return len(trials), kept
    mine = TRIALS.c.study_id == of._study_id
    open_ones = mine & TRIALS.c.state.in_(UNFINISHED)
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.select(TRIALS).where(open_ones).order_by(TRIALS.c.number)).all()
        count = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(TRIALS).where(mine)).scalar()
    return count or 0, [Row(each.trial_id, each.number, each.state) for each in rows]
