"""Measure whether the demo's search pays: `python -m benchmarks.search_pays --keep FOLDER`

Runs the whole demo for each seed, with one thread, and compares the chosen configuration with the base on the test
images, over three seeds. FOLDER keeps the studies: an interrupted seed resumes, a finished one is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from harness.final.statistics import ALPHA

PROJECT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def handed_out(seed: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """The study of one seed as `show --json` has it, and the seconds of this run of it."""
    places = ["--storage", f"sqlite:///{folder}/{seed}.db", "--tracking-uri", f"sqlite:///{folder}/mlflow-{seed}.db"]
    setting = ["--set", f"seed={seed}", "--set", f"data.cache={folder}/cache", "--set", "final.publish=false"]
    command = [sys.executable, "run_study.py", "--study", "demo", *places, *setting, *arguments]
    began = time.perf_counter()
    with (folder / f"{seed}.log").open("a") as log:
        subprocess.run(command, cwd=PROJECT, env=os.environ | ONE_THREAD, stdout=log, stderr=log, check=True)
    seconds = time.perf_counter() - began
    show = [sys.executable, "-m", "harness", "show", "demo", "--json", *places]
    shown = subprocess.run(show, cwd=PROJECT, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True)
    return json.loads(shown.stdout) | {"seed": seed, "seconds": seconds}


def outcome(study: dict[str, Any]) -> tuple[str, float, str]:
    """What came of one study: a word, the gain over the base in points, and a line about it."""
    final, comparison = study["final"], study["final"]["comparison"]
    if final["trial"] == 0:
        word, gain, p = "the base", 0.0, "  -"
    else:
        gain, p = 100 * comparison["difference"], f"{comparison['p']:.3f}"
        significant = comparison["p"] < ALPHA
        word = f"{'significantly ' * significant}{'better' if gain > 0 else 'worse' if gain < 0 else 'equal'}"
    trials = ", ".join(f"{number} {state}" for state, number in study["trials"].items() if number)
    line = f"seed {study['seed']:2}: trial {final['trial']}, {gain:+.2f} points, p {p}, {word} ({trials}; "
    return word, gain, line + f"{study['seconds']:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, required=True, help="folder of the studies")
    parser.add_argument("arguments", nargs="*", help="further arguments of the demo, after --")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    print(describe())
    words, gains = [], []
    with ThreadPoolExecutor(args.processes) as pool:
        runs = pool.map(lambda seed: handed_out(seed, args.keep.resolve(), args.arguments), range(args.seeds))
        for word, gain, line in map(outcome, runs):
            print(line, flush=True)
            words.append(word)
            gains.append(gain)
    counted = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
    mean, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    print(f"{counted} of {len(gains)}")
    print(f"gain: mean {mean:+.2f} points, s.e. {error:.2f}, median {statistics.median(gains):+.2f}")


if __name__ == "__main__":
    main()
