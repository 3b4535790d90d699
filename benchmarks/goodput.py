"""Measure the share of training and validation in a study's time: `python -m benchmarks.goodput`

Runs the demo (10 trials and the final run) in its own process, with nothing cached, and prints the seconds by name. The
goodput is the time in training steps, with the augmentation of their images, and in validation, divided by the
wall-clock time from the process's start to its exit without the imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Figures, script

STUDIES = 3
GOOD = ("training steps", "augmentation", "validation")


def measured(*arguments: str) -> dict[str, float]:
    """The seconds by name of a study in a process of its own, with that process's start and exit."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        command = [sys.executable, "-c", "from benchmarks.accounts import child; child()", folder, *arguments]
        subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL, check=True)
        ended = time.time()
        child = json.loads((Path(folder) / "seconds.json").read_text())
    seconds: dict[str, float] = child["seconds"]
    return seconds | {"interpreter: start": child["began"] - began, "interpreter: exit": ended - child["ended"]}


def goodput(seconds: dict[str, float]) -> float:
    """The share of training and validation in all that is no import."""
    return sum(seconds.get(name, 0) for name in GOOD) / (sum(seconds.values()) - seconds.get("imports", 0))


def full() -> None:
    studies = [measured("--trials", "10") for _ in range(STUDIES)]
    names = {name for seconds in studies for name in seconds}
    table = {name: Figures(tuple(seconds.get(name, 0.0) for seconds in studies)) for name in names}
    after = Figures(tuple(sum(seconds.values()) - seconds.get("imports", 0) for seconds in studies))
    for name, figures in sorted(table.items(), key=lambda item: -item[1].median):
        share = "counted separately" if name == "imports" else f"{100 * figures.median / after.median:.2f} %"
        print(f"{name:<26} {figures.text():<44} {share}")
    print(f"{'wall-clock after imports':<26} {after.text()}")
    print(f"goodput {Figures(tuple(map(goodput, studies))).text('', 4)}")


def quick() -> dict[str, float]:
    """Two short trials; publishing the model, once a study, would take longer than all of them."""
    small = ["epochs=2", "final.seeds=1", "final.publish=false"]
    small += [f"data.{split}_per_class=4" for split in ("train", "val", "test")]
    return {"goodput": goodput(measured("--trials", "2", *(f"--set={each}" for each in small)))}


if __name__ == "__main__":
    script(full, quick)
