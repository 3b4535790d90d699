"""What every backbone must do, whatever library its model comes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.train import TrainConfig
from harness.models.maxvit import TinyMaxViT
from harness.models.timm import Timm
from harness.models.torchvision import Torchvision
from harness.training.assemble import assemble
from harness.training.features import frozen_body
from harness.training.loop import logits_of
from tests.conftest import make_study
from tests.training.test_checkpoint import RUNTIMES, check_every_stop

FAMILIES: dict[str, Any] = {
    "TinyMaxViT": TinyMaxViT(pretrained=False, hidden=(8,)),
    "convnext": Torchvision("convnext_tiny", pretrained=False),
    "efficientnet": Torchvision("efficientnet_b0", pretrained=False),
    "mobilenet": Torchvision("mobilenet_v3_small", pretrained=False, hidden=(8,)),
    "resnet": Torchvision("resnet18", pretrained=False),
    "shufflenet": Torchvision("shufflenet_v2_x0_5", pretrained=False),
    "swin": Torchvision("swin_t", pretrained=False),
    "vit": Torchvision("vit_b_16", pretrained=False),
    "timm, convnext": Timm("convnextv2_atto", pretrained=False, stochastic_depth=0.1),
    "timm, DINOv2": Timm("vit_small_patch14_dinov2.lvd142m", pretrained=False),
    "timm, efficientnet": Timm("tf_efficientnet_lite0", pretrained=False, hidden=(8,)),
    "timm, vit": Timm("vit_tiny_patch16_224", pretrained=False),
}
QUICK = ("TinyMaxViT", "mobilenet", "timm, efficientnet")
CPU = RUNTIMES["fp32"]


@pytest.fixture(params=[pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in FAMILIES])
def config(request: pytest.FixtureRequest, image_cache: Path) -> TrainConfig:
    """One epoch of two batches."""
    train = make_study(image_cache).train
    size = 56 if "DINO" in request.param else 64
    data = dataclasses.replace(train.data, image_size=size)  # type: ignore[type-var]
    return dataclasses.replace(train, backbone=FAMILIES[request.param], data=data, epochs=1)


def frozen(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, depth_lr_mult=0.0), **changes)


def test_a_stopped_training_resumes_to_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    config.backbone.check(config.data.image_size)
    check_every_stop(tmp_path, config, CPU, [(1, 1)])


def test_a_multiplier_of_0_freezes_all_but_the_head(config: TrainConfig) -> None:
    training = assemble(frozen(config), CPU, 0)
    head = training.groups[0].depth + "."
    for group in training.groups:
        for name in group.names:
            assert training.model.get_parameter(name).requires_grad == name.startswith(head) == (not group.frozen)


def test_every_parameter_is_in_one_group_and_biases_do_not_decay(config: TrainConfig) -> None:
    training = assemble(config, CPU, 0)
    names = [name for group in training.groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in training.model.named_parameters())
    spared = {name for group in training.groups if not group.weight_decay for name in group.names}
    assert {name for name in names if name.endswith(".bias")} <= spared
    assert config.backbone.no_decay() & set(names) <= spared


def test_cached_features_give_the_whole_models_logits(config: TrainConfig) -> None:
    whole = assemble(frozen(config), CPU, 0)
    kept = assemble(frozen(config, feature_views=0), CPU, 0)
    live, cached = (logits_of(each.learner, each.val, CPU) for each in (whole, kept))
    assert kept.learner is not kept.model
    weights = [each.state_dict() for each in (whole.model, kept.model)]
    if all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]):
        torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-5)
    else:  # a body that is not pretrained is drawn once for all trials
        body = frozen_body(frozen(config, feature_views=0), CPU)
        body.give_to(whole.model)
        torch.testing.assert_close(cached, logits_of(kept.model, whole.val, CPU), rtol=1e-5, atol=1e-5)
