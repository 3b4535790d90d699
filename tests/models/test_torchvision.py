"""Models of torchvision by name: depths, heads, image sizes, and weights that load or are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from harness.base.errors import InputError
from harness.models.backbone import last_linear
from harness.models.depths import depths_of
from harness.models.torchvision import Torchvision, names

FAMILIES = {  # depths by block and by layer
    "convnext_tiny": (9, 23),
    "densenet121": (9, 63),
    "efficientnet_b0": (10, 19),
    "maxvit_t": (6, 13),
    "mobilenet_v3_small": (14, 14),
    "regnet_y_400mf": (6, 18),
    "resnet50": (6, 18),
    "swin_t": (9, 17),
    "vgg11": (9, 9),
    "vit_b_16": (14, 14),
}
NO_HEAD = ("squeezenet1_0", "squeezenet1_1")
SMALL = "mobilenet_v3_small"


def small(**fields: Any) -> Torchvision:
    return Torchvision(SMALL, **{"pretrained": False} | fields)


def owners(depths: Any, name: str) -> list[int]:
    """The depths with the longest prefix of a parameter's name."""
    lengths = [max((len(prefix) for prefix in depth if name.startswith(prefix)), default=0) for depth in depths]
    return [place for place, length in enumerate(lengths) if length == max(lengths) > 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_depth_and_every_depth_has_one(name: str) -> None:
    model = models.get_model(name, weights=None) if name == "regnet_y_400mf" else None
    if model is None:
        with torch.device("meta"):
            model = models.get_model(name, weights=None)
    for by, count in zip(("block", "layer"), FAMILIES[name], strict=True):
        depths = depths_of(model, last_linear(model), by)  # type: ignore[arg-type]
        found = [owners(depths, each) for each, _ in model.named_parameters()]
        assert len(depths) == count
        assert {len(each) for each in found} == {1}
        assert {place for each in found for place in each} == set(range(count))
        assert depths == Torchvision(name).depths(by)  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_model_with_a_linear_layer_at_its_end_has_depths() -> None:
    for name in names():
        if name not in NO_HEAD:
            assert len(Torchvision(name).depths("block")) <= len(Torchvision(name).depths("layer"))


def test_the_depths_of_a_transformer_put_tokens_and_positions_into_the_stem() -> None:
    depths = Torchvision("vit_b_16").depths("block")
    assert set(depths[0]) == {"class_token", "conv_proj.", "encoder.pos_embedding"}
    assert depths[-2] == ("encoder.layers.encoder_layer_11.", "encoder.ln.")
    assert depths[-1] == ("heads.",)


def test_the_head_is_ours() -> None:
    torch.manual_seed(0)
    model = small(hidden=(12, 7), dropout=0.3).build(5, 64)
    *kept, head = model.classifier  # type: ignore[misc]
    assert [type(layer) for layer in kept] == [nn.Linear, nn.Hardswish, nn.Dropout]
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_depths_and_checks_draw_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Torchvision("regnet_x_400mf", pretrained=False).depths("block")
    small().check(96)
    assert torch.equal(torch.get_rng_state(), before)


def test_momentum_and_stochastic_depth_are_the_configured_ones() -> None:
    model = small(bn_momentum=0.07).build(2, 64)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.07}
    model = Torchvision("efficientnet_b0", pretrained=False, stochastic_depth=0.1).build(2, 64)
    drops = [module.p for module in model.modules() if type(module).__name__ == "StochasticDepth"]
    assert max(drops) == pytest.approx(0.1 * 15 / 16, abs=0.01)
    with pytest.raises(InputError, match="MobileNetV3 has no stochastic depth"):
        small(stochastic_depth=0.1).build(2, 64)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_b_16", 100, "vit_b_16 does not take images of 100 x 100 pixels"),
        ("maxvit_t", 200, "maxvit_t does not take images of 200 x 200 pixels"),
        ("squeezenet1_0", 224, "squeezenet1_0 has no linear layer to replace"),
        ("resnet5", 224, "torchvision has no model 'resnet5'; nearest: resnet50"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, size: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Torchvision(name, pretrained=False).check(size)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> nn.Module:
    torch.manual_seed(1)
    return models.get_model(SMALL, weights=None).eval()


@pytest.mark.parametrize(("suffix", "wrapped"), [(".safetensors", False), (".pth", False), (".pth", True)])
def test_weights_from_a_file_give_the_same_features(
    suffix: str, wrapped: bool, published: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / f"weights{suffix}"
    state = published.state_dict()
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if wrapped else state, file)
    backbone = small(pretrained=True, weights=str(file))
    backbone.check(64)
    model = backbone.build(5, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.features(images), published.features(images))  # type: ignore[operator]
    assert len(backbone.fingerprint()) == 16


def test_files_that_do_not_fit_are_refused_by_the_tensor(published: nn.Module, tmp_path: Path) -> None:
    state = published.state_dict()
    first = next(iter(state))
    for changes, words in (
        ({first: None}, f"lacks the tensor {first}"),
        ({first: torch.zeros(2, 3)}, rf"has the tensor {first} of shape \(2, 3\) instead of"),
        ({"more": torch.zeros(1)}, "has the tensor more, which the model lacks"),
    ):
        given = {name: each for name, each in {**state, **changes}.items() if each is not None}
        save_file(given, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=words):
            small(pretrained=True, weights=str(tmp_path / "w.safetensors")).build(5, 64)


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not a file of weights"):
        small(pretrained=True, weights=str(tmp_path / name)).check(64)
    with pytest.raises(InputError, match="cannot be read"):
        small(pretrained=True, weights=str(tmp_path / f"missing-{name}")).check(64)


def test_versions_have_their_own_preset_and_fingerprint() -> None:
    old, new = (Torchvision("resnet50", weights=f"IMAGENET1K_V{number}") for number in (1, 2))
    assert (old.preprocessing().resize, new.preprocessing().resize) == (256, 232)
    assert new.preprocessing().interpolation == "bilinear"
    assert old.fingerprint() != new.fingerprint() == Torchvision("resnet50").fingerprint()
    with pytest.raises(InputError, match="resnet50 has no weights 'V3'; choose from IMAGENET1K_V1, IMAGENET1K_V2"):
        Torchvision("resnet50", weights="V3").check(224)


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_file_and_its_place_are_named() -> None:
    with pytest.raises(InputError, match=r"cannot be downloaded .* save https://\S+\.pth as \S+\.pth"):
        Torchvision("resnet18").check(224)


OLD_NAMES = {  # as the published files have them, which torchvision's own loaders convert
    "densenet121": {r"(denselayer\d+\.(?:norm|conv))([12])\.": r"\1.\2."},
    "vit_b_32": {r"mlp\.0\.": "mlp.linear_1.", r"mlp\.3\.": "mlp.linear_2."},
    "mnasnet0_5": {},  # but it loads only what names its version
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_published_files_have_names_of_older_versions(name: str, tmp_path: Path) -> None:
    state = models.get_model(name, weights=None).state_dict()
    old = dict(state)
    for new_name, old_name in OLD_NAMES[name].items():
        old = {re.sub(new_name, old_name, each): tensor for each, tensor in old.items()}
    assert (old.keys() != state.keys()) == bool(OLD_NAMES[name])
    save_file(old, tmp_path / "w.safetensors")
    model = Torchvision(name, weights=str(tmp_path / "w.safetensors")).build(5, 64)
    head = last_linear(models.get_model(name, weights=None))
    for each, tensor in model.state_dict().items():
        if not each.startswith(head) and "pos_embedding" not in each:  # which is resized
            assert torch.equal(tensor, state[each]), each


def test_a_file_may_have_the_auxiliary_tensors_of_the_published_one(tmp_path: Path) -> None:
    state = models.get_model("googlenet", weights=None, init_weights=False).state_dict()
    assert any(name.startswith("aux1.") for name in state)
    save_file(state, tmp_path / "w.safetensors")
    model = Torchvision("googlenet", weights=str(tmp_path / "w.safetensors")).build(5, 64)
    assert torch.equal(model.conv1.conv.weight, state["conv1.conv.weight"])  # type: ignore[union-attr]


def test_a_file_with_another_suffix_is_told_which_fit() -> None:
    with pytest.raises(InputError, match=r"or give a file \(\.safetensors, \.pth, \.pt, \.bin\)"):
        small(pretrained=True, weights="x.ckpt").build(5, 64)


def test_position_embeddings_that_are_no_square_are_refused(tmp_path: Path) -> None:
    save_file({"encoder.pos_embedding": torch.zeros(1, 198, 768)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"do not fit: encoder\.pos_embedding .*check that they are of vit_b_16"):
        Torchvision("vit_b_16", weights=str(tmp_path / "w.safetensors")).load(224)
