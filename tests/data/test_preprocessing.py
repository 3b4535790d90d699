"""Images reach a model as its library prepares them, whatever its preset."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model_weights

from harness.base.errors import InputError
from harness.config.contracts import Backbone, Preprocessing, Square
from harness.data.augment import augment, normalise
from harness.data.cache import square
from harness.models.timm import Timm
from harness.models.torchvision import Torchvision
from tests.conftest import PROJECT
from tests.data.test_augment import seeded, still


def photograph(width: int = 517, height: int = 393) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def ours(backbone: Backbone, size: int, image: Image.Image) -> torch.Tensor:
    preprocessing = backbone.preprocessing()
    pixels = square(image, preprocessing.evaluation(size)).copy()
    return normalise(torch.from_numpy(pixels)[None], preprocessing)[0]


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "convnext_tiny", "maxvit_t", "swin_t", "inception_v3"])
@pytest.mark.parametrize("turned", [False, True])
def test_torchvisions_models_get_the_pixels_of_their_preset(name: str, turned: bool) -> None:
    image = photograph(393, 517) if turned else photograph()
    for version in get_model_weights(name):
        if version.transforms.func.__name__ == "ImageClassification":
            preset = version.transforms()
            found = ours(Torchvision(name, weights=version.name), preset.crop_size[0], image)
            torch.testing.assert_close(found, preset(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "tf_efficientnet_lite0",
        "vit_small_patch14_dinov2.lvd142m",
        "convnextv2_atto",
        "resnet18",
        "vit_tiny_patch16_224",
    ],
)
def test_timms_models_get_the_pixels_of_their_transform(name: str) -> None:
    data = pytest.importorskip("timm.data")
    import timm

    settings = data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = data.create_transform(**settings)(photograph())
    found = ours(Timm(name), settings["input_size"][1], photograph())
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)


def test_another_image_size_keeps_the_proportion() -> None:
    preprocessing = Preprocessing(resize=256, crop=224, interpolation="bilinear")
    assert preprocessing.evaluation(224) == Square(224, 256, "bilinear")
    assert preprocessing.evaluation(112) == Square(112, 128, "bilinear")
    assert preprocessing.training(300) == Square(300, 300, "bilinear")
    assert Preprocessing().evaluation(96) == Square(96, 96, "bicubic")


def test_augmented_images_have_the_same_scale_as_evaluated_ones() -> None:
    half = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.125))
    images = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8, generator=seeded())
    augmented = augment(images, still(), 24, seeded(), half)
    torch.testing.assert_close(augmented, normalise(images, half), rtol=0, atol=1e-3)
    assert not torch.allclose(augmented, normalise(images), atol=0.1)


def test_the_package_never_forgets_which_preprocessing() -> None:
    """The last argument has a default for the tests."""
    for file in sorted((PROJECT / "harness").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                wanted = {"normalise": 2, "augment": 5}.get(node.func.id, 0)
                assert len(node.args) >= wanted, f"{file}:{node.lineno}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, r"mean must be a tuple of 3 numbers such as \(0\.5, 0\.5, 1\.0\), not \[0\.5"),
        ({"mean": 0.5}, "mean must be a tuple"),
        ({"std": (0.5,)}, "std must be a tuple of 3"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive, not 0"),
        ({"crop": 0}, "crop must be positive, not 0"),
        ({"interpolation": "area"}, "interpolation must be bilinear or bicubic, not 'area'"),
    ],
)
def test_what_is_no_preset_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Preprocessing(**fields)
