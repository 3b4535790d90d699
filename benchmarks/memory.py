"""Measure whether a study's memory grows from trial to trial: `python -m benchmarks.memory`

Runs the demo with few images in its own process: 22 trials of two epochs, with MLflow. Prints the resident set (VmRSS)
after every trial, on CUDA also the allocated and reserved memory, and the ratio of trial 20 to trial 2, counted from 1.
The first trial includes what is loaded once.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import script
from harness.cli.commands import main as command
from harness.config.events import Event, TrialEnded
from harness.report.display import Display

# What comes after the search is not looked at.
SMALL = ("epochs=2", "final.seeds=1", "data.limit=96", "final.compare_base=false", "final.publish=false")


def resident() -> float:
    """This process's resident set in MB, now; where there is no /proc the largest so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(each for each in status.read_text().splitlines() if each.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (1024**2 if sys.platform == "darwin" else 1024)


def measure(folder: str, trials: int, *further: str) -> dict[str, list[float]]:
    """Run the study in this process; megabytes after each of its trials."""
    curves: dict[str, list[float]] = {"resident": []}
    show = Display.show

    def shown(display: Display, event: Event) -> None:
        show(display, event)
        if isinstance(event, TrialEnded):
            curves["resident"].append(resident())
            if torch.cuda.is_available():
                curves.setdefault("CUDA allocated", []).append(torch.cuda.memory_allocated() / 2**20)
                curves.setdefault("CUDA reserved", []).append(torch.cuda.memory_reserved() / 2**20)

    Display.show = shown  # type: ignore[method-assign, assignment]
    places = ["--storage", f"sqlite:///{folder}/study.db", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    settings = [f"--set={each}" for each in (*SMALL, *further, f"data.cache={folder}/cache")]
    assert command(["run", "--study", "demo", "--trials", str(trials), *settings, *places]) == 0
    return curves


def measured(trials: int, *further: str) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys; from benchmarks.memory import child; child(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])"
        environment = os.environ | {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}  # as run_study.py does
        subprocess.run(
            [sys.executable, "-c", code, folder, str(trials), *further],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        curves: dict[str, list[float]] = json.loads((Path(folder) / "curves.json").read_text())
    return curves


def child(folder: str, trials: int, *further: str) -> None:
    curves: Any = measure(folder, trials, *further)
    (Path(folder) / "curves.json").write_text(json.dumps(curves))


def full() -> None:
    for name, curve in measured(22).items():
        print(f"{name}, MB after each trial: {' '.join(f'{value:.0f}' for value in curve)}")
        print(f"{name} after trial 20 / after trial 2: {curve[19] / curve[1]:.3f}")


def quick() -> dict[str, float]:
    curve = measured(6, "epochs=1", *(f"data.{split}_per_class=4" for split in ("train", "val", "test")))["resident"]
    return {"resident after trial 2 / after 6": curve[1] / curve[5]}


if __name__ == "__main__":
    script(full, quick)
