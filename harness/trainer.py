"""The only training loop. `fit` is a generator: pruning, logging and the final run are its consumers."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.data.augment import augment, normalise
from harness.data.tensors import ImageSet
from harness.engine import Runtime, predict, seeded, train_step
from harness.optim import ParameterGroup, lr_factor, set_lr, set_training
from harness.results import EpochResult, Metrics
from harness.seeds import derive_seed

EVALUATION_BATCH = 128


@dataclass
class Progress:
    """How far a fit is; a display may read it from another thread."""

    epoch: int = 0
    step: int = 0
    steps: int = 0  # in this epoch


@dataclass(frozen=True, kw_only=True)
class Training:
    """One assembled training job; `harness.experiment.assemble` makes it."""

    config: TrainConfig
    classes: tuple[str, ...]
    train: ImageSet
    val: ImageSet | None  # None when the final run trains on the validation images too
    model: nn.Module
    groups: list[ParameterGroup]
    optimizer: torch.optim.Optimizer
    runtime: Runtime
    seed: int
    progress: Progress = field(default_factory=Progress)


def fit(training: Training) -> Generator[EpochResult, None, None]:
    """Train epoch by epoch, yielding each one's result. Closing the generator stops the training.

    All random draws of an epoch (order, augmentation, dropout, stochastic depth) follow from the training's seed and
    the epoch's number; torch's global generator is left as it was found.
    """
    for epoch in range(1, training.config.epochs + 1):
        start = time.perf_counter()
        train = _train_epoch(training, epoch)
        val = evaluate(training.model, training.val, training.runtime) if training.val is not None else None
        yield EpochResult(
            epoch=epoch,
            lr=training.optimizer.param_groups[0]["lr"],
            train=train,
            val=val,
            seconds=time.perf_counter() - start,
        )


def _train_epoch(training: Training, epoch: int) -> Metrics:
    config, runtime = training.config, training.runtime
    seed = derive_seed(training.seed, "epoch", epoch)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(training.train), config.batch_size, generator)
    training.progress.epoch, training.progress.steps = epoch, len(batches)
    loss_sum = torch.zeros((), device=runtime.device)
    correct = torch.zeros((), dtype=torch.int64, device=runtime.device)
    set_training(training.model, training.groups)
    with seeded(seed, runtime.device):
        for step, batch in enumerate(batches):
            training.progress.step = step
            set_lr(
                training.optimizer,
                lr_factor(
                    step + (epoch - 1) * len(batches),
                    config.epochs * len(batches),
                    config.optim.warmup_epochs * len(batches),
                    config.optim.schedule,
                ),
            )
            stored = training.train.images[batch].to(runtime.device)
            images = runtime.move(augment(stored, config.augment, config.data.image_size, generator))
            loss, hits = train_step(
                training.model,
                images,
                training.train.labels[batch].to(runtime.device),
                training.optimizer,
                runtime,
                label_smoothing=config.label_smoothing,
                clip_norm=config.optim.clip_norm,
            )
            loss_sum += loss
            correct += hits
    total = len(training.train)
    return Metrics(loss=loss_sum.item() / total, correct=int(correct.item()), total=total)


def _batches(count: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """A shuffled order cut into even batches of at most `batch_size`; none is left with a single image by chance."""
    order = torch.randperm(count, generator=generator)
    return list(torch.tensor_split(order, -(-count // batch_size)))


def evaluate(model: nn.Module, images: ImageSet, runtime: Runtime) -> Metrics:
    """Loss (plain cross-entropy) and correct / total of a split, dropout off."""
    logits = logits_of(model, images, runtime)
    labels = images.labels.to(logits.device)
    loss = F.cross_entropy(logits, labels).item()
    correct = int((logits.argmax(1) == labels).sum().item())
    return Metrics(loss=loss, correct=correct, total=len(images))


def logits_of(model: nn.Module, images: ImageSet, runtime: Runtime) -> Tensor:
    """Logits float32 [N, classes] of every image of a split, in its order."""
    model.eval()
    parts = [
        predict(model, normalise(part.to(runtime.device)), runtime) for part in images.images.split(EVALUATION_BATCH)
    ]
    return torch.cat(parts)
