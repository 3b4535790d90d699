"""Mixed images: pixels and shares of labels agree, and every image has a share of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.config.train import AugmentConfig
from harness.data.mixing import Target, mix
from tests.data.test_augment import seeded

COUNT, SIDE = 64, 16


def batch() -> tuple[Tensor, Tensor]:
    """Each image has its own number as its only colour."""
    labels = torch.arange(COUNT)
    return labels.float().view(-1, 1, 1, 1).expand(COUNT, 3, SIDE, SIDE), labels


def mixed(**changes: float) -> tuple[Tensor, Target]:
    images, target = mix(*batch(), AugmentConfig(**changes), seeded())
    assert isinstance(target, Target)
    assert torch.equal(target.labels, torch.arange(COUNT))
    assert torch.equal(target.others.sort().values, torch.arange(COUNT))
    return images, target


def test_nothing_is_mixed_and_drawn_without_a_field() -> None:
    generator = seeded()
    images, labels = batch()
    assert mix(images, labels, AugmentConfig(), generator)[0] is images
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_mixup_is_the_mean_of_two_images_by_the_share() -> None:
    images, target = mixed(mixup=0.2)
    expected = target.share * target.labels + (1 - target.share) * target.others
    torch.testing.assert_close(images, expected.view(-1, 1, 1, 1).expand_as(images), rtol=0, atol=1e-4)
    assert len(target.share.unique()) > COUNT / 2


def test_cutmix_takes_each_pixel_from_one_of_two_images_and_the_share_is_that_of_the_pixels() -> None:
    images, target = mixed(cutmix=1.0)
    own, other = (images == each.view(-1, 1, 1, 1) for each in (target.labels, target.others))
    assert (own | other).all()
    different = target.labels != target.others
    torch.testing.assert_close(own.float().mean((1, 2, 3))[different], target.share[different], rtol=0, atol=1e-6)
    assert 0.5 < target.share.mean() < 0.75  # a part of a box may lie outside


def test_with_both_each_image_has_one_of_the_two() -> None:
    images, target = mixed(mixup=1.0, cutmix=1.0)
    one_colour = (images == images[:, :, :1, :1]).all((1, 2, 3)) & (target.labels != target.others)
    assert COUNT * 0.25 < one_colour.sum() < COUNT * 0.75


@pytest.mark.parametrize("alpha", [0.1, 1.0, 8.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    generator = seeded()
    shares = torch.cat([mix(*batch(), AugmentConfig(mixup=alpha), generator)[1].share for _ in range(60)])  # type: ignore[union-attr]
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_features_are_mixed_as_images_are() -> None:
    images, labels = batch()
    features, target = mix(images[:, :, 0, 0], labels, AugmentConfig(mixup=0.4), seeded())
    whole, same = mix(images, labels, AugmentConfig(mixup=0.4), seeded())
    assert isinstance(target, Target)
    assert isinstance(same, Target)
    assert torch.equal(target.share, same.share)
    torch.testing.assert_close(features, whole[:, :, 0, 0])


def test_a_target_splits_as_a_batch_does() -> None:
    target = mixed(mixup=0.4)[1]
    parts = target.tensor_split(3)
    assert [len(part.labels) for part in parts] == [22, 21, 21]
    assert torch.equal(torch.cat([part.share for part in parts]), target.share)
    assert torch.equal(torch.cat([part.larger() for part in parts]), target.larger())
    assert torch.equal(target.larger(), torch.where(target.share >= 0.5, target.labels, target.others))
