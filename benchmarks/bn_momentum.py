"""Measure how BatchNorm's momentum affects early validation: `python -m benchmarks.bn_momentum`

Trains the demo's base configuration with torchvision's 0.01 and with 0.1 on the same seeds, and prints the validation
accuracy after every epoch. Pruning uses the first epochs, where the pretrained statistics are the stalest.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import torch

from benchmarks.machine import describe
from harness.config.find import find
from harness.config.space import replace
from harness.data.splits import prepare
from harness.training.assemble import assemble, decide_runtime
from harness.training.loop import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = find("demo")
    config = found.study.located(found.home, None, None).train
    prepare(config.data, config.backbone.preprocessing())
    runtime = decide_runtime(config, None)
    curves: dict[float, list[list[float]]] = {0.01: [], 0.1: []}
    for seed in range(args.seeds):
        for momentum, runs in curves.items():
            training = assemble(replace(config, "backbone.bn_momentum", momentum), runtime, seed)
            runs.append([100 * result.val.accuracy for result in fit(training) if result.val is not None])
    print(describe())
    print(f"validation accuracy, % of {len(training.val or ())} images, median of {args.seeds} seeds (min to max)")
    for momentum, runs in curves.items():
        cells = [f"{statistics.median(e):.1f} ({min(e):.1f} to {max(e):.1f})" for e in zip(*runs, strict=True)]
        print(f"momentum {momentum:<4}  " + "  ".join(cells))
    print(dataclasses.asdict(config.optim))


if __name__ == "__main__":
    main()
