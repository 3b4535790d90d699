"""Measure two workers of one thread each against one such worker: `python -m benchmarks.two_workers`

Runs the demo (10 trials, the final run, its publication) from scratch with the usual command, each in its own process,
timed from its start to its exit, in turns. Meant for two cores; with more, a worker still has one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.measure import Figures, alternate, ratios

PROJECT = Path(__file__).resolve().parent.parent


def seconds(workers: int, trials: int) -> float:
    """From the command's start to its exit."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "studies").mkdir()
        shutil.copy(PROJECT / "studies" / "demo.py", Path(folder) / "studies")
        command = [sys.executable, str(PROJECT / "run_study.py"), "--study", "demo", "--trials", str(trials)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        start = time.perf_counter()
        subprocess.run(
            [*command, "--workers", str(workers)], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True
        )
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    taken: dict[str, Figures] = alternate(
        {f"{count} of one thread": partial(seconds, count, args.trials) for count in (1, 2)}, args.rounds
    )
    for name, figures in taken.items():
        print(f"{name:<16} {figures.text(digits=1)}")
    one, two = taken.values()
    print(f"two / one        {ratios(two, one).text('', 3)}")


if __name__ == "__main__":
    main()
