"""Measure how long `gp()` takes to suggest a configuration: `python -m benchmarks.question`

Searches our own curves, interpolated (four dimensions, see benchmarks/CURVES.md), for 1,000 trials from each of some
seeds (--seeds), on one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.measure import Figures, script
from benchmarks.replay_tasks import interpolated
from benchmarks.search_replay import POLICIES, SHIPPED, Search

NUMBERS, BEFORE, TRIALS = (50, 100, 200, 500, 1000), 11, 1000


def milliseconds(seed: int) -> list[float]:
    """Of each question of a search of 1,000 trials."""
    task = interpolated()
    search = Search(task, POLICIES[SHIPPED], seed, TRIALS * task.epochs, task.random[seed][0])
    for _ in search.run():
        if len(search.trials) >= TRIALS:
            break
    return [1000 * seconds for seconds in search.seconds]


def full(seeds: int) -> None:
    """Print the figures of the last eleven questions until each number of trials."""
    found = [milliseconds(seed) for seed in range(seeds)]
    for number in NUMBERS:
        figures = Figures(tuple(ms for each in found for ms in each[number - BEFORE : number]))
        print(f"{number:>5} trials: {figures.text('ms', 0)}")


if __name__ == "__main__":
    script(full, dict, {"--seeds": {"type": int, "default": 5}})
