"""A study's Optuna storage: opening, resuming, and what counts as finished. The storage is the truth."""

from __future__ import annotations

import dataclasses
import functools
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.config import Study
from harness.database import BUSY_TIMEOUT_SECONDS, check_database, connect, dispose, held, outlast, sqlite_file
from harness.errors import InputError
from harness.results import Completed, Diverged, EpochResult, Failed, TrialOutcome
from harness.search import may_prune, suggest
from harness.seeds import derive_seed
from harness.space import encode

P = ParamSpec("P")
T = TypeVar("T")
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A trial that is to be evaluated: new, or left behind by a process that died.

    `curve` is what the storage holds of it, validation accuracy by epoch; nobody else writes it, for the study is held.
    """

    number: int
    params: dict[str, Any]
    resumed: bool
    trial: optuna.Trial
    curve: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as the storage knows it, in the project's words."""

    number: int
    state: str  # complete, pruned, diverged, failed, running
    value: float | None  # validation accuracy of the last epoch; None unless complete
    params: dict[str, Any]
    epochs: tuple[EpochResult, ...]
    curve: dict[int, float]  # epoch -> validation accuracy, as reported so far
    reason: str | None
    seconds: float | None
    environments: tuple[dict[str, str], ...] = ()
    traceback: str | None = None


def outlasting(method: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], T]:
    """A method of Store that waits while another program locks the database. Raises Halt when the database fails.

    Each of these methods may be cut off anywhere and called again, for a process may die anywhere in it.
    """

    @functools.wraps(method)
    def patient(self: Store, *args: P.args, **kwargs: P.kwargs) -> T:
        return outlast(self.url, lambda: method(self, *args, **kwargs))

    return patient


class Store:
    """One study in an Optuna storage. Made by `open_store` (to run) or `read_store` (to look)."""

    def __init__(self, url: str, optuna_study: optuna.Study) -> None:
        self.url = url
        self._study = optuna_study

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def optuna_study(self) -> optuna.Study:
        """For Optuna's own plots and importances."""
        return self._study

    @outlasting
    def attribute(self, name: str) -> Any:
        """A fact about the whole study, or None."""
        return self._study.user_attrs.get(name)

    @outlasting
    def finished(self) -> int:
        return sum(trial.state in FINISHED for trial in self._study.get_trials(deepcopy=False))

    @outlasting
    def trials(self) -> list[TrialRecord]:
        """All trials that have begun, by number."""
        waiting = TrialState.WAITING
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state is not waiting]

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
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)

    def has_final(self) -> bool:
        """Whether the final result is there and belongs to the best trial."""
        final, best = self.attribute("final"), self.best()
        return final is not None and best is not None and final["trial"] == best.number

    def is_complete(self, study: Study) -> bool:
        """Whether nothing is missing: the trials, the final result, and their publication in MLflow."""
        enough = self.finished() >= study.trials and self.attribute("published") == self.finished()
        return enough and (self.best() is None or self.has_final())

    # -- writing ------------------------------------------------------------------------------------------------

    @outlasting
    def set_attribute(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)

    @outlasting
    def ask(self, study: Study) -> Asked:
        """The next trial to evaluate: an interrupted one first, under its own number and parameters, else a new one.

        The sampler is made anew for every question, seeded from the study's seed, the number of finished trials and
        the question. It therefore answers the same after a kill as without one.
        """
        trials = self._study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        finished = sum(trial.state in FINISHED for trial in trials)
        self._study.sampler = study.sampler.build(study, derive_seed(study.seed, "ask", finished))
        if running:
            trial = optuna.Trial(self._study, running[0]._trial_id)
        else:
            if not trials:
                self._study.enqueue_trial(encode(study.space, study.train))
            trial = self._study.ask()
        # Optuna draws jointly sampled parameters at the first question; have it drawn now, whatever was asked before.
        _ = trial.relative_params
        for path, dimension in study.space.items():
            # A fresh stream for each parameter: a process may die between two of them.
            self._study.sampler = study.sampler.build(study, derive_seed(study.seed, "ask", finished, path))
            suggest(trial, path, dimension)
        curve = dict(running[0].intermediate_values) if running else {}
        return Asked(number=trial.number, params=dict(trial.params), resumed=bool(running), trial=trial, curve=curve)

    @outlasting
    def report(self, asked: Asked, epoch: int, value: float) -> None:
        """Record the validation accuracy after an epoch; once is enough, a repeated epoch is left as it was.

        A repeated epoch with another result is named on stderr: the trial went on where the same steps give other bits.
        """
        known = asked.curve.get(epoch)
        if known is None:
            asked.trial.report(value, epoch)
            asked.curve[epoch] = value
        elif known != value:
            text = f"Trial {asked.number} gives {value:.4f} in the redone epoch {epoch}, not {known:.4f} as before"
            print(f"{text}: its later epochs are not those of an uninterrupted trial.", file=sys.stderr)

    @outlasting
    def should_prune(self, asked: Asked, epoch: int) -> bool:
        """The pruner's verdict after `epoch`; an epoch that an earlier process went beyond was judged then."""
        latest = epoch == max(asked.curve, default=None)
        return latest and may_prune(self._study.pruner, epoch) and asked.trial.should_prune()

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
        asked.trial.set_user_attr("epochs", [result.to_dict() for result in epochs])
        asked.trial.set_user_attr("seconds", seconds)
        asked.trial.set_user_attr("environments", [dict(each) for each in environments])
        described = dataclasses.asdict(outcome) | {"state": outcome.state}
        if isinstance(outcome, Diverged):
            described["reason"] = outcome.reason
        asked.trial.set_user_attr("outcome", described)
        if isinstance(outcome, Completed):
            self._study.tell(asked.trial, outcome.value)
        elif isinstance(outcome, Failed):
            self._study.tell(asked.trial, state=TrialState.FAIL)
        else:
            # A diverged trial is told as pruned: Optuna's samplers ignore failures and would try its region again.
            self._study.tell(asked.trial, state=TrialState.PRUNED)


