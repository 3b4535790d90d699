"""The training loop. `fit` is a generator: pruning, logging and the final run consume it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.base.packing import pack, pack_bits, unpack_bits
from harness.base.seeds import derive_seed
from harness.config.events import EpochResult, Metrics, Objective
from harness.config.train import TrainConfig
from harness.data.mixing import mix
from harness.training.interrupt import undivided
from harness.training.objective import class_weights, contributions, temperature
from harness.training.optim import Average, ParameterGroup, freeze, lr_factor, set_lr, set_training
from harness.training.step import Runtime, halving, predict, random_states, seeded, set_random_states, train_step

EVALUATION_BATCH, CPU_BATCH = 128, 32  # the CPU's caches hold no more; the outputs are the same bits


@dataclass
class Progress:
    """Progress of a fit: its state outside the model and the optimizer.

    A display may read it from another thread, and a checkpoint stores it.
    """

    epochs: list[EpochResult] = field(default_factory=list)  # finished ones
    step: int = 0  # batches done in the current epoch
    steps: int = 0  # batches in an epoch
    trace: Tensor = field(default_factory=lambda: torch.zeros(0, 3))  # loss sum, correct, gradient norm of each batch
    random_states: dict[str, Tensor] = field(default_factory=dict)  # after `step` batches; empty before the first
    micro_batch: int | None = None  # see `train_step`
    seconds: float = 0.0  # spent in this epoch by earlier processes
    started: float = 0.0  # when this process began it
    whole: bool = True  # False while model, optimizer and this are between two states

    @property
    def epoch(self) -> int:
        return len(self.epochs) + 1

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Move from one whole state to the next; a stop request waits for the end."""
        with undivided():
            self.whole = False
            yield
            self.whole = True

    def elapsed(self) -> float:
        """Return the seconds spent in the current epoch."""
        return self.seconds + (time.perf_counter() - self.started if self.started else 0.0)


class Source(Protocol):
    """Source of a training's batches: images, or cached features of images (`harness.training.features`)."""

    @property
    def labels(self) -> Tensor: ...  # int64 [N]
    @property
    def device(self) -> torch.device: ...  # of images or features, labels, and the indices of a batch
    def __len__(self) -> int: ...
    def expect(self, chosen: Tensor) -> None:
        """Begin to prepare the next batch, if that takes long; `batch` follows with the same tensor."""

    def batch(self, chosen: Tensor, config: TrainConfig, runtime: Runtime, generator: torch.Generator) -> Tensor:
        """Return a training step's inputs for the chosen images [B], on the device; random by `generator`."""

    def parts(self, size: int, runtime: Runtime) -> Iterable[Tensor]:
        """Yield inputs of an evaluation, on the device: all images in order, `size` at a time, nothing random."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One assembled training job; `harness.training.assemble.assemble` makes it."""

    config: TrainConfig
    classes: tuple[str, ...]
    train: Source
    val: Source | None  # None when the final run trains on the validation images too
    model: nn.Module
    learner: nn.Module  # what a batch passes: the model, or its head alone if batches are features
    groups: list[ParameterGroup]
    optimizer: torch.optim.Optimizer
    runtime: Runtime
    seed: int
    objective: Objective = "accuracy"  # of the validation
    average: Average | None = None  # of the weights; what is validated, and what remains after the last epoch
    progress: Progress = field(default_factory=Progress)

    def class_weights(self) -> Tensor | None:
        """Return the loss's weights [classes]; None if all are 1."""
        if not self.config.class_weight:
            return None
        found = class_weights(self.train.labels.cpu().numpy(), len(self.classes), self.config.class_weight)
        return torch.from_numpy(found).float().to(self.runtime.device)


def fit(training: Training, after_batch: Callable[[], None] = lambda: None) -> Generator[EpochResult, None, None]:
    """Train from `training.progress` on, yielding each epoch's result.

    Closing the generator stops the training. `after_batch` is called after each batch and each validation, when a
    checkpoint may be written. All random draws of an epoch (order, augmentation, dropout, stochastic depth) are seeded
    by the training's seed and the epoch's number; the state of torch's global generator is restored.
    """
    progress = training.progress
    while progress.epoch <= training.config.epochs:
        progress.started = time.perf_counter()
        _train_epoch(training, after_batch)
        result = _result(training)
        with progress.moving():
            if training.average and progress.epoch == training.config.epochs:
                training.average.swap()
            progress.epochs.append(result)
            progress.step, progress.seconds, progress.random_states = 0, 0.0, {}
        after_batch()
        yield result


