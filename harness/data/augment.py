"""Augment stored images, a whole batch at a time, on the training device.

Crop, flip and rotation of an image are one affine map, sampled once; brightness, contrast, saturation and hue are one
3x3 matrix and an offset. Every image of a batch has its own. TrivialAugment and random erasing follow. The numbers are
drawn on the CPU from a given generator, so they are the same on every device.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config.contracts import Preprocessing
from harness.config.train import AugmentConfig
from harness.data import trivial

IMAGENET = Preprocessing()

# RGB to YIQ (NTSC 1953): rotating the I-Q plane turns the hue and keeps the luma.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMA = torch.tensor([0.299, 0.587, 0.114])

# Stored pixels that a CPU core processes at a time: the results (a few MB) stay in its cache. With whole batches,
# allocating memory took most of the time: 90 ms for 32 photographs of 256 px on one core, 24 ms in parts.
PIXELS = 2 * 256 * 256

ERASED = AugmentConfig(crop_scale=(0.02, 0.33), crop_ratio=(0.3, 3.3))  # torchvision's defaults

TRIES = 10  # as many as torchvision's RandomResizedCrop has


def normalise(images: Tensor, preprocessing: Preprocessing = IMAGENET) -> Tensor:
    """Standardise uint8 [B, H, W, 3] to float32 [B, 3, H, W] by the channels' mean and deviation."""
    mean, std, _ = _constants(preprocessing, images.device)
    return images.permute(0, 3, 1, 2).float().sub_(mean.unsqueeze(2) * 255).div_(std.unsqueeze(2) * 255)


