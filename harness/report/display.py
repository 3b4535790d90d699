"""Progress of a running study: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from harness.base.words import A_DAY_SECONDS, OBJECTIVES, duration, money, percent, rate
from harness.config import events
from harness.config.events import EpochEnded, EpochResult, TrialEnded, TrialStarted
from harness.config.study import Study
from harness.report.overview import after_seconds, in_short
from harness.search.limits import hours_left
from harness.store.store import Store, wanted
from harness.training import interrupt

BAR_COLUMNS = 30  # at most; fewer in a narrow terminal


class StudyConsole(Console):
    """A console whose pipe may close (`| head`, a `tee` stopped by Ctrl-C): the study continues without it."""

    left = False  # whether stdout is for no text: its reader is gone, or wants JSON

    def __init__(self, quiet: bool = False, stderr: bool = False) -> None:
        # A trial's error may hold any brackets and colons.
        super().__init__(markup=False, emoji=False, quiet=quiet, stderr=stderr)

    def say(self, text: str) -> None:
        """Print lines; the terminal wraps them."""
        self.print(text, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        StudyConsole.left = self.quiet = True
        unread()

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal was closed
                raise
            self.on_broken_pipe()


def unread() -> None:
    """Print to nowhere from now on, as nobody reads; also errors, if they go to the same place."""
    nowhere, there = os.open(os.devnull, os.O_WRONLY), os.fstat(sys.stdout.fileno())
    if os.path.samestat(there, os.fstat(sys.stderr.fileno())):
        os.dup2(nowhere, sys.stderr.fileno())
    os.dup2(nowhere, sys.stdout.fileno())


class Display:
    """Show the events of a study, as a context manager."""

    def __init__(self, study: Study, store: Store, console: Console, workers: int = 1, reopening: bool = False) -> None:
        """`workers` is the number of parallel trainings; `reopening`, whether the test set is opened again."""
        self._study = study
        self._workers, self._reopening = workers, reopening
        self._store = store
        self._console = console
        self._under_way: dict[str, TrialStarted] = {}  # by name
        self._final_ratio = 1.0  # length of a final run's epoch, with the validation images, relative to a trial's
        self._forecast = self._waiting = False  # whether the line was printed
        self._heard = False  # whether an event has arrived
        self._price, self._after_seconds = store.facts().price, after_seconds(store)
        self._begun = 0  # number of started trainings after the search, including earlier processes'
        self._compares = study.final.compare_base and study.trials > 1  # whether the base is trained too
        # Each process's first epoch compiles the model: it says nothing about the others.
        self._compiling = workers if (store.facts().runtime or {}).get("compile") else 0
        self._look()
        terminal = console.is_terminal and not console.is_dumb_terminal  # where Live shows nothing
        self._is_live = terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self._is_live:
            self._live.start()
            interrupt.displayed(not self._console.quiet)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_live:
            interrupt.displayed(False)
            self._live.stop()

    def show(self, event: events.Event) -> None:
        self._heard = True
        match event:
            case TrialStarted():
                self._begins(event)
                if event.resumed:
                    self._say(f"{event.name} was interrupted and {_place(event)}.")
            case EpochEnded():
                self._epoch_ended(event)
            case TrialEnded():
                self._trial_ended(event)
            case events.TrialLost():
                self._under_way.pop(f"trial {event.number}", None)
                self._say(f"Another process took over trial {event.number}, because this one stalled.")
            case events.SearchStopped(trials=trials, reason=reason):
                self._look()
                self._say(f"The search stops after {trials} trials: {reason}.")
            case events.Elsewhere():
                if not self._waiting:
                    self._waiting = True
                    self._say(f"The final run is running in {event.by}; waiting for its end.")

    def _look(self) -> None:
        """Read the storage, so that a resumed study starts with the earlier times."""
        ended = [trial for trial in self._store.trials() if trial.state != "running"]
        self._finished, self._best = self._store.finished(), self._store.best()
        self._asked = wanted(self._study, self._store)
        self._hours = None if self._study.hours is None else hours_left(self._study, self._store.trials())
        self._settled = self._best is not None and self._store.is_settled()
        self._trial_seconds = [trial.seconds for trial in ended if trial.seconds is not None]
        epochs = [epoch for trial in ended for epoch in trial.epochs]
        self._epoch_seconds = [epoch.seconds for epoch in epochs]
        if epochs:
            self._compare_sizes(epochs[-1])

    def _compare_sizes(self, result: EpochResult) -> None:
        """Set the ratio from the training and validation images of a trial's epoch."""
        if result.val and self._study.final.fit_on == "train+val":
            self._final_ratio = 1 + result.val.total / result.train.total

    def _epoch_ended(self, event: EpochEnded) -> None:
        result, started = event.result, self._under_way.get(event.name)
        epochs = self._study.train.epochs if started is None else started.epochs
        if started is not None and isinstance(started.progress, events.Reached):
            started.progress.ended(result)
        if not _is_trial(event.name):
            self._after_seconds += result.seconds
        compiled = self._compiling > 0
        self._compiling -= compiled
        if not compiled and (result.val or not self._epoch_seconds):
            self._epoch_seconds.append(result.seconds)
            self._compare_sizes(result)
        if not self._is_live:
            measured = f"val {result.val.value:.2%}" if result.val else f"train {result.train.accuracy:.2%}"
            self._say(f"{event.name}  epoch {result.epoch}/{epochs}  loss {result.train.loss:.3f}  {measured}")
        if not self._forecast and not compiled:
            self._forecast = True
            costs = ""
            if self._price is not None:
                left = sum(map(sum, self._missing())) / 3600
                costs = f", for about {money(left * self._price)} at {rate(self._price)} per hour"
            self._say(forecast(result.seconds, self._left() or 0.0, bool(self._trial_seconds), costs))
        if result.epoch == epochs and not _is_trial(event.name):
            self._under_way.pop(event.name, None)

    def _trial_ended(self, event: TrialEnded) -> None:
        self._look()
        seconds = next(trial.seconds or 0.0 for trial in self._store.trials() if trial.number == event.number)
        self._under_way.pop(f"trial {event.number}", None)
        name = f"trial {event.number}".ljust(9)
        best = "  best so far" if self._best is not None and self._best.number == event.number else ""
        self._say(
            f"{name} {_outcome(event.outcome)}  {in_short(event.params, whole_paths=False)}  {duration(seconds)}{best}"
        )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=not self._console.is_terminal)  # no wraps in pipes

    def _left(self) -> float | None:
        """Return the estimated seconds until the end, from the trials so far; None before the first epoch."""
        if not self._epoch_seconds:
            return None
        return sum(side_by_side(each, self._workers) for each in self._missing())

    def _missing(self) -> tuple[list[float], list[float]]:
        """Return the estimated seconds of each training that is left: of the search, and after it."""
        epoch = statistics.fmean(self._epoch_seconds)
        training = epoch * self._study.train.epochs
        trial = statistics.fmean(self._trial_seconds) if self._trial_seconds else training
        search = self._seconds(True, self._asked - self._finished, trial)
        if self._hours is not None:
            ends = [0.0, *itertools.accumulate(search)]
            search = [min(each, 3600 * self._hours - before) for each, before in zip(search, ends, strict=False)]
            search = [each for each in search if each > 0]
        after = self._seconds(False, self._trainings(), training * self._final_ratio)
        return search, after

    def _spent(self) -> float:
        """Return the price of the trainings so far, whole epochs of those under way included."""
        trials = [started for started in list(self._under_way.values()) if _is_trial(started.name)]
        running = sum(result.seconds for started in trials for result in started.progress.epochs)
        return (sum(self._trial_seconds) + running + self._after_seconds) / 3600 * (self._price or 0.0)

    def _seconds(self, trials: bool, missing: int, each: float) -> list[float]:
        """Return the remaining seconds of each of the `missing` trials, or later trainings; running ones first."""
        under_way = [started for started in list(self._under_way.values()) if _is_trial(started.name) == trials]
        spent = [sum(result.seconds for result in started.progress.epochs) for started in under_way]
        return [max(each - seconds, 0.0) for seconds in spent] + [each] * (missing - len(spent))

    def _begins(self, event: TrialStarted) -> None:
        """Count a training; after the search they start in order, so earlier ones that did not start are done."""
        if not _is_trial(event.name) and event.name not in self._under_way:
            looks, seeds = self._second_looks(), self._study.final.seeds
            kind = event.name.partition(" ")[0]
            place = {"final": looks + event.number, "base": looks + seeds + event.number}.get(kind, self._begun)
            if kind == "final" and (chosen := self._store.chosen()) is not None and chosen.number == 0:
                self._compares = False
            self._begun = max(self._begun, place + 1)
            self._after_seconds += sum(result.seconds for result in event.progress.epochs)
        self._under_way[event.name] = event

    def _trainings(self) -> int:
        """Return the number of unfinished trainings after the search: reranking, the best's seeds, the base's."""
        under_way = sum(not _is_trial(name) for name in list(self._under_way))
        if self._settled and not self._reopening:
            return under_way  # at most the seed of a lost model: the test is done
        all_of_them = self._second_looks() + self._study.final.seeds * (1 + self._compares)
        return all_of_them - self._begun + under_way

    def _second_looks(self) -> int:
        return self._study.final.seeds * min(self._study.final.rerank, self._study.trials)

    def _render(self) -> RenderableType:
        left, asked = self._left(), max(self._asked, self._finished)
        text, bar = Column(no_wrap=True), Column(max_width=BAR_COLUMNS)
        grid = Table.grid(text, bar, text.copy(), padding=(0, 1))
        grid.add_row("study", ProgressBar(asked, self._finished), f"{self._finished}/{asked} trials")
        for started in list(self._under_way.values()):
            progress, epochs = started.progress, started.epochs
            done = progress.epoch - 1 + progress.step / max(progress.steps, 1)
            grid.add_row(started.name, ProgressBar(epochs, done), f"epoch {min(progress.epoch, epochs)}/{epochs}")
        best = "none yet" if self._best is None else f"{self._best.value:.2%} (trial {self._best.number})"
        time = "time left …" if left is None else f"time left {duration(left)}" if left else "nearly done"
        last = f"best {best}   {time}" + ("" if self._price is None else f"   spent {money(self._spent())}")
        if not self._heard:
            last = "The workers are starting …" if self._workers > 1 else "Starting …"
        return Group(grid, interrupt.NOTICE if interrupt.requested() else last)


