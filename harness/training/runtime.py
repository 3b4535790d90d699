"""Resolve "auto" and "tune" for a model on this machine: "auto" by a rule, "tune" by timing.

The rule is reproducible; a timing is not. Either is decided once and then kept for the whole study: after a change of
arithmetic half-way, its results would not be comparable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.base.errors import InputError, first_line
from harness.config.train import RuntimeConfig
from harness.training.step import Runtime, compile_parts, seeded, train_step

# Parameters from which bf16 or channels-last pay on a CPU: of 16 models with 2 to 87 million all larger ones became
# faster, but for those with many depthwise convolutions; TinyMaxViT (0.4 million) becomes slower.
LARGE = 2_000_000

# "tune" requires this speed-up over the plain runtime: timing noise must not decide, and uncompiled fp32 is the easiest
# to reproduce.
WORTHWHILE = 1.15
# Compiling takes minutes, and so does trying it; in a shorter study it could not gain much.
LONG_ENOUGH_SECONDS = 1800.0
IMAGES = 4  # in the steps that time precision and layout


@contextlib.contextmanager
def modes_back() -> Iterator[None]:
    """Restore what `Runtime.place` changes in torch, for a program's own use of it."""
    fill: Any = torch.utils.deterministic
    products = torch.backends.cuda.matmul.fp32_precision
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer interface, which does not mix with this one
        named = None
    wanted, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = fill.fill_uninitialized_memory, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warns)
        fill.fill_uninitialized_memory, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
        if torch.backends.cuda.matmul.fp32_precision == products:
            pass
        elif named is not None:
            torch.set_float32_matmul_precision(named)
        else:
            torch.backends.cuda.matmul.fp32_precision = products


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" prefers CUDA, then MPS, then the CPU.

    Raises InputError if the device is missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: torch knows no such device; use cpu, cuda, cuda:0, mps or auto.") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise InputError(f"--device {name}: this machine or this build of torch has none; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0 on.")
    return device


@dataclass(frozen=True, kw_only=True)
class Work:
    """The workload of a whole study, which decides whether compiling pays."""

    batch_size: int
    steps: int  # of all its trials, without pruning
    parts: Sequence[str]  # the submodules that can be compiled: all depths but the head


def resolve(
    config: RuntimeConfig, build: Callable[[], nn.Module], image_size: int, work: Work | None = None
) -> Runtime:
    """Resolve "auto" and "tune"; `build` makes the model. Without `work`, compiling is not tried.

    "auto" goes by device, instructions and model (`rule`), and never compiles. "tune" takes what is clearly fastest in
    two training steps, and compiles if the study runs long enough and becomes clearly faster. Raises InputError if
    compiling is requested and torch cannot.
    """
    device = find_device(config.device)
    both = [False] if device.type == "mps" else [False, True]
    precisions = {"fp32": [False], "bf16": [True], "tune": both}
    layouts = {"off": [False], "on": [True], "tune": both}
    automatic = "auto" in (config.precision, config.channels_last)
    usual, last = rule(device, build) if automatic else (False, False)
    candidates = [
        Runtime(device=device, bf16=bf16, channels_last=channels_last, deterministic=config.deterministic)
        for bf16 in precisions.get(config.precision, [usual])
        for channels_last in layouts.get(config.channels_last, [bf16 or last])
    ]
    images = _timed_images(device, work)
    chosen = _fastest(candidates, build, image_size, images) if len(candidates) > 1 else candidates[0]
    if config.compile == "on":
        check_compiler(device)
        return dataclasses.replace(chosen, compiled=True)
    if config.compile == "tune" and device.type != "mps" and work is not None and work.parts:
        return dataclasses.replace(chosen, compiled=_compiling_pays(chosen, build, image_size, work))
    return chosen


def rule(device: torch.device, build: Callable[[], nn.Module]) -> tuple[bool, bool]:
    """Return whether bf16 is usually faster, and whether channels-last is in fp32, too; with bf16 it always is.

    bf16 pays on CUDA from Ampere on, and with AVX512-BF16 on a CPU for large models, unless depthwise convolutions
    outnumber linear layers. In fp32 channels-last pays on a CPU for large models of convolutions (RESULTS.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0), False
    if device.type != "cpu":
        return False, False
    with seeded(0, device):
        model = build()
    linear = sum(isinstance(each, nn.Linear) for each in model.modules())
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    depthwise = sum(each.groups == each.in_channels > 1 for each in convolutions)
    large = sum(each.numel() for each in model.parameters()) >= LARGE
    bf16 = large and linear >= depthwise and torch.cpu._is_avx512_bf16_supported()
    return bf16, large and len(convolutions) > linear


def _timed_images(device: torch.device, work: Work | None) -> int:
    """Return the batch size to time with: on a GPU the study's, since launching a few images' kernels takes longest."""
    if work is None:
        return IMAGES
    return min(IMAGES, work.batch_size) if device.type == "cpu" else work.batch_size


def _fastest(candidates: Sequence[Runtime], build: Callable[[], nn.Module], image_size: int, images: int) -> Runtime:
    """Return the fastest candidate if it is clearly faster than the first, else the first."""
    seconds = [min(step_seconds(each, build, image_size, images)[1:]) for each in candidates]
    fastest = min(range(len(candidates)), key=seconds.__getitem__)
    return candidates[fastest] if seconds[0] > WORTHWHILE * seconds[fastest] else candidates[0]


def _compiling_pays(runtime: Runtime, build: Callable[[], nn.Module], image_size: int, work: Work) -> bool:
    """Return whether compiled steps are clearly faster and recover the cost of compiling; by timing."""
    few = _timed_images(runtime.device, work)
    guess = min(step_seconds(runtime, build, image_size, few)[1:]) * work.batch_size / few
    if guess * work.steps < LONG_ENOUGH_SECONDS:
        return False
    print("Measuring whether compiling the model pays (takes minutes, once) …", file=sys.stderr)
    plain = min(step_seconds(runtime, build, image_size, work.batch_size)[1:])
    try:
        compiled = dataclasses.replace(runtime, compiled=True)
        first, *later = step_seconds(compiled, build, image_size, work.batch_size, work.parts)
    except RuntimeError as error:  # all errors of torch's compilers are one
        print(f"torch cannot compile it ({first_line(error)}); the model runs uncompiled.", file=sys.stderr)
        return False
    return pays(plain, min(later), first, work.steps)


def pays(plain: float, compiled: float, cost: float, steps: int) -> bool:
    """Return whether steps of `compiled` seconds are clearly faster, and recover `cost` seconds."""
    return plain > WORTHWHILE * compiled and (plain - compiled) * steps > cost


def step_seconds(
    runtime: Runtime, build: Callable[[], nn.Module], image_size: int, images: int, parts: Sequence[str] = ()
) -> list[float]:
    """Time three training steps in seconds; the first one warms up, and compiles `parts`."""
    with seeded(0, runtime.device):
        model = runtime.place(build())
        if parts:
            compile_parts(model, parts)
        batch = runtime.move(torch.randn(images, 3, image_size, image_size, device=runtime.device))
        labels = torch.zeros(images, dtype=torch.int64, device=runtime.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            done = train_step(model, batch, labels, optimizer, runtime, label_smoothing=0.0, clip_norm=None)
            done.loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return seconds


def check_compiler(device: torch.device) -> None:
    """Raise InputError unless torch can compile for this device: on a CPU it needs a C++ compiler, on CUDA Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise InputError(
            f"runtime.compile is on, but torch cannot compile here ({first_line(error)}); "
            "install what is missing, or start the study with --set runtime.compile=off."
        ) from error
