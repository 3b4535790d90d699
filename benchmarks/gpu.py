"""Measure one GPU: images/s and MFU of MaxViT-T training, graphs compiled after trial 1, memory, a whole study.

    python -m benchmarks.gpu                  on a GPU; on a CPU the same with the tiny model

Compares in turns eager fp32, eager bf16, timm's maxvit_tiny_rw_224 in bf16 (if timm is installed), and the harness's
step (bf16, channels last, blocks compiled, fused AdamW, clipping). Images are noise on the device. The study (50 trials
of 15 epochs and the final run) needs Optuna and MLflow, and is skipped if they are missing.

The parts run in the order of their worth, and one that fails does not stop the others. With --keep FILE, what they
print is added to FILE, and a second run begins with the parts that are not in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import Figures, alternate, ratios, script
from harness.base.errors import Told, first_line
from harness.config.contracts import SplitName
from harness.config.train import OptimConfig, RuntimeConfig, TrainConfig
from harness.models.maxvit import MaxViTT, TinyMaxViT
from harness.training.assemble import assemble, compilable
from harness.training.checkpoint import fingerprint
from harness.training.loop import fit
from harness.training.optim import build_optimizer, parameter_groups
from harness.training.step import Runtime, compile_parts, free_memory, is_out_of_memory, train_step

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIDE = 224 if CUDA else 64
BATCHES = (34, 256) if CUDA else (34,)
BACKBONE: Any = MaxViTT(pretrained=False) if CUDA else TinyMaxViT(pretrained=False, stochastic_depth=0.2)
GFLOP = 33.3  # of one training image of MaxViT-T at 224 px, forward and backward
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}  # dense bf16, from the data sheets
STEPS = 10 if CUDA else 2
TRIALS, EPOCHS = 50, 15
PLAIN = Runtime(device=DEVICE, bf16=False, channels_last=False)
HARNESS = Runtime(device=DEVICE, bf16=CUDA, channels_last=True, compiled=True)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """As many images as Flowers-102 has, each of random pixels."""

    image_size: int = SIDE
    stored_size: int = 256 if CUDA else 72
    limit: int | None = None
    cache: str = dataclasses.field(default="", metadata={"identity": False})
    images: int = 1020 if CUDA else 68

    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(102 if CUDA else 4)))

    def samples(self, split: SplitName) -> Sequence[tuple[Any, int]]:
        return [((split, number), number % len(self.classes())) for number in range(self.images)]

    def stamp(self, item: Any) -> str:
        return f"noise {item}"

    def content(self, item: Any) -> bytes:
        return self.stamp(item).encode()

    def open(self, item: Any) -> Image.Image:
        side = self.stored_size
        pixels = np.random.default_rng(item[1]).integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def config(cache: str, base_lr: float = 6e-4, depth_lr_mult: float = 0.6) -> TrainConfig:
    runtime = RuntimeConfig(device=DEVICE.type, compile="on")
    optim = OptimConfig(base_lr=base_lr, depth_lr_mult=depth_lr_mult)
    return TrainConfig(data=Noise(cache=cache), backbone=BACKBONE, optim=optim, runtime=runtime, epochs=2)


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    images = torch.randn(size, 3, SIDE, SIDE, generator=generator, device=DEVICE)
    return images, torch.arange(size, device=DEVICE) % 4


def timed(step: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of one of STEPS steps, the device waited for at the end only."""

    def run() -> float:
        _wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait()
        return (time.perf_counter() - start) / STEPS

    return run


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def eager(model: nn.Module, size: int, bf16: bool) -> Callable[[], float]:
    """A step as anybody would write it."""
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = batch(size)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()

    return as_usual(timed(step))


def as_usual(measured: Callable[[], float]) -> Callable[[], float]:
    """Measure with torch's defaults, which the harness changes for the whole process."""

    def run() -> float:
        deterministic, tf32 = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = True
        try:
            return measured()
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.allow_tf32 = tf32

    return run


def harness(size: int, runtime: Runtime) -> Callable[[], float]:
    train = config("")
    model = runtime.place(BACKBONE.build(102, SIDE)).train()
    if runtime.compiled:
        compile_parts(model, compilable(train))
    groups = parameter_groups(model, BACKBONE.depths("block"), train.optim)
    optimizer = build_optimizer(model, groups, train.optim)
    images, labels = batch(size)
    return timed(
        lambda: train_step(model, runtime.move(images), labels, optimizer, runtime, label_smoothing=0.1, clip_norm=1.0)
    )


def contestants(size: int, runtime: Runtime) -> dict[str, Callable[[], float]]:
    found = {
        "eager fp32": eager(BACKBONE.build(102, SIDE), size, bf16=False),
        "eager bf16": eager(BACKBONE.build(102, SIDE), size, bf16=True),
        "harness": harness(size, runtime),
    }
    if CUDA and importlib.util.find_spec("timm"):
        import timm

        found["timm bf16"] = eager(timm.create_model("maxvit_tiny_rw_224", num_classes=102), size, bf16=True)
    return found


def speed(size: int, rounds: int, runtime: Runtime) -> Figures:
    """Print images/s of all contestants; returns the ratio of eager bf16's seconds to the harness's."""
    steps = {}
    for name, step in contestants(size, runtime).items():
        start = time.perf_counter()
        try:
            step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"batch {size}, {name}: out of memory", flush=True)
            continue
        finally:
            free_memory(DEVICE)
        steps[name] = step
        print(f"batch {size}, {name}: warm-up {time.perf_counter() - start:.1f} s", flush=True)
    seconds = alternate(steps, rounds)
    for name, each in seconds.items():
        rate = Figures(tuple(size / value for value in each.values))
        mfu = _mfu(rate.median) if name in ("eager bf16", "harness") else ""  # others compute another model, or fp32
        print(f"batch {size}, {name}: {rate.text('images/s', 1)}{mfu}")
    if lacking := {"eager bf16", "harness"} - seconds.keys():
        raise MemoryError(f"no ratio without {' and '.join(sorted(lacking))}")
    gain = ratios(seconds["eager bf16"], seconds["harness"])
    print(f"batch {size}, eager bf16 / harness: {gain.text('', 2)}", flush=True)
    return gain


