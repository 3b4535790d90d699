"""Measure what random kills cost a study: `python -m benchmarks.chaos`

Kills studies of the tests' size in every phase (tests/storm.py), compares each with an uninterrupted one, and prints a
table row per kill. --seed repeats the times of an earlier run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.machine import describe
from tests.storm import CHECKPOINT_SECONDS, Kill, Server, Storm, command, plan, rage

TRIALS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="seed of the random times (default: a random one)")
    parser.add_argument("--storms", type=int, default=3, help="number of studies to kill, 15 to 17 kills each")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"{datetime.date.today()}, {describe()}")
    print(f"--seed {seed}; every study: `{command(TRIALS)}`\n")
    began = time.monotonic()
    print(
        "| # | signal | aimed at | hit | training | batches redone | epochs redone | seconds lost (allowed) | equal |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    kills: list[Kill] = []
    unmet = 0
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        alone = Storm(Path(folder) / "alone", server, TRIALS)
        alone.start()
        expected = alone.result()
        for number in range(args.storms):
            storm = Storm(Path(folder) / f"killed-{number}", server, TRIALS)
            aims = plan(random.Random(f"{seed} {number}"), number, anywhere=2)
            rage(storm, aims)
            equal = storm.result() == expected
            for kill in storm.kills():
                kills.append(kill)
                print(row(len(kills), kill, equal), flush=True)
            unmet += len(aims) - len(storm.kills())
            storm.check(expected)
    print(f"\n{summary(kills)} {unmet} targets were missed. {time.monotonic() - began:.0f} s in total.")


def row(number: int, kill: Kill, equal: bool) -> str:
    cells = (
        number,
        kill.aim.signal,
        f"{kill.aim.phase}: {kill.aim.point}" if kill.aim.point else kill.aim.phase,
        kill.place,
        kill.training or "none",
        kill.batches,
        kill.epochs,
        f"{kill.seconds:.2f} ({kill.allowed:.2f})",
        "yes" if equal else "NO",
    )
    return f"| {' | '.join(map(str, cells))} |"


def summary(kills: list[Kill]) -> str:
    hard = [kill for kill in kills if kill.aim.signal == "SIGKILL"]
    soft = [kill for kill in kills if kill.aim.signal == "SIGTERM"]
    lost = max((kill.seconds for kill in hard), default=0.0)
    return (
        f"{len(hard)} SIGKILLs: {sum(kill.batches for kill in hard)} batches and "
        f"{sum(kill.epochs for kill in hard)} epochs redone, at most {lost:.2f} s lost, with a checkpoint every "
        f"{CHECKPOINT_SECONDS} s. {len(soft)} SIGTERMs: {sum(kill.batches for kill in soft)} batches redone."
    )


if __name__ == "__main__":
    main()