def side_by_side(seconds: Iterable[float], workers: int) -> float:
    """Return the total time of trainings with these seconds each, started in order by the first free worker."""
    ends = [0.0] * workers  # a heap
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def _is_trial(name: str) -> bool:
    return name.startswith("trial ")


def forecast(epoch_seconds: float, left: float, pruning_known: bool, costs: str = "") -> str:
    """Return the forecast after the first epoch; both times are in seconds, and `costs` follows them."""
    aside = "" if pruning_known else ", without pruning"
    text = f"An epoch takes {duration(epoch_seconds)} here: about {duration(left)} left{aside}{costs}."
    if left > A_DAY_SECONDS:
        text += (
            " That is more than a day. To save time: a GPU, fewer --trials, fewer epochs (--set epochs=5), fewer "
            "images (--set data.limit=510), or a frozen backbone."
        )
    return text


def _place(started: TrialStarted) -> str:
    """Return where an interrupted training resumes."""
    progress = started.progress
    if progress.step:
        return f"resumes in epoch {progress.epoch} after {progress.step} of {progress.steps} batches"
    return f"resumes with epoch {progress.epoch}" if progress.epoch > 1 else "restarts with the same configuration"


def _outcome(outcome: events.TrialOutcome) -> str:
    match outcome:
        case events.Completed(value=value):
            return f"complete  val {value:.2%}"
        case events.Pruned(epoch=epoch, reason=reason):
            return f"pruned after epoch {epoch}" + ("" if reason is None else f": {reason}")
        case _:
            return f"{outcome.state}: {outcome.reason}"


