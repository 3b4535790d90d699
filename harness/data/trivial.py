"""TrivialAugment (Müller and Hutter, 2021): one operation of torchvision's table per image, with a random strength.

Shear, translation and rotation become an affine map that joins those of crop and flip, so that an image is sampled
once. The other operations work on the images of a batch that drew them, each with its own strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 31  # strengths of an operation
MOST_SHEAR, MOST_DEGREES, MOST_CHANGE = 0.99, 135.0, 0.99
MOST_TRANSLATION = 32 / 224  # of the side; torchvision has 32 pixels
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Operations:
    """An operation per image: its place in NAMES, int64 [B], and its strength, float32 [B] from -1 to 1."""

    chosen: Tensor
    strength: Tensor

    def split(self, size: int) -> list[Operations]:
        """Split as a tensor does."""
        parts = zip(self.chosen.split(size), self.strength.split(size), strict=True)
        return [Operations(chosen=chosen, strength=strength) for chosen, strength in parts]


def draw(count: int, generator: torch.Generator) -> Operations:
    """Draw an operation per image, uniformly, and its strength: one of BINS, to either side."""
    chosen, bins, signs = (torch.randint(most, (count,), generator=generator) for most in (len(NAMES), BINS, 2))
    return Operations(chosen=chosen, strength=bins / (BINS - 1) * (1 - 2 * signs))


def maps(operations: Operations) -> Tensor:
    """Return a map [3, 3] per image from output to input coordinates in -1..1; the identity if colours change."""
    found = torch.eye(3).repeat(len(operations.chosen), 1, 1)
    for which, (name, strength) in enumerate(
        zip(operations.chosen.tolist(), operations.strength.tolist(), strict=True)
    ):
        if name < len(GEOMETRY):
            found[which, :2] = torch.tensor(GEOMETRY[NAMES[name]](strength))
    return found


def change(images: Tensor, operations: Operations) -> None:
    """Change the colours of images [B, 3, H, W] with values in 0..1, in place."""
    for name in set(operations.chosen.tolist()):
        if name >= len(GEOMETRY):
            places = (operations.chosen == name).nonzero().flatten()
            later = images.device.type == "cuda"  # a copy of a few bytes need not be waited for
            strength = operations.strength[places].view(-1, 1, 1, 1).to(images.device, non_blocking=later)
            places = places.to(images.device, non_blocking=later)
            images[places] = COLOUR[NAMES[name]](images[places], strength)


Rows = list[list[float]]


def _rotate(strength: float) -> Rows:
    angle = math.radians(MOST_DEGREES * strength)
    return [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]


def _blend(images: Tensor, others: Tensor, strength: Tensor) -> Tensor:
    return torch.lerp(others.expand_as(images), images, 1 + MOST_CHANGE * strength).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    return (images * _luma(images.device)).sum(1, keepdim=True)


@cache
def _luma(device: torch.device) -> Tensor:
    return torch.tensor(LUMA, device=device).view(3, 1, 1)


@cache
def _smoothing(device: torch.device) -> Tensor:
    return torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=device).div_(13).expand(3, 1, 3, 3)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    blurred = images.clone()  # the border stays
    if min(images.shape[2:]) > 2:
        blurred[:, :, 1:-1, 1:-1] = F.conv2d(images, _smoothing(images.device), groups=3)
    return _blend(images, blurred, strength)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    step = 2 ** (strength.abs() * 6).round()  # of 256 levels; 8 to 2 bits remain
    return (images * 255).round_().div_(step).floor_().mul_(step).div_(255)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low)).clamp_(0, 1)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Even out each channel's histogram of 256 levels, as Pillow does."""
    levels = (images * 255).round_().long().flatten(2)  # [b, 3, H * W]
    channels = levels.shape[0] * levels.shape[1]
    numbered = (levels + 256 * torch.arange(channels, device=levels.device).view(-1, levels.shape[1], 1)).flatten()
    # bincount would wait for the device to see how many there are.
    counts = torch.zeros(256 * channels, dtype=torch.int64, device=levels.device)
    counts = counts.scatter_add_(0, numbered, torch.ones_like(numbered)).view(*levels.shape[:2], 256)
    # A step is the mean count of the levels but the highest.
    step = (levels.shape[2] - counts.gather(2, levels.amax(2, keepdim=True))).div(255, rounding_mode="floor")
    before = counts.cumsum(2) - counts
    table = (before + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor").clamp(0, 255)
    equal = table.gather(2, levels).to(images.dtype).div_(255).view_as(images)
    return torch.where((step == 0).unsqueeze(3), images, equal)


GEOMETRY: dict[str, Callable[[float], Rows]] = {  # rows of the map for a strength
    # Shears are around the upper left corner, as torchvision's.
    "ShearX": lambda strength: [[1, MOST_SHEAR * strength, MOST_SHEAR * strength], [0, 1, 0]],
    "ShearY": lambda strength: [[1, 0, 0], [MOST_SHEAR * strength, 1, MOST_SHEAR * strength]],
    "TranslateX": lambda strength: [[1, 0, -2 * MOST_TRANSLATION * strength], [0, 1, 0]],
    "TranslateY": lambda strength: [[1, 0, 0], [0, 1, -2 * MOST_TRANSLATION * strength]],
    "Rotate": _rotate,
}
COLOUR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # images [b, 3, H, W], strengths [b, 1, 1, 1] to images
    "Identity": lambda images, strength: images,
    "Brightness": lambda images, strength: _blend(images, torch.zeros_like(images), strength),
    "Color": lambda images, strength: _blend(images, _grey(images), strength),
    "Contrast": lambda images, strength: _blend(images, _grey(images).mean((2, 3), keepdim=True), strength),
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": lambda images, strength: torch.where(images >= 1 - strength.abs(), 1 - images, images),
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
NAMES = (*GEOMETRY, *COLOUR)
