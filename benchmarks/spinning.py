"""Measure what OpenMP's spinning threads cost two processes on the same cores: `python -m benchmarks.spinning`

Times training steps of the tiny MaxViT with two threads for several values of GOMP_SPINCOUNT, alone and beside a second
process that does the same. Every setting runs in its own process, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

SETTINGS = (None, "50000", "10000", "1000")
STEPS, WARM_UP = 12, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # the child's mode
    args = parser.parse_args()
    if args.steps is not None:
        _steps(args.steps)
        return
    from benchmarks.machine import describe

    print(describe())
    for beside in (False, True):
        seconds: dict[str | None, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(args.rounds):
            for setting in SETTINGS:
                rival = _start(setting, steps=10_000) if beside else None
                time.sleep(8 if beside else 0)  # until the other process trains
                output, _ = _start(setting, STEPS).communicate()
                seconds[setting].append(float(output))
                if rival is not None:
                    rival.kill()
                    rival.wait()
        for setting, each in seconds.items():
            print(
                f"{'beside another' if beside else 'alone':>15}, GOMP_SPINCOUNT {setting or 'default':>8}: median step "
                f"{statistics.median(each):.3f} s ({min(each):.3f} to {max(each):.3f}, {args.rounds} rounds)"
            )


def _start(setting: str | None, steps: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **({"GOMP_SPINCOUNT": setting} if setting else {})}
    command = [sys.executable, "-m", "benchmarks.spinning", "--steps", str(steps)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _steps(count: int) -> None:
    import torch

    from harness.config.train import RuntimeConfig
    from harness.models.maxvit import TinyMaxViT
    from harness.training.runtime import resolve
    from harness.training.step import train_step

    def build() -> torch.nn.Module:
        return TinyMaxViT(pretrained=False).build(classes=16, image_size=64)

    runtime = resolve(RuntimeConfig(device="cpu", precision="fp32", channels_last="on"), build, 64)
    model = runtime.place(build())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = runtime.move(torch.randn(24, 3, 64, 64)), torch.zeros(24, dtype=torch.int64)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        train_step(model, images, labels, optimizer, runtime, label_smoothing=0.1, clip_norm=1.0)
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds[WARM_UP:]))


if __name__ == "__main__":
    main()