def _mfu(images_per_second: float) -> str:
    name = torch.cuda.get_device_name() if CUDA else ""
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    return "" if peak is None else f", MFU {images_per_second * GFLOP / peak / 10:.1f} %"


def trials(count: int) -> None:
    """Graphs compiled in each of several trials with other hyperparameters, and the memory after each."""
    from torch._dynamo.utils import counters

    with tempfile.TemporaryDirectory() as cache:
        for number in range(count):
            counters.clear()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            train = config(cache, base_lr=1e-4 * (number + 1), depth_lr_mult=0.0 if number == 2 else 0.3 + 0.1 * number)
            backbone = dataclasses.replace(
                BACKBONE, dropout=0.1 * number, stochastic_depth=0.1 + 0.05 * number, hidden=(256 * (1 + number % 2),)
            )
            list(fit(assemble(dataclasses.replace(train, backbone=backbone), HARNESS, number)))
            memory = f", at most {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved" if CUDA else ""
            print(
                f"trial {number + 1}: {counters['stats']['unique_graphs']} graphs compiled, "
                f"{time.perf_counter() - start:.1f} s{memory}",
                flush=True,
            )


def study(keep: Path | None) -> None:
    """A whole study through the command, in a process of its own."""
    if absent := [name for name in ("optuna", "mlflow") if not importlib.util.find_spec(name)]:
        raise RuntimeError(f"not measured, {' and '.join(absent)} not installed")
    if not CUDA:
        raise RuntimeError("not measured, no GPU")
    text = (
        "from benchmarks.gpu import Noise, BACKBONE, config\n"
        "from harness.config.study import Study\nfrom harness.config.space import Float\n"
        "from harness.search.pruners import asha\nfrom harness.search.samplers import tpe\n"
        "import dataclasses\n"
        f"STUDY = Study(name='gpu', train=dataclasses.replace(config('cache'), epochs={EPOCHS}), sampler=tpe(),\n"
        "    pruner=asha(min_epochs=5), space={'optim.base_lr': Float(1e-5, 3e-3, log=True),\n"
        "    'optim.depth_lr_mult': Float(0.1, 1.0), 'backbone.dropout': Float(0.0, 0.6)})\n"
    )
    with contextlib.ExitStack() as kept:
        place = keep.with_suffix(".study") if keep else kept.enter_context(tempfile.TemporaryDirectory())
        folder = Path(place).resolve()  # the study's process runs there
        folder.mkdir(exist_ok=True)
        file, runs = folder / "gpu.py", folder / "began"  # a line for each process
        file.write_text(text)
        with runs.open("a") as began:
            began.write(f"{time.time()}\n")
        command = [sys.executable, "-m", "harness", "run", "--study", str(file), "--trials", str(TRIALS)]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        count, seconds = len(runs.read_text().splitlines()), time.perf_counter() - start
        took = f"{seconds:.0f} s" if count == 1 else f"{seconds:.0f} s for the last of {count} runs, each resumed"
        print(f"study of {TRIALS} trials of {EPOCHS} epochs, with its final run: {took}")


def same_bits() -> None:
    """Print whether two compiled trainings from one seed end with the same weights."""
    found = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            training = assemble(config(cache), HARNESS, 0)
            list(fit(training))
            found.append(fingerprint(training.model.state_dict()))
    print(f"two compiled trainings: {'the same bits' if found[0] == found[1] else 'DIFFERENT bits'}", flush=True)


PARTS: dict[str, Callable[[], Any]] = {
    "same bits": same_bits,
    **{f"batch {size}": partial(speed, size, 5, HARNESS) for size in BATCHES},
    "trials": partial(trials, 4),
}


def full(keep: Path | None) -> None:
    done = keep.read_text() if keep and keep.exists() else ""
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    parts: dict[str, Callable[[], Any]] = {**PARTS, "study": partial(study, keep)}
    for name, part in parts.items():
        if f"# {name}, {device}\n" in done:
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(Both(said)):
                part()
        except (Told, RuntimeError, MemoryError, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"{name}: failed, {type(error).__name__}: {first_line(error)}", flush=True)
            continue
        finally:
            free_memory(DEVICE)
        if keep:
            with keep.open("a") as file:
                file.write(f"# {name}, {device}\n{said.getvalue()}")


class Both(io.StringIO):
    """What is printed, shown and collected in `kept`."""

    def __init__(self, kept: io.StringIO) -> None:
        super().__init__()
        self._kept, self._shown = kept, sys.stdout

    def write(self, text: str) -> int:
        self._shown.write(text)
        return self._kept.write(text)

    def flush(self) -> None:
        self._shown.flush()


def quick() -> dict[str, float]:
    if CUDA:
        return {"eager bf16 / harness, batch 34": speed(34, 3, HARNESS).median}
    uncompiled = dataclasses.replace(HARNESS, compiled=False)  # compiling the tiny model takes minutes on a CPU
    return {"CPU: eager bf16 / harness, batch 34": speed(34, 3, uncompiled).median}


if __name__ == "__main__":
    script(full, quick, {"--keep": {"type": Path, "help": "file that collects the results"}})
