"""Mix pairs of training images of a batch, on the training device: mixup and CutMix.

Every image has its own share; an image's partner is another of the batch. The numbers are drawn on the CPU from a given
generator, so they are the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config.train import AugmentConfig


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a batch of mixed images should give: `labels` and `others` int64 [B], `share` float32 [B] of `labels`."""

    labels: Tensor
    others: Tensor
    share: Tensor

    def tensor_split(self, parts: int) -> list[Target]:
        """Split as a tensor does."""
        split = zip(*(each.tensor_split(parts) for each in (self.labels, self.others, self.share)), strict=True)
        return [Target(labels=labels, others=others, share=share) for labels, others, share in split]

    def larger(self) -> Tensor:
        """Return each image's label with the larger share, int64 [B]."""
        return torch.where(self.share >= 0.5, self.labels, self.others)


def mix(
    images: Tensor, labels: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor | Target]:
    """Mix a batch [B, ...], labels int64 [B], as `config` says; unchanged if it says nothing."""
    if not (config.mixup or config.cutmix):
        return images, labels
    count, device = len(images), images.device
    # torch's Beta distribution takes no generator.
    random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    partner = _sent(random.permutation(count), device)
    cuts = random.random(count) < (0.5 if config.mixup else 1.0) if config.cutmix else np.zeros(count, dtype=bool)
    drawn = random.beta(*[np.where(cuts, config.cutmix or 1.0, config.mixup or 1.0)] * 2)
    shares = _sent(drawn.astype(np.float32), device).view(-1, *[1] * (images.ndim - 1))
    if cuts.any():
        boxes = _sent(_boxes(drawn, images.shape[2], images.shape[3], random), device)
        cut = _sent(cuts, device).view(-1, 1, 1, 1)
        shares = torch.where(cut, _outside(boxes, images.shape[2], images.shape[3]), shares)
    mixed = torch.lerp(images[partner], images, shares)
    return mixed, Target(labels=labels, others=labels[partner], share=shares.flatten(1).mean(1))


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy a few numbers to the device without waiting for the step before."""
    return torch.from_numpy(numbers).to(device, non_blocking=device.type == "cuda")


def _boxes(shares: np.ndarray, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Return int64 [B, 4]: top, bottom, left and right of a box with the image's proportions, of 1 - share of its area.

    Its centre is anywhere, so a part of it may lie outside.
    """
    half = np.sqrt(1 - shares) / 2
    centres = random.random((2, len(shares)))
    found = [
        np.rint(side * edge)
        for centre, side in zip(centres, (height, width), strict=True)
        for edge in ((centre - half).clip(min=0), (centre + half).clip(max=1))
    ]
    return np.stack(found, axis=1).astype(np.int64)


def _outside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return float32 [B, 1, height, width]: 0 in the boxes, 1 outside of them."""
    top, bottom, left, right = boxes.view(-1, 4, 1).unbind(1)
    rows, columns = (torch.arange(side, device=boxes.device) for side in (height, width))
    inside = ((rows >= top) & (rows < bottom)).unsqueeze(2) & ((columns >= left) & (columns < right)).unsqueeze(1)
    return (~inside).unsqueeze(1).float()


def mean_loss(logits: Tensor, labels: Tensor | Target, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Return the mean loss of a part; of mixed images by the shares of both labels."""

    def loss(labels: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(logits, labels, class_weights, reduction=reduction, label_smoothing=label_smoothing)

    if isinstance(labels, Target):
        both = labels.share * loss(labels.labels, "none") + (1 - labels.share) * loss(labels.others, "none")
        return both.mean()
    # With weights, torch's mean would divide by those of the part.
    return loss(labels, "mean") if class_weights is None else loss(labels, "sum") / len(labels)