def _train_epoch(training: Training, after_batch: Callable[[], None]) -> None:
    progress, runtime = training.progress, training.runtime
    seed = derive_seed(training.seed, "epoch", progress.epoch)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(len(training.train), training.config.batch_size, generator, training.train.device)
    progress.steps = len(batches)
    if progress.step == 0:
        progress.trace = torch.zeros(len(batches), 3, device=runtime.device)
    config = _in_epoch(training.config, progress.epoch)
    freeze(training.model, training.groups, head_only=progress.epoch <= config.optim.head_epochs)
    set_training(training.model, training.learner)
    weights = training.class_weights()
    with seeded(seed, runtime.device):
        if progress.random_states:
            generator.set_state(progress.random_states["augment"])
            set_random_states(progress.random_states, runtime.device)
        while progress.step < len(batches):
            with progress.moving():
                _train_batch(training, config, batches, generator, weights)
                progress.random_states = {**random_states(runtime.device), "augment": generator.get_state()}
                progress.step += 1
            after_batch()


def _in_epoch(config: TrainConfig, epoch: int) -> TrainConfig:
    """Return the configuration in an epoch: in the tail without mixing and in full size."""
    augment = config.augment
    if epoch <= round(config.epochs * (1 - augment.tail), 9):  # 5 * (1 - 0.8) is less than 1
        return config
    return replace(config, augment=replace(augment, mixup=0.0, cutmix=0.0, early_size=None))


def _train_batch(
    training: Training, config: TrainConfig, batches: list[Tensor], generator: torch.Generator, weights: Tensor | None
) -> None:
    runtime, progress = training.runtime, training.progress
    batch, *following = batches[progress.step : progress.step + 2]
    set_lr(training.optimizer, _lr_factor(training, progress.step), _body_factor(training))
    inputs, target = mix(
        training.train.batch(batch, config, runtime, generator),
        training.train.labels[batch].to(runtime.device, non_blocking=runtime.device.type == "cuda"),
        config.augment,
        generator,
    )
    for each in following:
        training.train.expect(each)
    done = train_step(
        training.learner,
        runtime.move(inputs),
        target,
        training.optimizer,
        runtime,
        label_smoothing=config.label_smoothing,
        clip_norm=config.optim.clip_norm,
        micro_batch=progress.micro_batch,
        class_weights=weights,
    )
    if training.average:
        training.average.update(*_position(training, progress.step), config.ema)
    progress.trace[progress.step] = torch.stack([done.loss, done.correct, done.grad_norm])
    if done.micro_batch < min(progress.micro_batch or len(batch), len(batch)):
        progress.micro_batch = done.micro_batch
        text = f"Out of memory: using {done.micro_batch} images at a time, accumulated to the same batch."
        print(text, file=sys.stderr)


def _position(training: Training, step: int) -> tuple[int, int]:
    """Return the number of a step of the current epoch in the whole training, from 0, and that of all steps."""
    progress = training.progress
    return step + (progress.epoch - 1) * progress.steps, training.config.epochs * progress.steps


def _lr_factor(training: Training, step: int) -> float:
    """Return the schedule's factor at a step of the current epoch."""
    optim = training.config.optim
    warmup = optim.warmup_epochs * training.progress.steps
    return lr_factor(*_position(training, step), warmup, optim.schedule, optim.lr_floor)


def _body_factor(training: Training) -> float:
    """Return the factor of the blocks that began to train after `head_epochs`: a warm-up of their own."""
    optim, steps = training.config.optim, training.progress.steps
    began, warmup = optim.head_epochs * steps, optim.warmup_epochs * steps
    return min(1.0, (_position(training, training.progress.step)[0] - began + 1) / (warmup + 1)) if began else 1.0


