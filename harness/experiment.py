"""The one place that builds a training job: data -> model -> parameter groups -> optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harness.config import TrainConfig
from harness.data.tensors import load_splits, load_train_and_val
from harness.engine import Runtime, find_device, resolve, seeded
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


def decide_runtime(config: TrainConfig, kept: Mapping[str, Any] | None) -> Runtime:
    """What this configuration's "auto" settings mean on this machine: what the study `kept` from its start, if any.

    Raises InputError when the device of the start is asked to change or is not there.
    """
    if kept is None:
        classes = len(config.data.classes())
        return resolve(
            config.engine, lambda: config.backbone.build(classes, config.data.image_size), config.data.image_size
        )
    device = find_device(kept["device"] if config.engine.device == "auto" else config.engine.device)
    if device.type != kept["device"]:
        raise InputError(
            f"This study began on {kept['device']}, and {device.type} computes other numbers; "
            f"go on with --device {kept['device']}, or start anew with --fresh."
        )
    return Runtime(device=device, bf16=kept["precision"] == "bf16", channels_last=kept["channels_last"])
