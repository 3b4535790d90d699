"""Measure parts of the training recipe by their test accuracy: `python -m benchmarks.recipe`

Fine-tunes EfficientNet-Lite0 (ImageNet weights) on the 1,020 training images of Flowers-102 with each part alone, from
several seeds, and compares with today's recipe from the same seeds, at equal epochs. A test image is evaluated once per
training and decides nothing: what is kept is chosen by the validation images. KEEP holds finished trainings, one JSON
line each; a training resumes from a checkpoint.

Takes some hours; requires the extra `lite`, and the photographs in ../shared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from benchmarks.curves import SHARED, record
from benchmarks.machine import describe
from harness.config import space
from harness.config.train import OptimConfig, RuntimeConfig, TrainConfig, identity, is_default
from harness.datasets.flowers102 import Flowers102
from harness.models.timm import EfficientNetLite0
from harness.training.checkpoint import remove

KEEP = Path(__file__).with_name("recipe.jsonl")
TODAY = "today"
VALIDATION_IMAGES = 1020
RECIPES: dict[str, dict[str, Any]] = {
    TODAY: {},
    "mixup 0.2": {"augment.mixup": 0.2},
    "cutmix 1": {"augment.cutmix": 1.0},
    "average 0.1": {"ema": 0.1},
    "TrivialAugment": {"augment.trivial_augment": True},
    "random erasing 0.25": {"augment.random_erasing": 0.25},
    "96 px, then full size": {"augment.early_size": 96, "augment.tail": 0.25},
    "SGD 0.05": {"optim.name": "sgd", "optim.base_lr": 0.05, "optim.weight_decay": 1e-4},
    "floor 0.05": {"optim.lr_floor": 0.05},
    "head first, 2 epochs": {"optim.head_epochs": 2},
    "no weight decay": {"optim.weight_decay": 0.0},
    "weight decay 0.1": {"optim.weight_decay": 0.1},
    "no label smoothing": {"label_smoothing": 0.0},
    "no rotation": {"augment.rotation_degrees": 0.0},
    "batch of 17": {"batch_size": 17},
    "crops from 0.25": {"augment.crop_scale": (0.25, 1.0)},
    "stochastic depth 0.1": {"backbone.stochastic_depth": 0.1},
    "label smoothing 0.2": {"label_smoothing": 0.2},
    # Touvron et al., 2019: what is cut at random looks larger than what is evaluated. Takes as long as today's.
    "trained at 112 px, evaluated at 160": {
        "data.stored_size": 183,
        "data.image_size": 160,
        "augment.early_size": 112,
        "augment.tail": 0.0,
    },
    # A crop of half the area has 103 x 103 pixels of 146 x 146: it would be enlarged.
    "images kept at 256 px": {"data.stored_size": 256},
    # Stem and first two stages: an epoch takes 0.8 of the time, so 15 epochs take as long as today's 12.
    "3 frozen depths": {"optim.frozen_depths": 3},
    "3 frozen depths, 15 epochs": {"optim.frozen_depths": 3, "epochs": 15},
    "head first, no weight decay, floor": {
        "optim.head_epochs": 2,
        "optim.weight_decay": 0.0,
        "optim.lr_floor": 0.05,
    },
}


def base(cache: Path, size: int, epochs: int) -> TrainConfig:
    """The base configuration of `flowers102_lite`, at another image size."""
    return TrainConfig(
        data=Flowers102(root=str(SHARED), image_size=size, stored_size=size * 8 // 7, cache=str(cache)),
        backbone=EfficientNetLite0(hidden=(512,), dropout=0.2),
        optim=OptimConfig(base_lr=2e-3, depth_lr_mult=0.8, weight_decay=0.02, warmup_epochs=1),
        runtime=RuntimeConfig(device="cpu", precision="fp32", channels_last="on", compile="off"),
        batch_size=34,
        epochs=epochs,
    )


def configured(recipe: str, folder: Path, size: int, epochs: int) -> TrainConfig:
    config = base(folder / "cache", size, epochs)
    for path, value in RECIPES[recipe].items():
        config = space.replace(config, path, value)
    return config


def definition(config: TrainConfig) -> str:
    """Return what identifies a configuration. Fields at their defaults do not count: later versions have more."""
    found = identity(config).items()
    chosen = {path: value for path, value in found if path.endswith(".type") or not is_default(config, path)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def kept(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in keep.read_text().splitlines()] if keep.exists() else []


def trained(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train one recipe from one seed; in a process of its own."""
    config = configured(job["recipe"], folder, job["size"], job["epochs"])
    file = folder / f"{job['recipe']}-{job['size']}-{job['epochs']}-{job['seed']}.safetensors"
    found = record(config, job["seed"], file, flip=True)
    last = found["epochs"][-1]
    # A training that diverged has learned nothing.
    measured = {"val_correct": last["val_correct"] or 0, "test_correct": found["test_correct"] or 0}
    about = {"definition": definition(config), "machine": describe()}
    other = {"test_total": found["test_total"], "test_flipped": found["test_flipped"]}
    seconds = {"seconds": round(found["seconds"], 1)}
    return {**job, **measured, **other, **seconds, **about, "checkpoint": str(file)}


