"""What every backbone must do, whatever library its model comes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model, get_model_weights

from harness.config.train import TrainConfig
from harness.data.augment import normalise
from harness.data.cache import square
from harness.models.backbone import last_linear
from harness.models.maxvit import TinyMaxViT
from harness.models.module import Module
from harness.models.timm import Timm
from harness.models.torchvision import Torchvision
from harness.serving.export import write_onnx, write_program
from harness.serving.model import SavedModel, preprocess
from harness.serving.predict import Predictor
from harness.training.assemble import assemble
from harness.training.features import frozen_body
from harness.training.loop import logits_of
from tests.conftest import make_study
from tests.data.test_preprocessing import photograph
from tests.training.test_checkpoint import RUNTIMES, check_every_stop


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 10),
    )


FAMILIES: dict[str, Any] = {
    "TinyMaxViT": TinyMaxViT(pretrained=False, hidden=(8,)),
    "convnext": Torchvision("convnext_tiny", pretrained=False),
    "efficientnet": Torchvision("efficientnet_b0", pretrained=False),
    "maxvit": Torchvision("maxvit_t", pretrained=False),
    "mobilenet": Torchvision("mobilenet_v3_small", pretrained=False, hidden=(8,)),
    "resnet": Torchvision("resnet18", pretrained=False),
    "shufflenet": Torchvision("shufflenet_v2_x0_5", pretrained=False),
    "swin": Torchvision("swin_t", pretrained=False),
    "vit": Torchvision("vit_b_16", pretrained=False),
    "Module": Module(build=net, hidden=(8,)),
    "timm, convnext": Timm("convnextv2_atto", pretrained=False, stochastic_depth=0.1),
    "timm, DINOv2": Timm("vit_small_patch14_dinov2.lvd142m", pretrained=False),
    "timm, efficientnet": Timm("tf_efficientnet_lite0", pretrained=False, hidden=(8,)),
    "timm, vit": Timm("vit_tiny_patch16_224", pretrained=False),
}
QUICK = ("TinyMaxViT", "Module", "mobilenet", "timm, efficientnet")
CPU = RUNTIMES["fp32"]


@pytest.fixture(params=[pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in FAMILIES])
def config(request: pytest.FixtureRequest, image_cache: Path) -> TrainConfig:
    """One epoch of two batches."""
    train = make_study(image_cache).train
    size = {"timm, DINOv2": 56, "maxvit": 224}.get(request.param, 64)
    data = dataclasses.replace(train.data, image_size=size, stored_size=max(size, 72))  # type: ignore[type-var]
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


# -- outside of a study ------------------------------------------------------------------------------------------------


def saved(config: TrainConfig) -> SavedModel:
    torch.manual_seed(0)
    classes = [f"class {number}" for number in range(5)]
    size, preset = config.data.image_size, config.backbone.preprocessing()
    steps = {"centre_crop": size, "mean": preset.mean, "std": preset.std}
    model = config.backbone.build(len(classes), size).eval()
    return SavedModel(model=model, config=config, description={"classes": classes, "preprocessing": steps})


def test_the_exported_program_and_predict_agree_with_the_model(config: TrainConfig, tmp_path: Path) -> None:
    model = saved(config)
    write_program(model, tmp_path / "model.pt2")
    images = preprocess([photograph()], config)
    with torch.inference_mode():
        wanted = model.model(images)
        exported = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(exported, wanted, rtol=1e-4, atol=1e-4)
    (guesses,) = Predictor(model, torch.device("cpu")).guesses(images, 5)
    found = {guess.name: guess.probability for guess in guesses}
    shares = dict(zip(model.classes, wanted.softmax(1)[0].tolist(), strict=True))
    assert found == pytest.approx(shares, abs=1e-4)


@pytest.mark.slow
def test_onnx_agrees_with_the_model(config: TrainConfig, tmp_path: Path) -> None:
    write_onnx(saved(config), tmp_path / "model.onnx")  # compares the logits
    assert (tmp_path / "model.onnx").is_file()


PIPELINES = (
    "mobilenet_v3_small",
    "tf_efficientnet_lite0",
    "resnet50",
    "vit_b_16",
    "convnext_tiny",
    "vit_tiny_patch16_224",
)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if place < 2 else pytest.mark.slow) for place, each in enumerate(PIPELINES)]
)
def test_before_training_logits_are_those_of_the_librarys_own_pipeline(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = photograph()
    if name in models.list_models(module=models):
        theirs = get_model(name, weights=None).eval()
        transform: Any = get_model_weights(name)["DEFAULT"].transforms()
        pixels = transform(image)
    else:
        timm = pytest.importorskip("timm")
        theirs = timm.create_model(name, pretrained=False).eval()
        pixels = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))(image)
    for module in theirs.modules():  # random statistics, so that a lost one shows
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    family = Torchvision if name in models.list_models(module=models) else Timm
    backbone: Any = family(name, weights=str(tmp_path / "weights.pth"))
    preset, size = backbone.preprocessing(), pixels.shape[-1]
    ours, last = backbone.build(1000, size).eval(), last_linear(theirs)
    ours.get_submodule(last)[0].load_state_dict(theirs.get_submodule(last).state_dict())
    squared = torch.from_numpy(np.array(square(image, preset.evaluation(size))))[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(normalise(squared, preset)), theirs(pixels[None]), rtol=1e-4, atol=1e-4)
