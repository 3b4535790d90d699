"""Measure a whole study against typical scripts: `python -m benchmarks.whole_study --data-root FOLDER`

FOLDER holds torchvision's flowers-102. Each contestant runs from scratch in its own process, timed from its start to
its exit: imports, decoding, ten fixed configurations (the same for all, none pruned), three epochs each, then the best
retrained on train and validation photographs with one seed, tested and saved. All use the same files of photographs, 20
classes of ten per split. With MaxViT-T it is one configuration and one epoch of 68 per split.

The peers are in benchmarks/peers; Lightning and Ray need `pip install -e ".[bench]"`. Ray runs two trials in parallel,
one core each. The harness chooses its precision ("auto"); the peers run in fp32, torch's default, as CPU scripts do.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT_HELP, alternate, ratios, script
from harness.config import find as catalogue
from harness.config.space import get
from harness.datasets.flowers102 import Flowers102
from harness.garden.dataset import Garden
from harness.search.samplers import Grid
from harness.store.opening import read_store

HERE = Path(__file__).parent
ROUNDS = {"tiny": 3, "maxvit": 2}
SPLITS = {"train": "train", "val": "valid", "test": "test"}
PEERS = {  # module and further arguments
    "plain": ("plain",),
    "lightning": ("lightning_study",),
    "ray": ("ray_study", "2"),
}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}  # for everybody: no calls home


def lay_out(folder: Path, root: str, classes: int, per_class: int) -> None:
    """Folders of links to photographs, as many of the first `classes` classes of each official split."""
    for split, name in SPLITS.items():
        taken = [0] * classes
        for path, label in Flowers102(root=root).samples(split):  # type: ignore[arg-type]
            if label < classes and taken[label] < per_class:
                taken[label] += 1
                place = folder / name / f"{label:03}"
                place.mkdir(parents=True, exist_ok=True)
                (place / path.name).symlink_to(path.resolve())


def draw(folder: Path, per_class: int) -> None:
    """The same with drawn flowers of the photographs' size, where there are no photographs."""
    garden = Garden(
        image_size=64,
        stored_size=64,
        train_per_class=per_class,
        val_per_class=per_class,
        test_per_class=per_class,
    )
    for split, name in SPLITS.items():
        for number, (item, label) in enumerate(garden.samples(split)):  # type: ignore[arg-type]
            place = folder / name / f"{label:03}"
            place.mkdir(parents=True, exist_ok=True)
            garden.open(item).resize((341, 256)).save(place / f"{number}.jpg", quality=78)


def write_job(out: Path, model: str, photographs: Path, trials: int, epochs: int) -> Path:
    """The study file's definition as the peers read it."""
    study = catalogue.find(str(HERE / "peers" / f"{model}.py")).study
    fields = ("depth_lr_mult", "weight_decay", "warmup_epochs", "clip_norm")
    assert isinstance(study.sampler, Grid)
    points = study.sampler.points(study)[:trials]
    job: dict[str, Any] = {
        "model": model,
        "photographs": str(photographs),
        "image_size": study.train.data.image_size,
        "epochs": epochs,
        "batch_size": study.train.batch_size,
        "label_smoothing": study.train.label_smoothing,
        "configurations": [{"base_lr": p["optim.base_lr"], "dropout": p["backbone.dropout"]} for p in points],
    } | {field: get(study.train, f"optim.{field}") for field in fields}
    file = out / "job.json"
    file.write_text(json.dumps(job))
    return file


def timed(command: list[str], out: Path) -> float:
    """Seconds from the start of a process to its exit."""
    environment = os.environ | QUIET | {"PYTHONPATH": str(HERE.parent)}
    with (out / "log.txt").open("w") as log:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} exited with {done.returncode}:\n{(out / 'log.txt').read_text()[-3000:]}")
    return seconds


class Contest:
    """The contestants of one model on one set of photographs, and the accuracies of each one's last run."""

    def __init__(self, model: str, photographs: Path, trials: int, epochs: int, peers: list[str]) -> None:
        self._model, self._photographs, self._trials, self._epochs = model, photographs, trials, epochs
        self.accuracies: dict[str, tuple[list[float], float]] = {}
        self.contestants: dict[str, Callable[[], float]] = {"harness": self._harness}
        self.contestants |= {name: functools.partial(self._peer, name) for name in peers}

    def _harness(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            out, model = Path(folder), self._model
            (out / "studies").mkdir()
            shutil.copy(HERE / "peers" / f"{model}.py", out / "studies")
            command = [sys.executable, str(HERE.parent / "run_study.py"), "--study", model]
            command += ["--trials", str(self._trials), "--set", f"epochs={self._epochs}"]
            seconds = timed([*command, "--data-root", str(self._photographs)], out)
            with read_store(model, f"sqlite:///{out}/studies/{model}.db") as store:
                values = [trial.value or 0.0 for trial in store.trials()]
                final = store.facts().final
                assert final is not None
                self.accuracies["harness"] = values, final.accuracy
        return seconds

    def _peer(self, name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            job = write_job(out, self._model, self._photographs, self._trials, self._epochs)
            module, *further = PEERS[name]
            command = [sys.executable, "-m", f"benchmarks.peers.{module}", str(job), str(out), *further]
            seconds = timed(command, out)
            found = json.loads((out / "accuracies.json").read_text())
            self.accuracies[name] = found["validation"], found["test"]
        return seconds

    def compare(self, rounds: int) -> float:
        """Print seconds, accuracies and ratios; returns the harness's share of the fastest peer's time."""
        taken = alternate(self.contestants, rounds)
        for name, figures in taken.items():
            values, test = self.accuracies[name]
            percent = " ".join(f"{100 * value:.0f}" for value in values)
            print(f"{name:<10} {figures.text(digits=1):<36} validation {percent} %, test {100 * test:.1f} %")
        shares = {name: ratios(taken["harness"], taken[name]) for name in taken if name != "harness"}
        for name, figures in shares.items():
            print(f"harness / {name:<10} {figures.text('', 3)}")
        return max(figures.median for figures in shares.values())


def installed(names: list[str]) -> list[str]:
    """The peers whose packages are here; says which are not."""
    missing = [name for name in names if name != "plain" and importlib.util.find_spec(name) is None]
    if missing:
        print(f"Not measured, because the package is not installed: {', '.join(missing)} (pip install -e '.[bench]').")
    return [name for name in names if name not in missing]


def full(data_root: str | None) -> None:
    if data_root is None:
        sys.exit("error: give the folder above flowers-102 with --data-root.")
    with tempfile.TemporaryDirectory() as folder:
        tiny, large = Path(folder) / "tiny", Path(folder) / "maxvit"
        lay_out(tiny, data_root, classes=20, per_class=10)
        lay_out(large, data_root, classes=34, per_class=2)
        print("tiny MaxViT, 10 trials of 3 epochs, 200 photographs per split")
        Contest("tiny", tiny, 10, 3, installed(list(PEERS))).compare(ROUNDS["tiny"])
        print("MaxViT-T, 1 trial of 1 epoch, 68 photographs per split")
        Contest("maxvit", large, 1, 1, installed(["plain", "lightning"])).compare(ROUNDS["maxvit"])


def quick() -> dict[str, float]:
    """Against the plain script, on drawn flowers."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder)
        draw(drawn, per_class=2)
        contest = Contest("tiny", drawn, 1, 1, ["plain"])
        return {"plain / harness": 1 / contest.compare(1)}


if __name__ == "__main__":
    script(full, quick, {"--data-root": {"help": ROOT_HELP}})
