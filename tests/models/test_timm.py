"""Models of timm by name: depths, heads, image sizes, and weights that load or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from harness.base.errors import InputError
from harness.config.space import replace
from harness.models.maxvit import MaxViTT
from harness.models.timm import EfficientNetLite0, Timm
from harness.training.step import strided_depthwise_in_fp32

timm = pytest.importorskip("timm")
FAMILIES = {  # depths by block and by layer, and an image size
    "tf_efficientnet_lite0": (9, 18, 96),
    "vit_small_patch14_dinov2.lvd142m": (14, 14, 98),
    "convnextv2_atto": (6, 14, 96),
    "resnet18": (6, 10, 96),
}
SMALL = "convnextv2_atto"


def small(**fields: Any) -> Timm:
    return Timm(SMALL, **{"pretrained": False} | fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_depth_and_logits_come_out(name: str) -> None:
    blocks, layers, side = FAMILIES[name]
    backbone = Timm(name, pretrained=False, hidden=(12,))
    backbone.check(side)
    torch.manual_seed(0)
    model = backbone.build(5, side).eval()
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 5)
    for by, count in (("block", blocks), ("layer", layers)):
        depths = backbone.depths(by)  # type: ignore[arg-type]
        assert len(depths) == count
        for each, _ in model.named_parameters():
            lengths = [max((len(p) for p in depth if each.startswith(p)), default=0) for depth in depths]
            assert lengths.count(max(lengths)) == 1, each
            assert max(lengths) > 0, each


def test_depths_are_modules_where_they_can_be() -> None:
    depths = Timm("vit_small_patch14_dinov2.lvd142m").depths("block")
    assert set(depths[0]) == {"cls_token", "pos_embed", "patch_embed."}
    assert (depths[1], depths[-2:]) == (("blocks.0.",), [("blocks.11.", "norm."), ("head.",)])


def test_what_timm_knows_of_a_model_is_used() -> None:
    lite, vit = Timm("tf_efficientnet_lite0"), Timm("vit_small_patch14_dinov2.lvd142m")
    assert lite.preprocessing().mean == (0.5, 0.5, 0.5)
    assert (lite.preprocessing().resize, lite.preprocessing().crop) == (256, 224)
    assert vit.preprocessing().crop == 518
    assert {"cls_token", "pos_embed"} <= vit.no_decay()
    assert vit.fingerprint() == "timm/vit_small_patch14_dinov2.lvd142m"
    assert small().fingerprint() == "none"


def test_depths_and_checks_draw_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Timm("mobilenetv3_small_050", pretrained=False).check(64)
    Timm("mobilenetv3_small_050", pretrained=False).depths("layer")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file_give_the_same_features(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model(SMALL, pretrained=False).eval()
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(theirs.state_dict(), file)
    backbone = small(pretrained=True, weights=str(file))
    backbone.check(64)
    ours = backbone.build(5, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.forward_features(images), theirs.forward_features(images))  # type: ignore[operator]
    assert len(backbone.fingerprint()) == 16


def test_weights_from_a_file_fit_a_head_that_is_wider_than_the_features(tmp_path: Path) -> None:
    theirs = timm.create_model("mobilenetv3_small_050", pretrained=False)
    save_file(theirs.state_dict(), file := tmp_path / "weights.safetensors")
    ours = Timm("mobilenetv3_small_050", weights=str(file)).build(5, 64)
    for name in ("conv_stem.weight", "conv_head.weight"):
        assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name])


@pytest.mark.parametrize("hidden", [(), (16,)])
def test_weights_that_the_harness_has_trained_fit(hidden: tuple[int, ...], tmp_path: Path) -> None:
    trained = small(pretrained=False, hidden=hidden).build(5, 64)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    ours = small(pretrained=True, weights=str(tmp_path / "w.safetensors")).build(3, 64)
    first = next(iter(trained.state_dict()))
    assert torch.equal(ours.state_dict()[first], trained.state_dict()[first])


@pytest.mark.parametrize("name", ["caformer_s18", "rdnet_tiny"])
def test_models_without_groups_of_their_own_have_those_of_their_modules(name: str) -> None:
    backbone = Timm(name, pretrained=False)
    backbone.check(64)
    assert len(backbone.depths("block")) > 3


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = timm.create_model(SMALL, pretrained=False).state_dict()
    first = next(iter(state))
    for changes, words in (
        ({first: None}, first),
        ({first: torch.zeros(2, 3)}, first),
        ({"more": torch.zeros(1)}, "more"),
    ):
        given = {name: each for name, each in {**state, **changes}.items() if each is not None}
        save_file(given, tmp_path / "w.safetensors")
        match = rf"weights of {SMALL} cannot be loaded \(.*{words}.*check that backbone.weights"
        with pytest.raises(InputError, match=match):
            small(pretrained=True, weights=str(tmp_path / "w.safetensors")).build(5, 64)


@pytest.mark.parametrize(
    ("backbone", "size", "words"),
    [
        (Timm("vgg11", pretrained=False), 8, "vgg11 does not take images of 8 x 8 pixels"),
        (Timm("resnet5", pretrained=False), 64, "timm has no model 'resnet5'; nearest: resnet50"),
        (Timm("zzz", pretrained=False), 64, "no model 'zzz'; find one with `python -m harness models PATTERN`"),
        (Timm("resnet18.nope", pretrained=False), 64, "timm has no weights 'resnet18.nope'; choose from resnet18.a1"),
        (Timm("deit_tiny_distilled_patch16_224", pretrained=False), 224, "has several heads"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(backbone: Timm, size: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        backbone.check(size)


def test_fields_are_checked() -> None:
    with pytest.raises(InputError, match="must be null or a file"):
        small(weights="IMAGENET1K_V1")
    with pytest.raises(InputError, match="bn_momentum must lie in"):
        small(bn_momentum=0.0)
    model = Timm("resnet18", pretrained=False, bn_momentum=0.3, stochastic_depth=0.2).build(2, 64)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.3}
    assert any(type(module).__name__ == "DropPath" for module in model.modules())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "maxvit_tiny_tf_224"])
def test_a_runtime_keeps_what_a_models_own_convolutions_do(name: str) -> None:
    """Those of models from TensorFlow pad by the image's size."""
    size = 64 if "lite" in name else 224
    model = Timm(name, pretrained=False).build(5, size).eval()
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(images)
        strided_depthwise_in_fp32(model)
        assert torch.equal(model(images), expected)


def test_a_class_for_one_model_has_no_other_name() -> None:
    with pytest.raises(InputError, match=r"EfficientNetLite0 is fixed; write Timm\('resnet18'\) in the study file"):
        replace(EfficientNetLite0(pretrained=False), "name", "resnet18")
    with pytest.raises(InputError, match=r"MaxViTT is fixed; write Torchvision\('maxvit_s'\)"):
        MaxViTT(name="maxvit_s")