def augment(
    images: Tensor,
    config: AugmentConfig,
    size: int,
    generator: torch.Generator,
    preprocessing: Preprocessing = IMAGENET,
) -> Tensor:
    """Random crop, flip, rotation and colour: uint8 [B, S, S, 3] to standardised float32 [B, 3, size, size].

    Then TrivialAugment and random erasing, if configured.
    """
    count, device = len(images), images.device
    geometry = affine_maps(config, images.shape[1], count, generator)
    colours = colour_maps(config, count, generator)
    operations = trivial.draw(count, generator) if config.trivial_augment else None
    if operations:
        geometry = geometry @ trivial.maps(operations)
    maps = torch.cat([part.flatten(1) for part in (geometry, *colours)], 1)
    # One small asynchronous transfer per batch: the driver has copied it when the call returns.
    maps = maps.to(device, non_blocking=device.type == "cuda")
    out = torch.empty(count, 3, size, size, device=device)
    part = max(1, PIXELS // images[0, ..., 0].numel()) * torch.get_num_threads() if device.type == "cpu" else count
    parts = operations.split(part) if operations else itertools.repeat(None)
    for stored, drawn, place, each in zip(images.split(part), maps.split(part), out.split(part), parts, strict=False):
        _change(stored, drawn, config.contrast > 0, each, place, preprocessing)
    if config.random_erasing:
        _erase(out, config.random_erasing, generator)
    return out


def _change(
    images: Tensor,
    maps: Tensor,
    contrast: bool,
    operations: trivial.Operations | None,
    out: Tensor,
    preprocessing: Preprocessing,
) -> None:
    """Write the images, changed by `maps` [B, 6 + 9 + 3] and `operations`, into `out` [B, 3, size, size]."""
    mean, std, luma = _constants(preprocessing, images.device)
    theta, matrix, offset = (
        each.unflatten(1, shape) for each, shape in zip(maps.split((6, 9, 3), 1), ((2, 3), (3, 3), (3, 1)), strict=True)
    )
    size = out.shape[-1]
    grid = torch.matmul(_pixel_centres(size, images.device), theta.transpose(1, 2)).unflatten(1, (size, size))
    source = images.permute(0, 3, 1, 2).float().div_(255)
    # Reflection leaves no black corners behind a rotation, so the model cannot learn from them.
    sampled = F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    pixels, coloured = sampled.flatten(2), out.flatten(2)
    if contrast:
        # Contrast works around the image's own mean luma, as in torchvision.
        grey = (sampled * luma.unsqueeze(2)).sum(1).mean((1, 2))
        torch.baddbmm(offset * grey.view(-1, 1, 1), matrix, pixels, out=coloured)
    else:  # the offset is zero
        torch.bmm(matrix, pixels, out=coloured)
    coloured.clamp_(0, 1)
    if operations:
        trivial.change(out, operations)
    coloured.sub_(mean).div_(std)


def _erase(images: Tensor, probability: float, generator: torch.Generator) -> None:
    """Replace a rectangle of some images with the mean colour, in place; drawn as torchvision's RandomErasing does."""
    chosen = _uniform(len(images), 0, 1, generator) < probability
    boxes = torch.stack(crops(ERASED, images.shape[-1], len(images), generator), 1).int()
    for image in chosen.nonzero().flatten().tolist():
        left, top, width, height = boxes[image].tolist()
        images[image, :, top : top + height, left : left + width] = 0


@cache
def _constants(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and luma [3, 1] of the colours."""
    both = preprocessing.mean, preprocessing.std
    mean, std = (torch.tensor(each, device=device).unsqueeze(1) for each in both)
    return mean, std, _LUMA.to(device).unsqueeze(1)


@lru_cache(maxsize=4)
def _pixel_centres(size: int, device: torch.device) -> Tensor:
    """(x, y, 1) of every pixel of the output, x and y in -1..1: [size * size, 3]."""
    identity = torch.eye(2, 3, device=device).unsqueeze(0)
    centres = F.affine_grid(identity, [1, 3, size, size], align_corners=False).flatten(0, 2)
    return torch.cat([centres, torch.ones_like(centres[:, :1])], 1)


def affine_maps(config: AugmentConfig, side: int, count: int, generator: torch.Generator) -> Tensor:
    """Return one map [2, 3] per image from output to input coordinates, in -1..1: crop, flip, rotate.

    `side` is the stored images' side, in pixels.
    """
    left, top, width, height = crops(config, side, count, generator)
    x, y = (2 * left + width) / side - 1, (2 * top + height) / side - 1
    width, height = width / side, height / side
    sign = torch.where(_uniform(count, 0, 1, generator) < config.flip, -1.0, 1.0)
    angle = _uniform(count, -1, 1, generator) * math.radians(config.rotation_degrees)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    zero = torch.zeros(count)
    crop = torch.stack([torch.stack([width * sign, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    return rotation @ crop


def crops(config: AugmentConfig, side: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Left, top, width and height [count] of random crops of a square, in whole pixels.

    Samples as torchvision's RandomResizedCrop does: the first of ten draws that fits, or else the largest centre crop
    with an allowed ratio. All ten are always drawn, so that the generator always advances by the same amount.
    """
    draws = count, TRIES
    area = side**2 * _uniform(draws, *config.crop_scale, generator)
    ratio = torch.exp(_uniform(draws, math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]), generator))
    sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).round()
    fits = ((sizes >= 1) & (sizes <= side)).all(0)
    # The whole square has the ratio 1; one side is cut if that is not allowed.
    middle = side * torch.tensor([min(1, config.crop_ratio[1]), 1 / max(1, config.crop_ratio[0])])
    first = sizes.gather(2, fits.int().argmax(1).expand(2, count).unsqueeze(2)).squeeze(2)
    chosen = fits.any(1)
    width, height = size = torch.where(chosen, first, middle.round().clamp(min=1).unsqueeze(1))
    room = side - size
    left, top = torch.where(chosen, (_uniform((2, count), 0, 1, generator) * (room + 1)).floor(), (room / 2).floor())
    return left, top, width, height


def colour_maps(config: AugmentConfig, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one matrix [3, 3] and one offset [3, 1] per image, the offset in units of its mean luma.

    Brightness, contrast and saturation scale by a factor from 1 - x to 1 + x, hue turns by -x to +x of a circle.
    """
    brightness, contrast, saturation = (
        1 + _uniform(count, -1, 1, generator) * strength
        for strength in (config.brightness, config.contrast, config.saturation)
    )
    angle = _uniform(count, -1, 1, generator) * config.hue * 2 * math.pi
    turn = torch.eye(3).repeat(count, 1, 1)
    turn[:, 1, 1], turn[:, 1, 2] = angle.cos(), -angle.sin()
    turn[:, 2, 1], turn[:, 2, 2] = angle.sin(), angle.cos()
    hue = torch.linalg.inv(_YIQ) @ turn @ _YIQ
    grey = _LUMA.expand(3, 3)
    mix = saturation.view(-1, 1, 1)
    matrix = (contrast * brightness).view(-1, 1, 1) * (mix * torch.eye(3) + (1 - mix) * grey) @ hue
    offset = ((1 - contrast) * brightness).view(-1, 1, 1).expand(-1, 3, 1)
    return matrix, offset


def _uniform(shape: int | tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low
