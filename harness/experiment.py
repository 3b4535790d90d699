"""The one place that builds a training job: data -> model -> parameter groups -> optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from harness.auto import Work, check_compiler, resolve
from harness.config import Backbone, TrainConfig
from harness.data.tensors import ImageSet, load_split, load_splits, load_train_and_val
from harness.engine import Runtime, compile_parts, find_device, seeded
from harness.errors import InputError
from harness.features import FeatureSet, FrozenBody, split
from harness.optim import build_optimizer, freeze, parameter_groups
from harness.seeds import derive_seed
from harness.trainer import Source, Training


def assemble(config: TrainConfig, runtime: Runtime, seed: int) -> Training:
    """Everything that `trainer.fit` needs. The new head is drawn from `seed`; pretrained weights are what they are."""
    with seeded(derive_seed(seed, "model"), runtime.device):
        model = config.backbone.build(len(config.data.classes()), config.data.image_size)
    if config.feature_views is None:
        splits = load_splits(config.data)
        train: Source = splits.train.on(runtime.device)
        val: Source = splits.val.on(runtime.device)
        learner = model = runtime.place(model)
    else:
        body = frozen_body(config, runtime)
        model.load_state_dict(body.weights, strict=False, assign=True)
        model = runtime.place(model)
        learner = split(model, _head(config.backbone))[1]
        train, val = (
            _features(config, runtime, "train"),
            body.as_they_are(load_split(config.data, "val", config.data.image_size)),
        )
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
    train, val = (_features(config, runtime, name) for name in ("train", "val"))
    labels = torch.cat([train.labels, val.labels])
    return replace(
        training, train=FeatureSet(features=torch.cat([train.features, val.features]), labels=labels), val=None
    )


def evaluation_of(training: Training, images: ImageSet) -> Source:
    """These images as the training's learner takes them in an evaluation."""
    if training.config.feature_views is None:
        return images
    return frozen_body(training.config, training.runtime).as_they_are(images)


def keep_features(config: TrainConfig, runtime: Runtime, with_validation: bool) -> None:
    """Compute the features that a head-only study needs before the test set is opened, unless they are kept already.

    `with_validation`: the final run trains on validation images, too.
    """
    if config.feature_views is None:
        return
    _features(config, runtime, "train")
    if with_validation:
        _features(config, runtime, "val")
    else:
        frozen_body(config, runtime).as_they_are(load_split(config.data, "val", config.data.image_size))


def frozen_body(config: TrainConfig, runtime: Runtime) -> FrozenBody:
    """The configuration's backbone without its head. What is not pretrained is drawn alike in every trial."""
    # The head's fields change from trial to trial; without them, all trials have one and the same body.
    without = {"hidden": (), "dropout": 0.0}
    known = {field.name for field in fields(config.backbone)}  # type: ignore[arg-type]
    backbone: Any = config.backbone
    backbone = replace(backbone, **{name: value for name, value in without.items() if name in known})
    data = config.data
    return _frozen_body(backbone, len(data.classes()), data.image_size, runtime, Path(data.cache))


@lru_cache(maxsize=2)
def _frozen_body(backbone: Backbone, classes: int, image_size: int, runtime: Runtime, folder: Path) -> FrozenBody:
    with seeded(derive_seed("frozen body"), runtime.device):
        model = runtime.place(backbone.build(classes, image_size))
    return FrozenBody(model, _head(backbone), image_size, runtime, folder)


def _head(backbone: Backbone) -> str:
    """The name of the backbone's last submodule."""
    return backbone.depths("block")[-1].rstrip(".")


def _features(config: TrainConfig, runtime: Runtime, name: Literal["train", "val"]) -> FeatureSet:
    """The features of a split to train on."""
    data = config.data
    plain, stored = (load_split(data, name, size) for size in (data.image_size, data.stored_size))
    return frozen_body(config, runtime).with_views(plain, stored, config.augment, config.feature_views or 0)


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
