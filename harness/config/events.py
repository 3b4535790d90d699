"""Results and events of trials: frozen records, standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Objective = Literal["accuracy", "balanced_accuracy", "macro_f1", "loss"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Counts over one pass of a split. Accuracy is always correct / total, never an average of batches.

    With another objective, `contributions` are what the value is the mean of.
    """

    loss: float
    correct: int
    total: int
    hits: str | None = field(default=None, compare=False)  # correct images as packed bits, if stored
    objective: Objective = "accuracy"
    score: float | None = None  # the objective's value, higher is better; None for accuracy
    contributions: str | None = field(default=None, compare=False)  # see `harness.training.objective`; packed float32
    # After the last epoch: what calibrates the probabilities of these images, `harness.training.objective.temperature`.
    temperature: float | None = field(default=None, compare=False)
    missed: str | None = field(default=None, compare=False)  # and the predicted class of each missed one; packed uint16

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def value(self) -> float:
        """The objective's value, from 0 to 1, higher is better."""
        return self.accuracy if self.score is None else self.score


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One finished epoch. `epoch` counts from 1; `val` is None when the fit used the validation images too."""

    epoch: int
    lr: float  # the head's learning rate at the last step of the epoch
    train: Metrics
    val: Metrics | None
    seconds: float  # training and validation together
    grad_norm: float | None = None  # the largest of the epoch's steps, before clipping; None before the first
    diverged_step: int | None = None  # the first step, from 1, with a non-finite loss or gradient
    # Maximum images per forward pass; less than the batch size after an out-of-memory error.
    micro_batch: int | None = None

    def is_finite(self) -> bool:
        """Return whether the losses are finite."""
        losses = [self.train.loss] + ([] if self.val is None else [self.val.loss])
        return self.diverged_step is None and all(math.isfinite(loss) for loss in losses)

    def metrics(self) -> dict[str, float]:
        """Return the metrics that MLflow and the report show."""
        images = self.train.total + (self.val.total if self.val else 0)  # as `seconds` has both
        flat = {
            "train_loss": self.train.loss,
            "train_accuracy": self.train.accuracy,
            "lr": self.lr,
            "epoch_seconds": self.seconds,
            "images_per_second": images / self.seconds if self.seconds else 0.0,
        }
        if self.grad_norm is not None:
            flat["grad_norm"] = self.grad_norm
        if self.val is not None:
            flat |= {"val_loss": self.val.loss, "val_accuracy": self.val.accuracy}
            if self.val.score is not None:
                flat[f"val_{'likelihood' if self.val.objective == 'loss' else self.val.objective}"] = self.val.score
        return flat

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def without_hits(self) -> EpochResult:
        """Return a copy without numbers per image."""
        if self.val is None:
            return self
        return replace(self, val=replace(self.val, hits=None, contributions=None, missed=None))

    @staticmethod
    def from_dict(record: dict[str, Any]) -> EpochResult:
        val = None if record["val"] is None else Metrics(**record["val"])
        return EpochResult(**record | {"train": Metrics(**record["train"]), "val": val})


@dataclass(frozen=True, kw_only=True)
class Completed:
    """The trial finished all epochs; `value` is the objective on the validation images after the last one."""

    value: float
    state = "complete"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The trial was stopped after `epoch`: by the pruner, or for a `reason`."""

    epoch: int
    reason: str | None = None
    state = "pruned"


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """A loss or gradient became non-finite, first at `step` of `epoch` (both from 1)."""

    epoch: int
    step: int | None = None  # None when only the validation loss was not finite
    lr: float | None = None  # the head's learning rate at that step
    grad_norm: float | None = None  # the largest of the epoch's earlier steps; None at the first

    @property
    def reason(self) -> str:
        where = f"in epoch {self.epoch}" if self.step is None else f"at step {self.step} of epoch {self.epoch}"
        lr = "" if self.lr is None else f", learning rate {self.lr:.3g}"
        norm = "" if self.grad_norm is None else f", gradient norm up to {self.grad_norm:.3g} before"
        return f"loss or gradient not finite {where}{lr}{norm}"

    state = "diverged"


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An exception ended the trial; `reason` is its type and first line, `traceback` all of it."""

    reason: str
    traceback: str
    state = "failed"


TrialOutcome = Completed | Pruned | Diverged | Failed


# Events of a study. All can be pickled; of `TrialStarted`, the copy that `sendable` returns.

Kind = Literal["trial", "final", "base", "rerank", "ablation"]


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial, or a training after the search, starts, or resumes after its finished epochs."""

    key: str | None  # of its MLflow run (`harness.tracking.expected`); None: not logged
    kind: Kind
    name: str  # "trial 3", "final seed 0"
    number: int  # of the trial, or of the seed after the search
    trial: int  # with this configuration
    params: dict[str, Any]
    epochs: int
    resumed: bool
    groups: str | None  # table of a trial's parameter groups and learning rates
    progress: Any  # a live `harness.training.loop.Progress`, or `Reached`

    def sendable(self) -> TrialStarted:
        """Return a copy for another process, with a snapshot of the progress."""
        return replace(self, progress=Reached.of(self.progress))


@dataclass
class Reached:
    """Last known progress of a training in another process, where it has a `Progress`."""

    epoch: int  # current, from 1
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
    """An epoch of a trial, or of a training after the search, ended."""

    key: str | None
    name: str
    number: int
    result: EpochResult


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial ended, and its outcome is in the storage."""

    key: str
    number: int
    params: dict[str, Any]
    outcome: TrialOutcome


@dataclass(frozen=True, kw_only=True)
class RetrainingEnded:
    """A training after the search ended; its result is stored."""

    key: str
    kind: Kind
    number: int
    trial: int
    params: dict[str, Any]
    epochs: tuple[EpochResult, ...]
    metrics: dict[str, float]  # on the test set, if it was opened


@dataclass(frozen=True, kw_only=True)
class TrialLost:
    """Another process took over the trial, as this one seemed dead."""

    number: int


@dataclass(frozen=True, kw_only=True)
class SearchStopped:
    """The search ended before it had all trials (`harness.search.limits`)."""

    trials: int  # that it has, running ones included
    reason: str


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Another process runs the steps after the search; this one waits."""

    by: str  # machine and process


Event = TrialStarted | EpochEnded | TrialEnded | TrialLost | RetrainingEnded | SearchStopped | Elsewhere
