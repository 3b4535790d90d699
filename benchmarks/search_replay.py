"""Measure samplers and pruners on recorded learning curves, used as in a study: `python -m benchmarks.search_replay`

The curves are data beside the checkout (../shared/replay; see its README), and our own: as a table, and interpolated.
Uses one worker; the cost is in epochs, and the budget is that of 50 full trainings, on our own table of 20. Regret =
(best - value) / (best - median) over the final values of 1,500 random configurations (of a table: of all), at most 1;
only complete trials count. Trial 0 is a random configuration.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmarks import curves
from benchmarks.measure import script
from benchmarks.replay_tasks import REPLAY, Task, draw, tasks
from harness.config.events import EpochResult, Metrics
from harness.final.choice import MORE, choose
from harness.search import suggest as asking
from harness.search.pruners import asha, no_pruning
from harness.search.samplers import Sampler, gp, tpe
from harness.search.suggest import ShownStudy
from harness.store.records import TrialRecord, has_diverged, record_of, without_values

SHARES = (0.1, 0.2, 0.4, 1.0)  # of the budget, at which the regret is shown
REFERENCE, SHIPPED = "TPE, asha(5, 2)", "gp(), asha(4, 2)"
TOLD_AT = (20, 40, 80)  # trials after which it is said what more would bring


# -- searching ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy:
    """Who chooses, and who stops."""

    sampler: Any
    pruner: Any


POLICIES = {
    "TPE, nothing pruned": Policy(tpe(), no_pruning()),
    "TPE, asha(5, 2)": Policy(tpe(), asha(min_epochs=5, reduction=2)),
    "TPE, asha(4, 2)": Policy(tpe(), asha(min_epochs=4, reduction=2)),
    "TPE, asha(0.08)": Policy(tpe(), asha(first=0.08)),
    "random, asha(3, 2)": Policy(Sampler("RandomSampler"), asha(min_epochs=3, reduction=2)),
    "GP as Optuna asks it, asha(5, 2)": Policy(Sampler("GPSampler"), asha(min_epochs=5, reduction=2)),
    "gp(), nothing pruned": Policy(gp(), no_pruning()),
    "gp(), asha(5, 2)": Policy(gp(), asha(min_epochs=5, reduction=2)),
    "gp(), asha(0.08)": Policy(gp(), asha(first=0.08)),
    "gp(), asha(4, 2)": Policy(gp(), asha(min_epochs=4, reduction=2)),
}


@dataclasses.dataclass
class Search:
    """One study: what it spent, and its trials as it saw them."""

    task: Task
    policy: Policy
    seed: int
    budget: int
    base: dict[str, Any]
    images: int | None = None  # that the recorded accuracies are seen through, as a validation set would show them
    truth: list[float] = dataclasses.field(default_factory=list)  # final values as recorded
    trials: list[FrozenTrial] = dataclasses.field(default_factory=list)
    spent: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each question

    def run(self) -> Iterator[float]:
        """The value of every complete trial, as it ends."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = self.policy.pruner.build(self.task.epochs, 0)
        used: set[int] = set()
        while self.spent < self.budget:
            memory = optuna.create_study(direction="maximize", pruner=pruner)
            trial = self._asked(memory)
            trial.params, curve = self.task.curve(trial.params if self.trials else self.base, used)
            self.truth.append(float(curve[-1]))
            if self.images is not None:
                noise = np.random.default_rng([self.seed, 2, len(self.trials)])
                curve = noise.binomial(self.images, np.clip(curve, 0, 1)) / self.images
            shown = ShownStudy.of(memory, [*self.trials, trial])
            for epoch, value in enumerate(curve[: self.budget - self.spent].tolist(), 1):
                self.spent += 1
                if not math.isfinite(value):
                    trial.user_attrs["outcome"] = {"state": "diverged"}
                    break
                trial.intermediate_values[epoch] = value
                if epoch == self.task.epochs:
                    trial.value = value
                elif pruner.prune(shown, trial):
                    break
            trial.state = TrialState.PRUNED if trial.value is None else TrialState.COMPLETE
            trial.datetime_complete = trial.datetime_start
            self.trials.append(without_values(trial) if has_diverged(trial) else trial)
            if trial.value is not None:
                yield trial.value

    def _asked(self, memory: optuna.Study) -> FrozenTrial:
        number = len(self.trials)
        for _ in range(number + 1):  # so that the last one has this number
            trial_id = memory._storage.create_new_trial(memory._study_id)
        study: Any = SimpleNamespace(
            space=self.task.space, seed=self.seed, sampler=self.policy.sampler, given_params=lambda _: None
        )
        began = time.perf_counter()
        asking.ask(study, memory, trial_id, number, self.trials)
        self.seconds.append(time.perf_counter() - began)
        trial = memory._storage.get_trial(trial_id)
        trial.number = trial._trial_id = number
        return trial


