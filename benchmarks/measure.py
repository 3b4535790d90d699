"""Measure contestants in turns within one run: ratios per round, medians and spread.

A script calls `script(full, quick)`: `full` prints the rows of RESULTS.md; `quick` returns ratios (larger is better) in
under 20 s, which `python -m benchmarks --quick` compares with benchmarks/records.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import describe

ROOT_HELP = "the folder that holds torchvision's flowers-102/ (default: drawn flowers)"


@dataclass(frozen=True)
class Figures:
    """Measurements of one thing, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, unit: str = "s", digits: int = 3) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f}, n = {len(self.values)})"


def alternate(contestants: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, Figures]:
    """Run all contestants in every round, each round beginning with the next one.

    A contestant returns its own figure, or None to have its wall-clock time taken.
    """
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            figure = contestants[name]()
            taken[name].append(time.perf_counter() - start if figure is None else figure)
    return {name: Figures(tuple(values)) for name, values in taken.items()}


def ratios(above: Figures, below: Figures) -> Figures:
    """The ratio in each round: what disturbs the machine for longer than a round disturbs both."""
    return Figures(tuple(a / b for a, b in zip(above.values, below.values, strict=True)))


def script(
    full: Callable[..., None],
    quick: Callable[[], Mapping[str, float]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Run a script as the command line says: in full, or `--quick`, whose last line is a JSON object of ratios.

    `options` are arguments of the command line, with what argparse wants to know of each; `full` takes their values.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="print a few ratios as JSON, in under 20 s")
    for name, settings in (options or {}).items():
        parser.add_argument(name, **settings)
    given = vars(parser.parse_args())
    if given.pop("quick"):
        print(json.dumps(dict(quick())))
        return
    print(describe())
    full(**given)