def print_studies(rows: Sequence[Any]) -> None:
    """Print a table of `harness.report.overview.Row`."""
    numbers = [Column(name, justify="right") for name in ("trials", "best", "test")]
    others = any(row.objective != "accuracy" for row in rows)
    table = Table("study", "state", *numbers, *["objective"] * others, box=None, pad_edge=False, header_style="")
    for row in rows:
        shown = [row.state, f"{row.finished}/{row.trials}", percent(row.best), percent(row.test)]
        table.add_row(row.study, *shown, *[OBJECTIVES[row.objective]] * others)
    StudyConsole().print(table)
    for row in rows:
        if row.note is not None:
            print(row.note, file=sys.stderr)


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print a comparison (`harness.report.compare`) as tables and sentences."""
    from harness.report.compare import definition_rows, outline_rows  # of no use to other commands

    console = StudyConsole()
    differing = definition_rows(found)
    for head, rows in (("", outline_rows(found)), ("differs in", differing)):
        columns = [Column(name, overflow="fold") for name in (head, *found["studies"])]
        table = Table(*columns, box=None, pad_edge=False, header_style="")
        for what, values in rows:
            table.add_row(what, *values)
        if rows:
            console.print(table)
            console.say("")
    if not differing:
        console.say("The studies have the same definition.")
    for name, each in found["studies"].items():
        if each["fault"] is not None:
            console.say(f"Do not trust {name}: {each['fault']}.")
    for line in dict.fromkeys([*(each["sentence"] for each in found["tests"]), found["conclusion"]]):
        console.say(line)
    console.say(found["openings"]["sentence"])
    for line in found["openings"]["unread"]:
        print(line, file=sys.stderr)


def print_models(models: Sequence[Any]) -> None:
    """Print a table of `harness.models.catalog.Model`."""
    numbers = [Column(name, justify="right", no_wrap=True) for name in ("parameters", "pixels")]
    table = Table(Column("model", overflow="fold"), *numbers, "weights", box=None, pad_edge=False, header_style="")
    for each in models:
        count = "" if each.parameters is None else f"{each.parameters / 1e6:.1f} M"
        table.add_row(each.model, count, str(each.image_size), "here" if each.weights_here else "")
    StudyConsole().print(table)