def regrets(task: Task, policy: Policy, seed: int) -> tuple[list[float], float]:
    """The regret after each epoch of the budget, and the mean seconds of a question.

    It is 1 before a trial is complete, and no more after: what is worse than the median is as good as nothing.
    """
    search = Search(task, policy, seed, task.full * task.epochs, draw(task.space, np.random.default_rng([seed, 1])))
    found = np.full(search.budget, 1.0)
    best = -math.inf
    for value in search.run():
        if value > best:
            best = value
            found[search.spent - 1 :] = min(1.0, (task.best - best) / (task.best - task.median))
    return found.tolist(), float(np.mean(search.seconds))


def handed_out(task: Task, policy: Policy, seed: int, images: int) -> dict[str, Any]:
    """By how much the trial that is handed out is truly better than the base, for each rule of choosing.

    And what ten more trials would bring, as told after some, beside what they brought. The base is a configuration
    between the 95th and the 99th percentile of the random ones.
    """
    ranked = sorted(task.random, key=lambda each: each[1])
    base = ranked[int(len(ranked) * np.random.default_rng([seed, 3]).uniform(0.95, 0.99))][0]
    search = Search(task, policy, seed, task.full * task.epochs, base, images)
    for _ in search.run():
        pass
    records = [_record(trial, images) for trial in search.trials]
    found = choose(records, task.space)
    assert found is not None
    numbers = {"highest value": found["highest"], "lower bound": found["trial"]}
    gains: dict[str, Any] = {rule: search.truth[number] - search.truth[0] for rule, number in numbers.items()}
    told = []
    for count in TOLD_AT:
        now, later = (choose(records[:end], task.space) for end in (count, count + MORE))
        if len(records) >= count + MORE and now and later and now["more"]:
            gain = search.truth[later["trial"]] - search.truth[now["trial"]]
            told.append([count, now["more"]["gain"], now["more"]["bound"], gain])
    return gains | {"told": told}


def _record(trial: FrozenTrial, images: int) -> TrialRecord:
    val = Metrics(loss=0.0, correct=0, total=images)
    epochs = (EpochResult(epoch=1, lr=0.0, train=val, val=val, seconds=1.0),)  # of which the images alone are asked
    return dataclasses.replace(record_of(trial), epochs=epochs)


# -- the table ---------------------------------------------------------------------------------------------------------


def _one_run(which: str, number: int, policy: str, seed: int, images: int | None) -> dict[str, Any]:
    """A line of what is kept: the regrets, or with `images` what is handed out."""
    task = tasks(which)[number]
    about = {"task": task.name, "policy": policy, "seed": seed, "images": images}
    if images is not None:
        return about | handed_out(task, POLICIES[policy], seed, images)
    found, seconds = regrets(task, POLICIES[policy], seed)
    return about | {"seconds": seconds, "regret": [round(r, 4) for r in found]}


def replays(
    which: str,
    seeds: Sequence[int],
    processes: int,
    keep: Path | None,
    policies: Sequence[str],
    images: int | None = None,
) -> list[dict[str, Any]]:
    """A run for each task, policy and seed; what `keep` has of them is not run again."""
    kept = [json.loads(line) for line in keep.read_text().splitlines()] if keep and keep.exists() else []
    done = {(each["task"], each["policy"], each["seed"], each["images"]) for each in kept}
    # The tasks without accuracies have no images.
    chosen = [n for n, task in enumerate(tasks(which)) if images is None or not task.name.startswith("TaskSet")]
    wanted = [
        (which, number, policy, seed, images)
        for seed in seeds
        for number in chosen
        for policy in policies
        if (tasks(which)[number].name, policy, seed, images) not in done
    ]
    with ProcessPoolExecutor(processes) as pool:
        for found in pool.map(_one_run, *zip(*wanted, strict=True)) if wanted else ():
            kept.append(found)
            if keep:
                with keep.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    names = {tasks(which)[number].name for number in chosen}
    return [
        each
        for each in kept
        if each["task"] in names and each["policy"] in policies and each["seed"] in seeds and each["images"] == images
    ]


def show_choices(runs: list[dict[str, Any]], policies: Sequence[str], images: int) -> None:
    """Print in how many studies each rule hands out something truly worse than the base."""
    print(f"{'':34}{'':16}   worse  the base  better    mean gain    s.e.     n   ({images:,} images, points)")
    for policy in policies:
        for rule in ("highest value", "lower bound"):
            gains = 100 * np.array([run[rule] for run in runs if run["policy"] == policy])
            shares = "".join(f"{share:9.0%}" for share in ((gains < 0).mean(), (gains == 0).mean(), (gains > 0).mean()))
            se = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            print(f"{policy:34}{rule:16}{shares}{gains.mean():12.3f}{se:9.3f}{len(gains):6}")
    for policy in policies:
        for count in TOLD_AT:
            told = [each[1:] for run in runs if run["policy"] == policy for each in run["told"] if each[0] == count]
            if told:
                gain, bound, came = 100 * np.array(told).T
                se = (came - gain).std(ddof=1) / math.sqrt(len(came))
                print(
                    f"{policy:34}after {count} trials, {MORE} more: {gain.mean():.3f} predicted, "
                    f"{came.mean():.3f} actual "
                    f"(s.e. of the difference {se:.3f}), {(came <= bound).mean():.0%} within the bound, n = {len(came)}"
                )


