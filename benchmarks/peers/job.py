"""What the peers share, as a project would keep it in one file: the job, its data, model, optimizer and schedule.

The photographs are decoded by Pillow in two worker processes in every epoch, as the tutorials do it. The model is built
by the harness's class, so that everybody trains the same one, and the parameter groups are the same.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from harness.models.maxvit import MaxViTT, TinyMaxViT

WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    model: str  # tiny or maxvit
    photographs: str  # folder with train/, valid/ and test/
    image_size: int
    epochs: int
    batch_size: int
    depth_lr_mult: float
    weight_decay: float
    warmup_epochs: float
    clip_norm: float
    label_smoothing: float
    configurations: list[dict[str, float]]  # base_lr, dropout

    def transforms(self, train: bool) -> v2.Transform:
        size = self.image_size
        augmentation = [
            v2.RandomResizedCrop(size, scale=(0.5, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(30, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(brightness=0.03, hue=0.03),
        ]
        return v2.Compose(
            [
                *(augmentation if train else [v2.Resize(size), v2.CenterCrop(size)]),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def loader(self, *splits: str, train: bool, workers: int = WORKERS) -> DataLoader[Any]:
        """Batches of one or several splits; the workers live as long as the loader."""
        parts = [ImageFolder(f"{self.photographs}/{split}", self.transforms(train)) for split in splits]
        return DataLoader(
            ConcatDataset(parts), self.batch_size, shuffle=train, num_workers=workers, persistent_workers=workers > 0
        )

    def build(self, dropout: float) -> nn.Module:
        classes = len(ImageFolder(f"{self.photographs}/train").classes)
        if self.model == "tiny":
            return TinyMaxViT(dropout=dropout).build(classes, self.image_size)
        return MaxViTT(dropout=dropout, pretrained=False).build(classes, self.image_size)

    def optimizer(self, model: nn.Module, base_lr: float) -> torch.optim.Optimizer:
        """AdamW with a rate that falls with the distance from the head; biases, norms and position tables undecayed."""
        blocks = len(model.blocks)  # type: ignore[arg-type]
        depths = ["classifier.", *(f"blocks.{block}." for block in reversed(range(blocks))), "stem."]
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            distance = next(number for number, prefix in enumerate(depths) if name.startswith(prefix))
            decays = parameter.ndim > 1 and not name.endswith("relative_position_bias_table")
            groups.setdefault((distance, decays), []).append(parameter)
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": base_lr * self.depth_lr_mult**distance,
                    "weight_decay": self.weight_decay if decays else 0.0,
                }
                for (distance, decays), parameters in groups.items()
            ]
        )

    def schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> torch.optim.lr_scheduler.LambdaLR:
        """Linear warm-up, then half a cosine, step by step."""
        warmup, steps = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def arguments() -> tuple[Job, Path]:
    """The job's file and the folder to write to, from the command line."""
    return Job(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])


def finished(out: Path, validation: list[float], test: float) -> None:
    """Where `benchmarks.whole_study` reads the accuracies of the trials, in their order, and of the final model."""
    (out / "accuracies.json").write_text(json.dumps({"validation": validation, "test": test}))
