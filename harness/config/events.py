"""What training and trials give back: frozen records, standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Counts over one pass of a split. Accuracy is always correct / total, never an average of batches."""

    loss: float
    correct: int
    total: int
    hits: str | None = field(default=None, compare=False)  # which images were right, packed, where kept

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One finished epoch. `epoch` counts from 1; `val` is None when the fit used the validation images too."""

    epoch: int
    lr: float  # the head's learning rate at the last step of the epoch
    train: Metrics
    val: Metrics | None
    seconds: float  # training and validation together
    grad_norm: float | None = None  # the largest of the epoch's steps, before clipping; None before the first
    diverged_step: int | None = None  # the first step whose loss or gradient was no finite number, from 1
    # Images in one pass through the model at most; less than the batch when memory ran out.
    micro_batch: int | None = None

    def is_finite(self) -> bool:
        """Whether training and validation gave numbers."""
        losses = [self.train.loss] + ([] if self.val is None else [self.val.loss])
        return self.diverged_step is None and all(math.isfinite(loss) for loss in losses)

    def metrics(self) -> dict[str, float]:
        """The flat names that MLflow and the report show."""
        flat = {
            "train_loss": self.train.loss,
            "train_accuracy": self.train.accuracy,
            "lr": self.lr,
            "epoch_seconds": self.seconds,
            "train_images_per_second": self.train.total / self.seconds if self.seconds else 0.0,
        }
        if self.grad_norm is not None:
            flat["grad_norm"] = self.grad_norm
        if self.val is not None:
            flat |= {"val_loss": self.val.loss, "val_accuracy": self.val.accuracy}
        return flat

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def without_hits(self) -> EpochResult:
        """The same without which images were right."""
        return self if self.val is None else replace(self, val=replace(self.val, hits=None))

    @staticmethod
    def from_dict(record: dict[str, Any]) -> EpochResult:
        val = None if record["val"] is None else Metrics(**record["val"])
        return EpochResult(**record | {"train": Metrics(**record["train"]), "val": val})


@dataclass(frozen=True, kw_only=True)
class Completed:
    """The trial ran all its epochs; `value` is the validation accuracy of the last one."""

    value: float
    state = "complete"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The pruner stopped the trial after `epoch`."""

    epoch: int
    state = "pruned"


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """A loss or a gradient was no longer a finite number, first at `step` of `epoch` (both from 1)."""

    epoch: int
    step: int | None = None  # None when only the validation loss was not finite
    lr: float | None = None  # the head's learning rate at that step
    grad_norm: float | None = None  # the largest of the epoch's steps before it; None when it was the first

    @property
    def reason(self) -> str:
        where = f"in epoch {self.epoch}" if self.step is None else f"at step {self.step} of epoch {self.epoch}"
        lr = "" if self.lr is None else f", learning rate {self.lr:.3g}"
        norm = "" if self.grad_norm is None else f", gradient norm up to {self.grad_norm:.3g} before"
        return f"loss or gradient not finite {where}{lr}{norm}"

    state = "diverged"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An exception ended the trial; `reason` is its last line, `traceback` the whole of it."""

    reason: str
    traceback: str
    state = "failed"


TrialOutcome = Completed | Pruned | Diverged | Failed


# What a study yields. Each event can be pickled, once `TrialStarted.sendable` has been asked for.

Kind = Literal["trial", "final", "base", "rerank"]


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial, or a training after the search, begins or goes on with the epochs that it had already."""

    key: str | None  # of its run in MLflow (`harness.tracking.expected`); None: it is not logged
    kind: Kind
    name: str  # "trial 3", "final seed 0"
    number: int  # of the trial; after the search of the seed
    trial: int  # whose configuration it is
    params: dict[str, Any]
    epochs: int
    resumed: bool
    groups: str | None  # the learning rate of each group of a trial's parameters, as a table
    progress: Any  # `harness.training.loop.Progress`, which counts its steps while it runs, or `Reached`

    def sendable(self) -> TrialStarted:
        """The same for another process: of its progress, how far it is now."""
        return replace(self, progress=Reached.of(self.progress))


@dataclass
class Reached:
    """How far a training in another process is, as this one heard last; where it runs it has a `Progress`."""

    epoch: int  # under way, from 1
    step: int
    steps: int
    epochs: list[EpochResult]

    @staticmethod
    def of(progress: Any) -> Reached:
        return Reached(progress.epoch, progress.step, progress.steps, list(progress.epochs))

    def ended(self, result: EpochResult) -> None:
        self.epoch, self.step = result.epoch + 1, 0
        self.epochs.append(result)


@dataclass(frozen=True, kw_only=True)
class EpochEnded:
    """An epoch of the running trial, or of the final run's seed, is over."""

    key: str | None
    name: str
    number: int
    result: EpochResult


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial has its outcome, and the storage knows it."""

    key: str
    number: int
    params: dict[str, Any]
    outcome: TrialOutcome


@dataclass(frozen=True, kw_only=True)
class RetrainingEnded:
    """The result of a training after the search is in the storage."""

    key: str
    kind: Kind
    number: int
    trial: int
    params: dict[str, Any]
    epochs: tuple[EpochResult, ...]
    metrics: dict[str, float]  # of the test set, where it was opened


@dataclass(frozen=True, kw_only=True)
class TrialLost:
    """Another process has taken up the trial, for this one was thought dead."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What comes after the search is done by another process, for whose end this one waits."""

    by: str  # machine and process


Event = TrialStarted | EpochEnded | TrialEnded | TrialLost | RetrainingEnded | Elsewhere
