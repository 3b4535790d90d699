"""TrivialAugment: torchvision's table, operation by operation, on a whole batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from harness.config.train import AugmentConfig
from harness.data import trivial
from harness.data.augment import affine_maps, augment, colour_maps
from tests.data.test_augment import seeded, still

SIDE = 56
STRENGTHS = torch.tensor([-1.0, -0.6, -0.1, 0.0, 0.4, 1.0])


def photographs(count: int = len(STRENGTHS)) -> Tensor:
    """Smooth pictures of 256 levels, float32 [count, 3, SIDE, SIDE]."""
    small = torch.rand(count, 3, 7, 7, generator=seeded(5))
    large = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear")
    return (large * 200 + 20).round() / 255


def every(name: str) -> trivial.Operations:
    chosen = torch.full((len(STRENGTHS),), trivial.NAMES.index(name))
    return trivial.Operations(chosen=chosen, strength=STRENGTHS)


def theirs(image: Tensor, name: str, strength: float) -> Tensor:
    """The same operation by torchvision."""
    factor, bilinear = 1 + 0.99 * strength, InterpolationMode.BILINEAR
    nothing = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "interpolation": bilinear}
    shear, move = math.degrees(math.atan(0.99 * strength)), 32 / 224 * SIDE * strength
    found: Tensor = {
        "Identity": lambda: image,
        "ShearX": lambda: TF.affine(image, **{**nothing, "shear": [shear, 0.0], "center": [0, 0]}),
        "ShearY": lambda: TF.affine(image, **{**nothing, "shear": [0.0, shear], "center": [0, 0]}),
        "TranslateX": lambda: TF.affine(image, **{**nothing, "translate": [move, 0]}),
        "TranslateY": lambda: TF.affine(image, **{**nothing, "translate": [0, move]}),
        "Rotate": lambda: TF.rotate(image, 135 * strength, interpolation=bilinear),
        "Brightness": lambda: TF.adjust_brightness(image, factor),
        "Color": lambda: TF.adjust_saturation(image, factor),
        "Contrast": lambda: TF.adjust_contrast(image, factor),
        "Sharpness": lambda: TF.adjust_sharpness(image, factor),
        "Posterize": lambda: TF.posterize((image * 255).round().byte(), 8 - round(6 * abs(strength))) / 255,
        "Solarize": lambda: TF.solarize(image, 1 - abs(strength)),
        "AutoContrast": lambda: TF.autocontrast(image),
        "Equalize": lambda: TF.equalize((image * 255).round().byte()) / 255,
    }[name]()
    return found


def test_the_table_is_torchvisions() -> None:
    assert set(trivial.NAMES) == set(v2.TrivialAugmentWide()._AUGMENTATION_SPACE)


@pytest.mark.parametrize("name", trivial.COLOUR)
def test_a_colour_is_torchvisions(name: str) -> None:
    images = photographs()
    expected = torch.stack([theirs(image, name, s) for image, s in zip(images, STRENGTHS.tolist(), strict=True)])
    trivial.change(images, every(name))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", trivial.GEOMETRY)
def test_a_map_is_torchvisions_where_it_has_pixels(name: str) -> None:
    images = photographs()
    grid = torch.nn.functional.affine_grid(trivial.maps(every(name))[:, :2], list(images.shape), align_corners=False)
    ours = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    inside = (grid.abs() < 1 - 4 / SIDE).all(3).unsqueeze(1).expand_as(images)
    expected = torch.stack([theirs(image, name, s) for image, s in zip(images, STRENGTHS.tolist(), strict=True)])
    assert inside.float().mean() > 0.5
    # Its affine rounds the centre of a shear and whole pixels of a translation to 1/2.
    torch.testing.assert_close(ours[inside], expected[inside], rtol=0, atol=0.03)


@pytest.mark.parametrize("name", trivial.NAMES)
def test_one_colour_stays_itself_or_becomes_another(name: str) -> None:
    flat = torch.full((len(STRENGTHS), 3, 8, 8), 0.5)
    trivial.change(flat, every(name))
    assert (flat == flat[:, :, :1, :1]).all()
    assert (flat >= 0).all()
    assert (flat <= 1).all()


def test_all_operations_and_both_signs_are_drawn_equally() -> None:
    drawn = trivial.draw(28_000, seeded())
    counts = drawn.chosen.bincount(minlength=len(trivial.NAMES))
    assert counts.min() > 1800
    assert counts.max() < 2200
    assert drawn.strength.abs().max() == 1
    assert abs(drawn.strength.mean()) < 0.02
    assert len(drawn.strength.abs().unique()) == trivial.BINS


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_its_images(threads: int) -> None:
    """However many images are processed at once."""
    images = (photographs(9).permute(0, 2, 3, 1) * 255).round().byte()
    config, before = still(trivial_augment=True, random_erasing=0.5), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = augment(images.repeat(8, 2, 2, 1), config, 40, seeded(3))
    finally:
        torch.set_num_threads(before)
    assert whole.isfinite().all()
    assert torch.equal(whole, augment(images.repeat(8, 2, 2, 1), config, 40, seeded(3)))
    assert not torch.equal(whole, augment(images.repeat(8, 2, 2, 1), config, 40, seeded(4)))


def test_erased_is_a_rectangle_of_the_mean_colour() -> None:
    white = torch.full((200, 32, 32, 3), 255, dtype=torch.uint8)
    erased = augment(white, still(random_erasing=0.5), 32, seeded()) == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    some = erased[:, 0].any((1, 2))
    assert 70 < some.sum() < 130
    for each in erased[some, 0]:
        rows, columns = each.any(1), each.any(0)
        assert torch.equal(each, rows[:, None] & columns)
        assert 0.015 < each.float().mean() < 0.36


def test_what_is_off_draws_nothing() -> None:
    """So a study without it computes what it did before there was such a field."""
    images = (photographs().permute(0, 2, 3, 1) * 255).round().byte()
    config, generator, other = AugmentConfig(), seeded(7), seeded(7)
    augment(images, config, 40, generator)
    affine_maps(config, SIDE, len(images), other)
    colour_maps(config, len(images), other)
    assert torch.equal(generator.get_state(), other.get_state())
