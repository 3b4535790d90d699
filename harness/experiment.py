"""The one place that builds a training job: data -> model -> parameter groups -> optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from harness.auto import Work, check_compiler, resolve
from harness.config import TrainConfig
from harness.data.tensors import load_splits, load_train_and_val
from harness.engine import Runtime, compile_parts, find_device, seeded
from harness.errors import InputError
from harness.optim import build_optimizer, freeze, parameter_groups
from harness.seeds import derive_seed
from harness.trainer import Training


def assemble(config: TrainConfig, runtime: Runtime, seed: int) -> Training:
    """Everything that `trainer.fit` needs. The new head is drawn from `seed`; pretrained weights are what they are."""
    splits = load_splits(config.data)
    with seeded(derive_seed(seed, "model"), runtime.device):
        model = runtime.place(config.backbone.build(len(splits.classes), config.data.image_size))
    groups = parameter_groups(model, config.backbone.depths(config.optim.depth_by), config.optim)
    freeze(model, groups)
    if runtime.compiled and config.optim.depth_lr_mult > 0:
        # A frozen backbone would need graphs of its own, and saves its backward pass anyway.
        compile_parts(model, compilable(config))
    return Training(
        config=config,
        classes=splits.classes,
        train=splits.train,
        val=splits.val,
        model=model,
        groups=groups,
        optimizer=build_optimizer(model, groups, config.optim),
        runtime=runtime,
        seed=seed,
    )


def with_validation_images(training: Training) -> Training:
    """The same job, trained on train and validation images together; nothing is left to validate on."""
    return replace(training, train=load_train_and_val(training.config.data), val=None)


def compilable(config: TrainConfig) -> list[str]:
    """The submodules that are the same in all trials: the backbone's blocks, without the head."""
    return [depth.rstrip(".") for depth in config.backbone.depths("block")[:-1]]


def _work(config: TrainConfig, trials: int) -> Work:
    steps = trials * config.epochs * math.ceil(len(load_splits(config.data).train) / config.batch_size)
    return Work(batch_size=config.batch_size, steps=steps, parts=compilable(config))


def decide_runtime(config: TrainConfig, kept: Mapping[str, Any] | None, trials: int = 0) -> Runtime:
    """What this configuration's "auto" settings mean on this machine: what the study `kept` from its start, if any.

    `trials` is the number that the study asks for. Raises InputError when the device of the start is asked to change or
    is not there, or torch cannot compile what is to be compiled.
    """
    if kept is None:
        build = partial(config.backbone.build, len(config.data.classes()), config.data.image_size)
        return resolve(config.engine, build, config.data.image_size, _work(config, trials) if trials else None)
    device = find_device(kept["device"] if config.engine.device == "auto" else config.engine.device)
    if device.type != kept["device"]:
        raise InputError(
            f"This study began on {kept['device']}, and {device.type} computes other numbers; "
            f"go on with --device {kept['device']}, or start anew with --fresh."
        )
    runtime = Runtime.from_dict(kept, device)
    if runtime.compiled:
        check_compiler(device)
    return runtime
