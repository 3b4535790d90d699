"""Augmentation on the device: the identity, the mirror, the ranges, the colours, and the generator that decides all."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from harness.config.train import AugmentConfig
from harness.data.augment import IMAGENET, affine_maps, augment, colour_maps, crops, normalise

STILL = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "rotation_degrees": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
}
LUMA = torch.tensor([0.299, 0.587, 0.114])


def still(**changes: object) -> AugmentConfig:
    """Nothing random but what `changes` says."""
    return AugmentConfig(**{**STILL, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 4, size: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=seeded(99))


def pixels(standardised: Tensor) -> Tensor:
    """Back to 0..1."""
    return standardised * torch.tensor(IMAGENET.std).view(1, 3, 1, 1) + torch.tensor(IMAGENET.mean).view(1, 3, 1, 1)


# --- the identity and its simplest relatives ---


def test_normalise_equals_torchvision() -> None:
    images = pictures()
    expected = TF.normalize(images.permute(0, 3, 1, 2).float() / 255, IMAGENET.mean, IMAGENET.std)
    torch.testing.assert_close(normalise(images), expected, rtol=0, atol=1e-5)


def test_nothing_random_is_normalise() -> None:
    images = pictures()
    torch.testing.assert_close(augment(images, still(), 24, seeded()), normalise(images), rtol=0, atol=1e-4)


def test_a_certain_flip_mirrors_left_and_right() -> None:
    images = pictures()
    expected = normalise(images).flip(3)
    torch.testing.assert_close(augment(images, still(flip=1.0), 24, seeded()), expected, rtol=0, atol=1e-4)


def test_a_flip_of_one_half_flips_some() -> None:
    signs = affine_maps(still(flip=0.5), 24, 200, seeded())[:, 0, 0].sign()
    assert 60 < (signs < 0).sum() < 140


def test_the_stored_size_is_brought_to_the_models_size() -> None:
    assert augment(pictures(size=24), AugmentConfig(), 16, seeded()).shape == (4, 3, 16, 16)


def test_the_stored_images_are_not_written_to() -> None:
    images = pictures()
    before = images.clone()
    augment(images, AugmentConfig(contrast=0.5, saturation=0.5), 16, seeded())
    assert torch.equal(images, before)


# --- the same as the plain version ---


def plainly(images: Tensor, config: AugmentConfig, size: int, generator: torch.Generator) -> Tensor:
    """The whole batch at once, one step after the other."""
    theta = affine_maps(config, images.shape[1], len(images), generator)
    matrix, offset = colour_maps(config, len(images), generator)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    source = images.permute(0, 3, 1, 2).float() / 255
    sampled = F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    grey = (sampled * LUMA.view(1, 3, 1, 1)).sum(1).mean((1, 2))
    coloured = (offset * grey.view(-1, 1, 1) + matrix @ sampled.flatten(2)).clamp(0, 1).unflatten(2, (size, size))
    return (coloured - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / torch.tensor(IMAGENET.std).view(3, 1, 1)


@pytest.mark.parametrize("shape", [(32, 256, 224), (24, 72, 64), (5, 600, 224), (1, 24, 24), (7, 20, 40)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"contrast": 0.3, "saturation": 0.4}, {"rotation_degrees": 180.0}], ids=str)
def test_parts_of_a_batch_give_what_the_whole_batch_gives(
    shape: tuple[int, int, int], changes: dict[str, float]
) -> None:
    count, stored, size = shape
    config = AugmentConfig(**changes)  # type: ignore[arg-type]
    ours, plain = (each(pictures(count, stored), config, size, seeded(7)) for each in (augment, plainly))
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5)


# --- the draws ---


def test_the_same_seed_gives_the_same_tensor_and_another_seed_another() -> None:
    images = pictures()
    first, again, other = (augment(images, AugmentConfig(), 16, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    augment(pictures(), AugmentConfig(), 16, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_of_a_batch_has_its_own_parameters() -> None:
    config = AugmentConfig(contrast=0.2, saturation=0.2)
    maps = affine_maps(config, 24, 16, seeded())
    matrices, offsets = colour_maps(config, 16, seeded())
    for drawn in (maps, matrices, offsets):
        assert len({tuple(each.flatten().tolist()) for each in drawn}) == 16
    images = pictures(1).repeat(4, 1, 1, 1)
    views = augment(images, config, 16, seeded())
    assert all(not torch.equal(views[0], view) for view in views[1:])


@given(
    st.floats(0, 180), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 2**32 - 1)
)
@settings(deadline=None, max_examples=30)
def test_every_value_is_finite_and_a_colour_between_black_and_white(
    degrees: float, brightness: float, contrast: float, saturation: float, hue: float, seed: int
) -> None:
    config = AugmentConfig(
        crop_scale=(0.05, 1.0),
        rotation_degrees=degrees,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
    )
    out = augment(pictures(), config, 16, seeded(seed))
    assert torch.isfinite(out).all()
    back = pixels(out)
    assert back.min() > -1e-5
    assert back.max() < 1 + 1e-5


# --- geometry ---


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0.3, 3), st.floats(0.3, 3), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_without_rotation_a_crop_stays_inside_the_image(a: float, b: float, c: float, d: float, seed: int) -> None:
    config = still(crop_scale=(min(a, b), max(a, b)), crop_ratio=(min(c, d), max(c, d)), flip=0.5)
    maps = affine_maps(config, 72, 32, seeded(seed))
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    assert (maps @ corners.T).abs().max() <= 1 + 1e-5
    assert (maps[:, 0, 1] == 0).all()
    assert (maps[:, 1, 0] == 0).all()


# Stored sides and settings: the defaults, the demo's, torchvision's own, often too wide, always too wide, too narrow.
CROPS = [
    (256, (0.5, 1.0), (3 / 4, 4 / 3)),
    (72, (0.6, 1.0), (3 / 4, 4 / 3)),
    (231, (0.08, 1.0), (3 / 4, 4 / 3)),
    (64, (0.9, 1.0), (1 / 3, 3.0)),
    (64, (0.95, 1.0), (2.0, 3.0)),
    (50, (0.9, 1.0), (0.2, 0.3)),
]


@pytest.mark.parametrize(("side", "scale", "ratio"), CROPS, ids=str)
def test_crops_are_distributed_as_torchvisions(
    side: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count, image = 1500, torch.empty(3, side, side)
    config = still(crop_scale=scale, crop_ratio=ratio)
    left, top, width, height = crops(config, side, count, seeded(1))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        drawn = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    their_top, their_left, their_height, their_width = torch.tensor(drawn).float().unbind(1)
    pairs = {
        "area": (width * height, their_width * their_height),
        "aspect": (width / height, their_width / their_height),
        "left": (left, their_left),
        "top": (top, their_top),
    }
    for name, (ours, theirs) in pairs.items():
        # Equal distributions differ by 0.06 in one of 100 such comparisons; crops clamped to the image by 0.19 in area.
        assert ks_2samp(ours.numpy(), theirs.numpy()).statistic < 0.06, name
    full, their_full = ((w == side) | (h == side) for w, h in ((width, height), (their_width, their_height)))
    assert abs(full.float().mean() - their_full.float().mean()) < 0.06
    if (side, *scale) == (256, 0.5, 1.0):
        assert full.float().mean() < 0.04  # 26 % were, clamped
        assert (width * height).mean() / side**2 == pytest.approx(0.693, abs=0.01)


def test_a_map_shows_exactly_the_crop() -> None:
    side, config = 72, still(crop_scale=(0.3, 1.0), crop_ratio=(0.5, 2.0))
    maps = affine_maps(config, side, 64, seeded(3))
    left, top, width, height = crops(config, side, 64, seeded(3))
    corners = torch.tensor([[-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])
    first, last = ((maps @ corner + 1) * side / 2 for corner in corners)  # in pixels
    torch.testing.assert_close(first, torch.stack([left, top], 1), rtol=0, atol=1e-3)
    torch.testing.assert_close(last, torch.stack([left + width, top + height], 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("degrees", [30.0, 180.0])
def test_angles_fill_the_range_to_both_sides_and_nothing_else_moves(degrees: float) -> None:
    maps = affine_maps(still(rotation_degrees=degrees), 24, 2000, seeded())
    turn = maps[:, :, :2]
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(2).expand(2000, 2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(2000), rtol=0, atol=1e-5)
    torch.testing.assert_close(maps[:, :, 2], torch.zeros(2000, 2))
    angles = torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0]))
    assert angles.abs().max() <= degrees + 1e-3
    assert angles.min() < -0.95 * degrees
    assert angles.max() > 0.95 * degrees


def test_a_rotation_leaves_no_black_corners() -> None:
    white = torch.full((8, 24, 24, 3), 255, dtype=torch.uint8)
    out = pixels(augment(white, still(rotation_degrees=180.0), 24, seeded()))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-4)


# --- colour ---


def test_brightness_alone_scales() -> None:
    matrix, offset = colour_maps(still(brightness=0.3), 64, seeded())
    factor = matrix[:, 0, 0]
    torch.testing.assert_close(matrix, factor.view(-1, 1, 1) * torch.eye(3), rtol=0, atol=1e-5)
    assert (offset == 0).all()
    assert factor.min() >= 0.7 - 1e-5
    assert factor.max() <= 1.3 + 1e-5
    assert factor.max() - factor.min() > 0.4


def test_contrast_equals_torchvisions_around_the_mean_luma() -> None:
    images = pictures(8)
    ours = pixels(augment(images, still(contrast=0.4), 24, seeded(5)))
    factors = colour_maps(still(contrast=0.4), 8, generator_after_geometry(8, 5))[0][:, 0, 0]
    for image, out, factor in zip(images, ours, factors, strict=True):
        expected = TF.adjust_contrast(image.permute(2, 0, 1).float() / 255, factor.item())
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)


def generator_after_geometry(count: int, seed: int) -> torch.Generator:
    generator = seeded(seed)
    affine_maps(still(), 24, count, generator)
    return generator


@pytest.mark.parametrize("changes", [{"saturation": 1.0}, {"hue": 0.5}, {"saturation": 0.7, "hue": 0.3}], ids=str)
def test_saturation_and_hue_keep_grey_grey(changes: dict[str, float]) -> None:
    greys = torch.arange(0, 256, 51).view(-1, 1, 1, 1).expand(6, 8, 8, 3).to(torch.uint8)
    out = pixels(augment(greys, still(**changes), 8, seeded()))
    torch.testing.assert_close(out, greys.permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-3)


def test_hue_and_saturation_keep_the_luma() -> None:
    for changes in ({"hue": 0.5}, {"saturation": 1.0}):
        matrix, _ = colour_maps(still(**changes), 64, seeded())
        torch.testing.assert_close(LUMA @ matrix, LUMA.expand(64, 3), rtol=0, atol=1e-4)


def test_no_saturation_is_grey() -> None:
    """A factor of 0 is the far end of saturation=1; the smallest of many draws comes close to it."""
    matrix, _ = colour_maps(still(saturation=1.0), 4000, seeded())
    spread = (matrix - matrix.mean(1, keepdim=True)).abs().amax((1, 2))
    assert spread.min() < 2e-3


def test_half_a_turn_of_hue_sends_a_colour_to_its_opposite() -> None:
    """Hue angles fill -1/2 to 1/2 of a turn: the chroma's angle to its origin covers the circle."""
    matrix, _ = colour_maps(still(hue=0.5), 500, seeded())
    yiq = torch.tensor([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    red = torch.tensor([0.8, 0.2, 0.2])
    before, after = yiq @ red, torch.einsum("ij,njk,k->ni", yiq, matrix, red)
    torch.testing.assert_close(after.norm(dim=1), before.norm().expand(500), rtol=1e-3, atol=1e-4)
    turned = torch.atan2(after[:, 1], after[:, 0]) - torch.atan2(before[1], before[0])
    turned = (turned + math.pi) % (2 * math.pi) - math.pi
    assert turned.min() < -0.95 * math.pi
    assert turned.max() > 0.95 * math.pi