def _record(trial: FrozenTrial) -> TrialRecord:
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    outcome = trial.user_attrs.get("outcome", {})
    finished = trial.state in FINISHED
    return TrialRecord(
        number=trial.number,
        state=(outcome.get("state") or states[trial.state]) if finished else "running",
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        params=dict(trial.params),
        epochs=tuple(EpochResult.from_dict(each) for each in trial.user_attrs.get("epochs", [])),
        curve=dict(sorted(trial.intermediate_values.items())),
        reason=outcome.get("reason"),
        seconds=trial.user_attrs.get("seconds"),
        environments=tuple(trial.user_attrs.get("environments", [])),
        traceback=outcome.get("traceback"),
    )


# -- opening -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_store(study: Study, url: str, content: Mapping[str, str] | None = None) -> Iterator[Store]:
    """Open a study for running, and hold it: a second process on the same SQLite study is refused.

    `content` are fingerprints of what the definition only names, the images and the pretrained weights; None skips
    their comparison. Raises InputError when the database cannot be opened or is none of ours, when another process
    holds the study, and when the stored definition differs from `study` (naming the fields).
    """
    file = sqlite_file(url)
    with held(file, study.name):
        check_database(url)
        storage = connect(url)
        try:
            create = functools.partial(
                optuna.create_study,
                storage=storage,
                study_name=study.name,
                direction="maximize",
                pruner=study.pruner.build(),
                load_if_exists=True,
            )
            optuna_study = outlast(url, create)
            store = Store(url, optuna_study)
            _check_definition(study, store, content)
            yield store
        finally:
            dispose(storage)


