"""The one place that builds a training job: data -> model -> parameter groups -> optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from harness.base.errors import InputError
from harness.base.seeds import derive_seed
from harness.config.train import TrainConfig
from harness.data.splits import ImageSet, load_split, load_splits, load_train_and_val
from harness.training.features import FeatureSet, features_to_train_on, frozen_body, split
from harness.training.loop import Source, Training
from harness.training.optim import build_optimizer, freeze, parameter_groups
from harness.training.runtime import Work, check_compiler, resolve
from harness.training.step import Runtime, compile_parts, find_device, seeded


def assemble(config: TrainConfig, runtime: Runtime, seed: int) -> Training:
    """Everything that `loop.fit` needs. The new head is drawn from `seed`; pretrained weights are what they are."""
    with seeded(derive_seed(seed, "model"), runtime.device):
        model = config.backbone.build(len(config.data.classes()), config.data.image_size)
    if config.feature_views is None:
        splits = load_splits(config.data)
        train: Source = splits.train.on(runtime.device)
        val: Source = splits.val.on(runtime.device)
        learner = model = runtime.place(model)
    else:
        body = frozen_body(config, runtime)
        body.give_to(model)
        model = runtime.place(model)
        learner = split(model, body.head)[1]
        train = features_to_train_on(config, runtime, "train")
        val = body.as_they_are(load_split(config.data, "val", config.data.image_size))
    groups = parameter_groups(model, config.backbone.depths(config.optim.depth_by), config.optim)
    freeze(model, groups)
    if runtime.compiled and config.optim.depth_lr_mult > 0:
        # A frozen backbone would need graphs of its own, and saves its backward pass anyway.
        compile_parts(model, compilable(config))
    return Training(
        config=config,
        classes=config.data.classes(),
        train=train,
        val=val,
        model=model,
        learner=learner,
        groups=groups,
        optimizer=build_optimizer(model, groups, config.optim),
        runtime=runtime,
        seed=seed,
    )


def with_validation_images(training: Training) -> Training:
    """The same job, trained on train and validation images together; nothing is left to validate on."""
    config, runtime = training.config, training.runtime
    if config.feature_views is None:
        return replace(training, train=load_train_and_val(config.data).on(runtime.device), val=None)
    train, val = (features_to_train_on(config, runtime, name) for name in ("train", "val"))
    both = FeatureSet(features=torch.cat([train.features, val.features]), labels=torch.cat([train.labels, val.labels]))
    return replace(training, train=both, val=None)


def evaluation_of(training: Training, images: ImageSet) -> Source:
    """These images as the training's learner takes them in an evaluation."""
    if training.config.feature_views is None:
        return images
    return frozen_body(training.config, training.runtime).as_they_are(images)


def compilable(config: TrainConfig) -> list[str]:
    """The submodules that are the same in all trials: the backbone's blocks, without the head."""
    return [depth.rstrip(".") for depth in config.backbone.depths("block")[:-1]]


def _work(config: TrainConfig, trials: int) -> Work:
    steps = trials * config.epochs * math.ceil(len(load_splits(config.data).train) / config.batch_size)
    parts = compilable(config) if config.optim.depth_lr_mult > 0 else []
    return Work(batch_size=config.batch_size, steps=steps, parts=parts)


def decide_runtime(config: TrainConfig, kept: Mapping[str, Any] | None, trials: int = 0) -> Runtime:
    """What this configuration's "auto" and "tune" mean on this machine: what the study `kept` from its start, if any.

    `trials` is the number that the study asks for. Raises InputError when the device of the start is asked to change or
    is not there, or torch cannot compile what is to be compiled.
    """
    if kept is None:
        build = partial(config.backbone.build, len(config.data.classes()), config.data.image_size)
        return resolve(config.runtime, build, config.data.image_size, _work(config, trials) if trials else None)
    device = find_device(kept["device"] if config.runtime.device == "auto" else config.runtime.device)
    if device.type != kept["device"]:
        raise InputError(
            f"This study began on {kept['device']}, and {device.type} computes other numbers; "
            f"go on with --device {kept['device']}, or start anew with --fresh."
        )
    runtime = Runtime.from_dict(kept, device)
    if runtime.compiled:
        check_compiler(device)
    return runtime
