"""Measure how long commands take to start, against importing their libraries: `python -m benchmarks.start`

The peer is a new process that imports torch, torchvision, optuna and mlflow, and exits. It is compared with `--help`,
`show` on a started study, and the demo from the command to the end of its first training step: with only the decoded
images, as a new study with an existing MLflow database, and as an interrupted study.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Figures, alternate, ratios, script

PROJECT = Path(__file__).resolve().parent.parent
PEER = "import torch, torchvision, optuna, mlflow"
# The command as it is, with a stop behind the first step; the module is imported at the moment when it would be anyway.
TO_THE_FIRST_STEP = """
import os, sys
from harness.study import coordinator
from harness.cli.commands import process

run_study = coordinator.run_study

def watched(*arguments):
    from harness.training import loop as trainer

    step = trainer.train_step

    def first(*arguments, **options):
        step(*arguments, **options)
        os._exit(77)

    trainer.train_step = first
    return run_study(*arguments)

coordinator.run_study = watched
process(["run", *sys.argv[1:]], program="run_study.py")
"""
STOPPED = 77


def seconds(command: list[str], folder: Path, code: int = 0) -> float:
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    taken = time.perf_counter() - start
    if done.returncode != code:
        sys.exit(f"error: {command} exited with {done.returncode}:\n{done.stdout.decode()}")
    return taken


@contextmanager
def contestants(names: list[str]) -> Iterator[dict[str, Callable[[], float]]]:
    """In a folder of their own, with the demo's images decoded."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "studies").mkdir()
        shutil.copy(PROJECT / "studies" / "demo.py", folder / "studies")
        python, step = sys.executable, [sys.executable, "-c", TO_THE_FIRST_STEP, "--study", "demo"]

        def forget(*names: str) -> None:
            for path in (path for name in names for path in folder.glob(name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        def everything_new() -> float:
            forget("studies/demo.*[!y]", "mlruns")
            return seconds(step, folder, STOPPED)

        def new() -> float:
            forget("studies/demo.*[!y]")
            return seconds(step, folder, STOPPED)

        def resumed() -> float:
            return seconds(step, folder, STOPPED)

        study = [
            "from harness.config import find as c\nfrom harness.store import opening as s",
            "f = c.find('demo')",
        ]
        study += ["with s.open_store(f.study, f.storage_url) as store: store.ask(f.study)"]
        seconds([python, "-c", "\n".join(study)], folder)
        every: dict[str, Callable[[], float]] = {
            "peer": lambda: seconds([python, "-c", PEER], folder),
            "--help": lambda: seconds([python, "-m", "harness", "--help"], folder),
            "show": lambda: seconds([python, "-m", "harness", "show", "demo"], folder),
            "first step, everything new": everything_new,
            "first step, new study": new,
            "first step, resumed": resumed,
        }
        if "first step, everything new" in names:
            everything_new()  # decodes the images
        yield {name: every[name] for name in names}


def compare(names: list[str], rounds: int) -> dict[str, Figures]:
    with contestants(["peer", *names]) as chosen:
        return alternate(chosen, rounds)


def full(rounds: int) -> None:
    names = ["--help", "show", "first step, everything new", "first step, new study", "first step, resumed"]
    figures = compare(names, rounds)
    peer = figures["peer"]
    print(f"{'peer: ' + PEER:<48} {peer.text()}")
    for name in names:
        print(f"{name:<48} {figures[name].text()}; peer / this: {ratios(peer, figures[name]).text('', 2)}")


def quick() -> dict[str, float]:
    figures = compare(["--help", "show"], 2)
    return {f"peer_to_{name.strip('-')}": ratios(figures["peer"], figures[name]).median for name in ("--help", "show")}


if __name__ == "__main__":
    script(full, quick, {"--rounds": {"type": int, "default": 7}})
