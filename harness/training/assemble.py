"""Build a training job: data -> model -> parameter groups -> optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from harness.base.errors import InputError, first_line
from harness.base.seeds import derive_seed
from harness.config.contracts import Backbone, prefixes
from harness.config.events import Objective
from harness.config.train import TrainConfig
from harness.data.splits import ImageSet, classes_of, load_split, load_splits, load_train_and_val
from harness.training.features import FeatureSet, features_to_train_on, frozen_body, split
from harness.training.loop import Source, Training
from harness.training.optim import Average, build_optimizer, freeze, groups_for, without_weights
from harness.training.runtime import Work, check_compiler, find_device, resolve
from harness.training.step import Runtime, compile_parts, predict, seeded


def assemble(config: TrainConfig, runtime: Runtime, seed: int, objective: Objective = "accuracy") -> Training:
    """Build everything that `loop.fit` needs. The new head is drawn from `seed`; pretrained weights are not."""
    with seeded(derive_seed(seed, "model"), runtime.device):
        model = config.backbone.build(len(classes_of(config.data)), config.data.image_size)
    if config.feature_views is None:
        splits = load_splits(config.data, config.backbone.preprocessing())
        train: Source = splits.train.on(runtime.device)
        val: Source = splits.val.on(runtime.device)
        learner = model = runtime.place(model)
    else:
        body = frozen_body(config, runtime)
        body.give_to(model)
        model = runtime.place(model)
        learner = split(model, body.head)[1]
        train = features_to_train_on(config, runtime, "train")
        val = body.as_they_are(load_split(config.data, config.backbone.preprocessing(), "val"))
    groups = groups_for(model, config.backbone, config.optim)
    freeze(model, groups)
    average = Average(model, learner, groups) if config.ema else None
    if runtime.compiled and config.optim.depth_lr_mult > 0:
        # A frozen backbone would need its own graphs, and skips its backward pass anyway.
        compile_parts(model, compilable(config))
    return Training(
        config=config,
        classes=classes_of(config.data),
        train=train,
        val=val,
        model=model,
        learner=learner,
        groups=groups,
        optimizer=build_optimizer(model, groups, config.optim),
        runtime=runtime,
        seed=seed,
        objective=objective,
        average=average,
    )


def with_validation_images(training: Training) -> Training:
    """Return the same job, trained on train and validation images together, without validation."""
    config, runtime = training.config, training.runtime
    if config.feature_views is None:
        both = load_train_and_val(config.data, config.backbone.preprocessing())
        return replace(training, train=both.on(runtime.device), val=None)
    train, val = (features_to_train_on(config, runtime, name) for name in ("train", "val"))
    device = train.device if train.device == val.device else torch.device("cpu")  # one may have had no room
    features = torch.cat([each.features.to(device) for each in (train, val)])
    joint = FeatureSet(features=features, labels=torch.cat([each.labels.to(device) for each in (train, val)]))
    return replace(training, train=joint, val=None)


def evaluation_of(training: Training, images: ImageSet) -> Source:
    """Return the images as evaluation input of the training's learner."""
    if training.config.feature_views is None:
        return images
    return frozen_body(training.config, training.runtime).as_they_are(images)


def check_early_size(backbone: Backbone, image_size: int, early_size: int) -> None:
    """Raise InputError unless the model for images of `image_size` also takes the smaller ones of the first epochs."""
    untrained = without_weights(backbone)
    with seeded(0, torch.device("cpu")):
        model = untrained.build(2, image_size).eval()
    try:
        predict(
            model,
            torch.zeros(1, 3, early_size, early_size),
            Runtime(device=torch.device("cpu"), bf16=False, channels_last=False),
        )
    # Models refuse a size in many ways.
    except Exception as error:
        raise InputError(
            f"augment.early_size: the model for images of {image_size} x {image_size} pixels does not take "
            f"{early_size} x {early_size} ({first_line(error)}); set it to null, or choose a model of convolutions."
        ) from error


def compilable(config: TrainConfig) -> list[str]:
    """Return the submodules that all trials share: the backbone's blocks, without the head."""
    blocks = [prefix for depth in config.backbone.depths("block")[:-1] for prefix in prefixes(depth)]
    return [prefix.rstrip(".") for prefix in blocks if prefix.endswith(".")]


def _work(config: TrainConfig, trials: int) -> Work:
    train = load_splits(config.data, config.backbone.preprocessing()).train
    steps = trials * config.epochs * math.ceil(len(train) / config.batch_size)
    parts = compilable(config) if config.optim.depth_lr_mult > 0 else []
    return Work(batch_size=config.batch_size, steps=steps, parts=parts)


def decide_runtime(config: TrainConfig, kept: Mapping[str, Any] | None, trials: int = 0) -> Runtime:
    """Resolve "auto" and "tune" on this machine, or restore the runtime that the study `kept` from its start.

    `trials` is the study's number of trials. Raises InputError if the device type differs from that of the start or is
    not available, or torch cannot compile the model.
    """
    if kept is None:
        build = partial(config.backbone.build, len(classes_of(config.data)), config.data.image_size)
        return resolve(config.runtime, build, config.data.image_size, _work(config, trials) if trials else None)
    device = find_device(kept["device"] if config.runtime.device == "auto" else config.runtime.device)
    if device.type != kept["device"]:
        raise InputError(
            f"This study began on {kept['device']}, and {device.type} gives other numbers; "
            f"resume with --device {kept['device']}, or start anew with --fresh."
        )
    runtime = Runtime.from_dict(kept, device)
    if runtime.compiled:
        check_compiler(device)
    return runtime
