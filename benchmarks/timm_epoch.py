"""Compare an epoch of EfficientNet-Lite0 with timm's training script: `python -m benchmarks.timm_epoch TRAIN_PY`

TRAIN_PY is train.py of timm's repository; the package has none. Both train two epochs on the 1,020 training images of
Flowers-102 at 224 pixels from random weights (batch 34, fp32, channels last, AdamW, label smoothing), in processes of
their own, by turns; timm with one loading process. Prints images per second in the second epoch, without validation.

Requires the extra `lite`, and the photographs in ../shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.curves import SHARED
from benchmarks.machine import describe
from benchmarks.measure import alternate, ratios
from benchmarks.recipe import base
from harness.config import space
from harness.datasets.flowers102 import Flowers102
from harness.training.assemble import assemble, decide_runtime
from harness.training.loop import fit

OPTIONS = shlex.split(
    "--model tf_efficientnet_lite0 --num-classes 102 -b 34 --epochs 2 --warmup-epochs 0 --sched cosine --opt adamw "
    "--lr 2e-3 --weight-decay 0.02 --smoothing 0.1 --workers 1 --device cpu --channels-last --img-size 224 "
    "--log-interval 10"
)
SECOND_EPOCH = re.compile(r"Train: 1 \[ *29/30.*\( *[\d.]+s, +([\d.]+)/s\)")  # the epoch's mean in parentheses


def folders(place: Path) -> None:
    """Lay the photographs out in a folder for each class, as timm reads them; its validation has one of each class."""
    data = Flowers102(root=str(SHARED))
    for name, samples in (("train", data.samples("train")), ("validation", data.samples("val")[::10])):
        for photograph, label in samples:
            folder = place / name / f"{label:03}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / photograph.name).symlink_to(photograph.resolve())


def said(command: list[str]) -> str:
    """Return what a command prints; it ends this program if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def of_timm(program: Path, place: Path) -> float:
    """Return timm's images per second."""
    text = said([sys.executable, str(program), "--data-dir", str(place), "--output", str(place / "out"), *OPTIONS])
    found = SECOND_EPOCH.search(text)
    if found is None:
        sys.exit(f"error: {program} does not print its images per second as timm 1.0 does:\n{text[-2000:]}")
    return float(found[1])


def of_harness(place: Path) -> float:
    """Return the harness's images per second, in a process of its own."""
    return float(said([sys.executable, "-m", "benchmarks.timm_epoch", "--harness", str(place)]).split()[-1])


def train(place: Path) -> None:
    """Train two epochs with the harness, and print images per second of the second."""
    config = base(place / "cache", size=224, epochs=2)
    config = space.replace(config, "backbone.pretrained", False)
    training = dataclasses.replace(assemble(config, decide_runtime(config, None), seed=0), val=None)
    last = list(fit(training))[-1]
    print(last.train.total / last.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="timm's train.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--harness", action="store_true", help=argparse.SUPPRESS)  # with a folder as program
    args = parser.parse_args()
    if args.harness:
        return train(args.program)
    if not args.program.is_file():
        sys.exit(f"error: there is no {args.program}; give train.py of timm's repository.")
    if not (SHARED / "flowers-102").is_dir():
        sys.exit(f"error: the photographs are not in {SHARED}.")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        folders(place)
        sides = {"harness": partial(of_harness, place), "timm": partial(of_timm, args.program, place)}
        found = alternate(sides, args.rounds)
    for name, figures in found.items():
        print(f"{name:<8} {figures.text('images/s', 1)}")
    print(f"harness / timm {ratios(found['harness'], found['timm']).text('', 2)}")


if __name__ == "__main__":
    main()