def full(
    tasks: str, seeds: int, first: int, processes: int, keep: Path | None, images: int | None, policies: list[str]
) -> None:
    """As many arguments as the command has."""
    if tasks != "own" and not REPLAY.is_dir():
        sys.exit(f"error: the curves are not in {REPLAY}.")
    runs = replays(tasks, range(first, first + seeds), processes, keep, policies, images)
    if images is None:
        show(runs, policies)
    else:
        show_choices(runs, policies, images)


def quick() -> dict[str, float]:
    """On our own curves: how much more TPE leaves over the budget than the Gaussian process does."""
    if not curves.is_complete():
        return {}
    left = {
        policy: np.mean([np.mean(each["regret"]) for each in replays("own", range(5), 1, None, [policy])])
        for policy in (REFERENCE, SHIPPED)
    }
    return {"regret of TPE / of gp()": float(left[REFERENCE] / left[SHIPPED])}


def show(runs: list[dict[str, Any]], policies: Sequence[str]) -> None:
    """Print the table: regrets at shares of the budget, and the differences from REFERENCE, paired over the tasks."""
    by = {policy: _of_tasks(runs, policy) for policy in policies}
    print(
        f"{'':34}" + "".join(f"{share:>8.0%}" for share in SHARES) + "    mean    s.e.  worst  to 0.1   ms/suggestion"
        "   paired    s.e.  better  sooner"
    )
    for policy, mine in by.items():
        if not mine:
            continue
        means = np.array([found.mean() for found in mine.values()])
        at = [np.mean([found[:, _at(share, found)].mean() for found in mine.values()]) for share in SHARES]
        reached = [float(np.median([_reached(row) for row in found])) for found in mine.values()]
        asked = 1000 * np.mean([each["seconds"] for each in runs if each["policy"] == policy])
        line = (
            f"{policy:34}"
            + "".join(f"{value:8.3f}" for value in [*at, means.mean(), _standard_error(means)])
            + f"{means.max():7.3f}{np.median(reached):8.0%}{asked:16.0f}"
        )
        if policy != REFERENCE and (reference := by.get(REFERENCE)):
            pairs = [found.mean() - reference[name].mean() for name, found in mine.items() if name in reference]
            better = sum(pair < 0 for pair in pairs)
            line += f"{np.mean(pairs):9.3f}{_standard_error(np.array(pairs)):8.3f}{better:4} of {len(pairs)}"
            sooner = np.median([_sooner(found, reference[name]) for name, found in mine.items() if name in reference])
            line += f"{sooner:7.2f}"
        print(line)


def _of_tasks(runs: list[dict[str, Any]], policy: str) -> dict[str, np.ndarray]:
    """Of each task the regrets [seeds, epochs]."""
    found: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["policy"] == policy:
            found.setdefault(run["task"], []).append(run["regret"])
    return {name: np.minimum(rows, 1.0) for name, rows in sorted(found.items())}


def _at(share: float, found: np.ndarray) -> int:
    return math.ceil(share * found.shape[1]) - 1


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _sooner(found: np.ndarray, reference: np.ndarray) -> float:
    """How many times fewer epochs give the mean regret that the reference has at the end; 0 if none do."""
    as_good = np.flatnonzero(found.mean(axis=0) <= reference.mean(axis=0)[-1])
    return found.shape[1] / (as_good[0] + 1) if len(as_good) else 0.0


def _reached(found: np.ndarray) -> float:
    below = np.flatnonzero(found <= 0.1)
    return (below[0] + 1) / len(found) if len(below) else math.inf


if __name__ == "__main__":
    script(
        full,
        quick,
        {
            "--tasks": {"choices": ["design", "check", "all", "own"], "default": "design"},
            "--seeds": {"type": int, "default": 10, "help": "their number"},
            "--first": {"type": int, "default": 0, "help": "the first of them"},
            "--processes": {"type": int, "default": 1},
            "--keep": {"type": Path, "help": "file of JSON lines with finished runs, to resume from"},
            "--images": {"type": int, "help": "measure how often the choice by N images is worse than the base"},
            "policies": {"nargs": "*", "default": list(POLICIES)},
        },
    )