def _result(training: Training) -> EpochResult:
    """Sum up the finished batches, and validate."""
    config, progress, total = training.config, training.progress, len(training.train)
    trace = progress.trace.cpu().double()
    bad = (~trace.isfinite().all(1)).nonzero()
    good = trace[: int(bad[0]) if len(bad) else len(trace)]
    last = int(bad[0]) if len(bad) else progress.steps - 1
    val = None
    if training.val is not None and not len(bad):
        with _averaged(training):
            logits = logits_of(training.learner, training.val, training.runtime)
        val = measure(logits, training.val.labels, training.objective)
        if progress.epoch == config.epochs:
            found = temperature(logits.cpu().numpy(), training.val.labels.cpu().numpy())
            val = replace(val, temperature=found, missed=_missed(logits, val))
    return EpochResult(
        epoch=progress.epoch,
        lr=training.groups[0].lr * _lr_factor(training, last),
        train=Metrics(loss=trace[:, 0].sum().item() / total, correct=int(good[:, 1].sum()), total=total),
        val=val,
        seconds=progress.elapsed(),
        grad_norm=good[:, 2].max().item() if len(good) else None,
        diverged_step=last + 1 if len(bad) else None,
        micro_batch=min(progress.micro_batch or config.batch_size, config.batch_size),
    )


def _missed(logits: Tensor, val: Metrics) -> str:
    """Pack the predicted classes of the images that `val` counts as missed, in order."""
    predicted = logits.argmax(1).cpu().numpy()
    return pack(predicted[~unpack_bits(val.hits or "", val.total)].astype("uint16"))


@contextmanager
def _averaged(training: Training) -> Iterator[None]:
    """Give the model the average of its weights for a time.

    Meanwhile no checkpoint is whole, and a stop waits for the end of a swap: neither a mixture nor the average must be
    taken for the weights.
    """
    average, progress, swapped = training.average, training.progress, False
    if average is None:
        yield
        return
    try:
        with undivided():
            progress.whole = False
            average.swap()
            swapped = True
        yield
    finally:
        if swapped:
            with progress.moving():
                average.swap()


def _batches(
    count: int, batch_size: int, generator: torch.Generator, device: torch.device | None = None
) -> list[Tensor]:
    """Shuffle and split evenly into batches of at most `batch_size`; no batch has a single image by chance.

    The order is copied to the device once: a copy for each batch would wait for the device.
    """
    order = torch.randperm(count, generator=generator).to(device)
    return list(torch.tensor_split(order, -(-count // batch_size)))


def measure(logits: Tensor, labels: Tensor, objective: Objective = "accuracy") -> Metrics:
    """Return metrics of logits float32 [N, classes], labels int64 [N]."""
    labels = labels.to(logits.device)
    hits = (logits.argmax(1) == labels).cpu().numpy()
    loss = F.cross_entropy(logits, labels).item()
    counted = Metrics(loss=loss, correct=int(hits.sum()), total=len(hits), hits=pack_bits(hits))
    if objective == "accuracy":
        return counted
    losses = F.cross_entropy(logits, labels, reduction="none").cpu().double()  # MPS has no doubles
    found = contributions(objective, *(each.cpu().numpy() for each in (labels, logits.argmax(1), losses)))
    packed = pack(found.astype("float32"))
    return replace(counted, objective=objective, score=float(found.mean()), contributions=packed)


def logits_of(model: nn.Module, images: Source, runtime: Runtime) -> Tensor:
    """Return logits float32 [N, classes] of a split's images, in order. Raises MemoryError as `outputs_of` does."""
    return outputs_of(model, lambda size: images.parts(size, runtime), runtime)


def outputs_of(model: nn.Module, parts: Callable[[int], Iterable[Tensor]], runtime: Runtime) -> Tensor:
    """Return the model's outputs, in evaluation mode, for all `parts(size)` of its inputs, float32 [N, ...].

    When memory runs out, fewer images pass at once. Raises MemoryError if a single image does not fit.
    """
    model.eval()

    def attempt(size: int) -> Tensor:
        return torch.cat([_predict(model, part, size, runtime) for part in parts(size)])

    size = CPU_BATCH if runtime.device.type == "cpu" else EVALUATION_BATCH
    return halving(attempt, size, runtime.device)[0]


def _predict(model: nn.Module, inputs: Tensor, size: int, runtime: Runtime) -> Tensor:
    """The model's outputs for at most `size` inputs."""
    if not runtime.compiled or len(inputs) == size:
        return predict(model, inputs, runtime)
    # Every batch size would be compiled anew, so the last batch is padded.
    filled = torch.cat([inputs, inputs.new_zeros(size - len(inputs), *inputs.shape[1:])])
    return predict(model, filled, runtime)[: len(inputs)]