def begin(threads: int) -> None:
    """Prepare a process: it ends with the one that started it, else it would train on unseen."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def train(
    jobs: Sequence[dict[str, Any]], keep: Path, folder: Path, processes: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Run the jobs, and add a line for each to `keep` as it ends."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, begin, (threads,)) as pool:
        for done in as_completed([pool.submit(trained, job, folder) for job in jobs]):
            found = done.result()
            checkpoint = Path(found.pop("checkpoint"))
            with keep.open("a") as file:
                file.write(json.dumps(found) + "\n")
            remove(checkpoint)
            yield found


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print mean accuracies, and the differences from TODAY, paired over the seeds, with 95 % intervals.

    The validation images decide what is kept; the test images say what it is worth.
    """
    found = {name: {each["seed"]: each for each in lines if each["recipe"] == name} for name in RECIPES}
    for machine in sorted({each["machine"] for each in lines}):
        print(machine)
    print(
        "| recipe | n | validation | difference, points | test accuracy | difference, points | p | seconds a training |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        if not runs:
            continue
        val, test = (accuracies(found, name, split) for split in ("val", "test"))
        seconds = statistics.median(run["seconds"] for run in runs.values())
        print(f"| {name} | {len(runs)} | {val[0]} | {val[1]} | {test[0]} | {test[1]} | {test[2]} | {seconds:.0f} |")
    if len(lines) > 1:  # of the same models; the validation images were not mirrored
        gain, p = difference([100 * run["test_flipped"] - percent(run, "test") for run in lines])
        print(f"\nAveraged over image and mirror image, all {len(lines)} trainings: {gain} points, p = {p}")


def accuracies(found: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str, split: str) -> tuple[str, str, str]:
    """Return the mean accuracy of a recipe, its difference from TODAY with the interval, and its p."""
    share, today = ({seed: percent(run, split) for seed, run in found[each].items()} for each in (name, TODAY))
    paired = [value - today[seed] for seed, value in share.items() if name != TODAY and seed in today]
    return (f"{statistics.fmean(share.values()):.2f} %", *(difference(paired) if len(paired) > 1 else ("", "")))


def difference(paired: Sequence[float]) -> tuple[str, str]:
    """Return the mean of paired differences with its 95 % interval, and p (Student's t)."""
    gain = statistics.fmean(paired)
    half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / math.sqrt(len(paired))
    return f"{gain:+.2f} ({gain - half:+.2f} to {gain + half:+.2f})", f"{stats.ttest_1samp(paired, 0).pvalue:.2g}"


def percent(run: Mapping[str, Any], split: str) -> float:
    return 100 * float(run[f"{split}_correct"]) / float(run.get(f"{split}_total", VALIDATION_IMAGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="names of recipes (default: all)")
    parser.add_argument("--keep", type=Path, default=KEEP)
    parser.add_argument("--folder", type=Path, default=Path("recipe"), help="of checkpoints and the image cache")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--table", action="store_true", help="train nothing; print what KEEP has")
    args = parser.parse_args()
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        sys.exit(f"error: there is no recipe {unknown[0]!r}; choose from {', '.join(RECIPES)}.")
    # Those of another configuration of the same name do not count.
    now = {name: definition(configured(name, args.folder, args.size, args.epochs)) for name in RECIPES}
    lines = [each for each in kept(args.keep) if each["definition"] == now.get(each["recipe"])]
    if not args.table:
        if not (SHARED / "flowers-102").is_dir():
            sys.exit(f"error: the photographs are not in {SHARED}.")
        args.folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            {"recipe": name, "size": args.size, "epochs": args.epochs, "seed": seed}
            for seed in range(args.first_seed, args.first_seed + args.seeds)
            for name in args.recipes
        ]
        missing = [job for job in jobs if not any(job.items() <= line.items() for line in lines)]
        for found in train(missing, args.keep, args.folder, args.processes, args.threads):
            print(found, flush=True)
            lines.append(found)
    show(lines)


if __name__ == "__main__":
    main()