@contextmanager
def read_store(name: str, url: str) -> Iterator[Store]:
    """Open a study to look at it; it may be running. Raises InputError when there is none."""
    file = sqlite_file(url)
    if file is not None and (not file.is_file() or file.stat().st_size == 0):
        raise InputError(f"Study {name!r} has no results yet ({file} does not exist); run it with --study {name}.")
    check_database(url)
    storage = connect(url, writing=False)
    try:
        try:
            optuna_study = outlast(url, lambda: optuna.load_study(storage=storage, study_name=name))
        except KeyError as error:
            raise InputError(
                f"{url} holds no study named {name!r}; it has not begun there: run it, or check --storage and the name."
            ) from error
        yield Store(url, optuna_study)
    finally:
        dispose(storage)


def exists(name: str, url: str) -> bool:
    """Whether the storage holds this study already, with a definition or trials: a start may have been cut off before.

    Raises InputError when it cannot be opened.
    """
    file = sqlite_file(url)
    if file is not None and (not file.is_file() or file.stat().st_size == 0):
        return False
    check_database(url)
    storage = connect(url, writing=False)
    try:
        known = outlast(url, lambda: optuna.get_all_study_summaries(storage))
        begun = {each.study_name for each in known if "definition" in each.user_attrs or each.n_trials}
        return name in begun
    finally:
        dispose(storage)


def as_begun(study: Study, store: Store, content: Mapping[str, str] | None = None) -> Study:
    """The study as the storage knows it: settings given on the command line at its start are put back.

    `content` are fingerprints as in `open_store`. Raises InputError when the study's file says something else today
    that no setting can.
    """
    stored = store.attribute("definition")
    if stored is None:
        raise InputError(f"Study {study.name!r} has not begun; run it with --study {study.name}.")
    study = study.with_definition(stored)
    _check_definition(study, store, content)
    return study


def compare(study: Study, url: str, content: Mapping[str, str] | None) -> None:
    """Raise InputError unless `study` continues the one in the storage, which exists. Writes nothing, nor locks."""
    with read_store(study.name, url) as store:
        if store.attribute("definition") is not None or store.trials():
            _check_definition(study, store, content)


def _check_definition(study: Study, store: Store, content: Mapping[str, str] | None) -> None:
    """Keep the definition at the first start; at every later one, refuse a study that would not continue it."""
    now = study.definition() | {f"content of {name}": value for name, value in (content or {}).items()}
    stored = store.attribute("definition")
    if stored is None:
        if store.trials():
            raise InputError(
                f"Study {study.name!r} in {store.url} was begun by another program; "
                "give another --storage, or rename the study."
            )
        store.set_attribute("uid", uuid.uuid4().hex)
        store.set_attribute("definition", now)
        return
    unknown = {path for path in stored if path.startswith("content of ")} if content is None else set()
    if now["engine.compile"] != "on":  # studies from before there was a choice go on uncompiled
        unknown |= {"engine.compile"} - stored.keys()
    differing = [path for path in {**stored, **now} if stored.get(path) != now.get(path) and path not in unknown]
    if differing:
        changes = "; ".join(f"{path} was {stored.get(path)!r}, is {now.get(path)!r}" for path in differing)
        raise InputError(
            f"Study {study.name!r} was begun with another definition ({changes}); its results could not be compared. "
            "Change it back, or start anew with --fresh (the old study is kept under another name)."
        )


def move_aside(name: str, url: str, *folders: Path) -> Path | None:
    """Give an existing study, and the folders beside it, another name (`--fresh`); nothing is deleted.

    Returns the new file, None if there was none.
    """
    file = sqlite_file(url)
    if file is None:
        raise InputError("--fresh moves a SQLite file; with another database, give the new study another --storage.")
    if not file.exists():
        return None
    with held(file, name):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = next(
            path
            for number in range(1000)
            if not (path := file.with_name(f"{file.stem}.{stamp}{f'-{number}' if number else ''}.db")).exists()
        )
        connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_SECONDS)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of the study is in the one file that is renamed
        connection.close()
        for folder in folders:
            if folder.exists():
                folder.rename(target.with_suffix(folder.suffix))
        file.rename(target)
    return target


def has_model(folder: Path) -> bool:
    """Whether the final run's model lies whole in its folder; it is written as these two files, in this order."""
    return (folder / "model.safetensors").is_file() and (folder / "model.json").is_file()
