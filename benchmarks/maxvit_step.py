"""Measure a training step on a CPU, of MaxViT-T and of EfficientNet-Lite0: `python -m benchmarks.maxvit_step`

Compares in turns the harness's step (precision and memory layout by "auto", fused AdamW, with gradient norm and
clipping) with a plain one: eager fp32, torch's defaults, no clipping. For EfficientNet-Lite0 the plain one has channels
last, which is faster there. Images and weights are random. Each runs in its own process, because the harness changes
how its process allocates memory; one waits while the other computes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measure import alternate, ratios, script
from harness.config import find as catalogue
from harness.config.train import RuntimeConfig, TrainConfig
from harness.training.optim import build_optimizer, parameter_groups
from harness.training.runtime import resolve
from harness.training.step import Runtime, train_step

CLASSES, SIDE = 102, 224
MAXVIT, LITE = "flowers102", "flowers102_lite"  # studies


def config(study: str) -> TrainConfig:
    train: Any = catalogue.find(study).study.train
    backbone = dataclasses.replace(train.backbone, pretrained=False)
    return dataclasses.replace(train, backbone=backbone, runtime=RuntimeConfig(device="cpu"))


def batch(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(images, 3, SIDE, SIDE, generator=generator),
        torch.randint(CLASSES, (images,), generator=generator),
    )


def plain(study: str, images: int) -> Callable[[], float]:
    """The seconds of a step as anybody would write it."""
    layout = torch.channels_last if study == LITE else torch.contiguous_format
    model = config(study).backbone.build(CLASSES, SIDE).train().to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.02)
    inputs, labels = batch(images)
    inputs = inputs.contiguous(memory_format=layout)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        loss.item()
        return time.perf_counter() - start

    return step


def ours(study: str, images: int, runtime: Runtime) -> Callable[[], float]:
    """The seconds of the harness's step."""
    train = config(study)
    model = runtime.place(train.backbone.build(CLASSES, SIDE)).train()
    groups = parameter_groups(model, train.backbone.depths("block"), train.optim)
    optimizer = build_optimizer(model, groups, train.optim)
    inputs, labels = batch(images)

    def step() -> float:
        start = time.perf_counter()
        train_step(
            model,
            runtime.move(inputs),
            labels,
            optimizer,
            runtime,
            label_smoothing=0.1,
            clip_norm=train.optim.clip_norm,
        )
        return time.perf_counter() - start

    return step


def serve(channel: Connection, study: str, images: int, runtime: Runtime | None) -> None:
    """A contestant's process: a step whenever it is asked for one. Without a runtime it is the plain one."""
    step = plain(study, images) if runtime is None else ours(study, images, runtime)
    while channel.recv():
        channel.send(step())


@contextmanager
def contestant(study: str, images: int, runtime: Runtime | None) -> Iterator[Callable[[], float]]:
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, study, images, runtime))
    process.start()
    there.close()  # else a dead process would be waited for

    def step() -> float:
        here.send(True)
        seconds: float = here.recv()
        return seconds

    try:
        yield step
        here.send(False)
        process.join()
    finally:
        process.kill()


def compare(study: str, sizes: Sequence[int], rounds: int) -> dict[int, float]:
    found, runtime = {}, chosen(study)
    for images in sizes:
        with contestant(study, images, None) as one, contestant(study, images, runtime) as other:
            contestants = {"plain eager fp32": one, "harness": other}
            alternate(contestants, 1)  # a warm-up
            seconds = alternate(contestants, rounds)
        gain = ratios(seconds["plain eager fp32"], seconds["harness"])
        found[images] = gain.median
        for name, each in seconds.items():
            print(f"batch {images}, {name}: {each.text()}, {images / each.median:.2f} images/s")
        print(f"batch {images}, plain / harness: {gain.text('')}", flush=True)
    return found


def chosen(study: str) -> Runtime:
    train = config(study)
    runtime = resolve(train.runtime, lambda: train.backbone.build(CLASSES, SIDE), SIDE)
    print(f"{study}: auto chose {runtime.to_dict()}", flush=True)
    return runtime


def full() -> None:
    compare(MAXVIT, [16, 34], 5)
    compare(LITE, [16, 34], 9)


def quick() -> dict[str, float]:
    # Where the processor has no bf16 instructions, "auto" is fp32, and the record does not hold.
    return {f"plain / harness, batch {size}": gain for size, gain in compare(MAXVIT, [4], 2).items()}


if __name__ == "__main__":
    script(full, quick)
