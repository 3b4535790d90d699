"""`python -m harness models`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torchvision import models

import harness
from harness.base.errors import InputError
from harness.cli.commands import main
from harness.models.catalog import backbone_named
from harness.models.maxvit import MaxViTT, TinyMaxViT
from harness.models.timm import EfficientNetLite0, Timm
from harness.models.torchvision import Torchvision


def test_every_model_of_torchvision_that_has_a_head_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    named = {each["model"] for each in found}
    others = {f'Torchvision("{name}")' for name in models.list_models(module=models) if "squeeze" not in name}
    assert named == others | {"MaxViTT()", "EfficientNetLite0()", "TinyMaxViT()"}
    (large,) = (each for each in found if each["model"] == 'Torchvision("vit_h_14")')
    assert (large["parameters"], large["image_size"]) == (633_470_440, 518)


def test_a_pattern_finds_those_of_timm_too(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["models", "lite0"]) == 0
    shown = capsys.readouterr().out
    assert 'Timm("tf_efficientnet_lite0.in1k")' in shown
    assert "EfficientNetLite0()" in shown
    assert "4.7 M" in shown
    found = harness.list_models("efficientnet_b0*")
    assert found["model"].tolist()[0] == 'Torchvision("efficientnet_b0")'
    assert all("efficientnet_b0" in name for name in found["model"])


@pytest.mark.parametrize("model", [MaxViTT(pretrained=False), EfficientNetLite0(pretrained=False), TinyMaxViT()])
def test_our_own_models_have_as_many_parameters_as_they_are_said_to(model: Any) -> None:
    (row,) = harness.list_models(type(model).__name__).to_dict("records")
    classes = {"MaxViTT": 1000, "EfficientNetLite0": 1000, "TinyMaxViT": 16}[type(model).__name__]
    built = dataclasses.replace(model, hidden=()).build(classes, row["image_size"])
    assert sum(each.numel() for each in built.parameters()) == pytest.approx(row["parameters"], rel=1e-3)


def test_weights_that_were_downloaded_are_here(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    version = models.ResNet18_Weights.DEFAULT
    assert not harness.list_models("resnet18")["weights_here"][0]
    file = harness.models.pretrained.path(version)  # type: ignore[attr-defined]
    file.parent.mkdir(parents=True)
    file.touch()
    assert harness.list_models("resnet18")["weights_here"][0]


def test_a_pattern_without_a_model_is_refused() -> None:
    with pytest.raises(InputError, match="No model's name has 'nope' in it"):
        harness.list_models("nope")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("TinyMaxViT", TinyMaxViT(hidden=(8,))),
        ("tinymaxvit()", TinyMaxViT(hidden=(8,))),
        ("EfficientNetLite0", EfficientNetLite0(hidden=(8,))),
        ("ResNet18", Torchvision("resnet18", hidden=(8,))),
        ('Torchvision("resnet18")', Torchvision("resnet18", hidden=(8,))),
        ('Timm("resnet18.a1_in1k")', Timm("resnet18.a1_in1k", hidden=(8,))),
        ("resnet26", Timm("resnet26", hidden=(8,))),
    ],
)
def test_what_is_listed_can_be_named(name: str, expected: Any) -> None:
    assert backbone_named(name, (8,)) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet5", "There is no model 'resnet5'; nearest: resnet50"),
        ("../x.pth", r"There is no model '\.\./x\.pth'; find one with"),
        ('Torchvision("resnet5")', "torchvision has no model 'resnet5'; nearest: resnet50"),
        ("", "There is no model ''"),
    ],
)
def test_what_is_not_listed_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        backbone_named(name, ())
