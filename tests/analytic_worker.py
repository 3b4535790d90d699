"""A worker of analytic trials in a process of its own: `python -m tests.analytic_worker URL MACHINE LEASE PAUSE`.

MACHINE is the name of the machine that it says it is on, so that others must wait for its leases of LEASE seconds;
"here" is the real one. It pauses PAUSE seconds in every epoch. It imports no torch and does what its standard input
says: `open`, or a number of trials that the study should have. What happens it prints.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping
from typing import Any

from harness.base import processes
from harness.config import find as catalogue
from harness.config.study import Study
from harness.search.pruners import asha
from harness.search.samplers import tpe
from harness.store import leases, opening
from harness.store.leases import LeaseLost
from harness.store.store import NoTrialFree, Store
from tests import analytic

DEMO = catalogue.PROJECT / "studies" / "demo.py"


def searching() -> Study:
    """A study over the analytic curves, with TPE beyond its start-up and pruning at epochs 2 and 4."""
    study = catalogue.find(str(DEMO)).study
    return dataclasses.replace(study, sampler=tpe(n_startup_trials=5), pruner=asha(min_epochs=2))


def patient(seconds: float) -> None:
    """Have the leases of this process last as long."""
    opening.Leases = functools.partial(leases.Leases, seconds=seconds)  # type: ignore[misc, assignment]
    leases.RENEWAL_SECONDS = seconds / 4


def work(study: Study, store: Store, trials: int, pause: float) -> None:
    def curve(params: Mapping[str, Any], epoch: int) -> float:
        print(f"trial {asked.number} epoch {epoch}", flush=True)
        time.sleep(pause)
        return analytic.accuracy(params, epoch)

    while store.finished() < trials:
        try:
            asked = store.ask(study, at_most=trials)
            analytic.evaluate(study, store, asked, curve=curve)
        except NoTrialFree:
            time.sleep(0.05)
        except LeaseLost as lost:
            print(f"lost {lost}", flush=True)
    print(f"done {trials}", flush=True)


def main(url: str, machine: str, lease: str, pause: str) -> None:
    if machine != "here":
        processes.here = lambda: f"{machine}/-"
    patient(float(lease))
    study = searching()
    print("ready", flush=True)
    assert sys.stdin.readline() == "open\n"
    with opening.open_store(study, url) as store:
        print(f"opened {store.uid}", flush=True)
        for line in sys.stdin:
            work(study, store, int(line), float(pause))


if __name__ == "__main__":
    main(*sys.argv[1:])
