"""Pruners: Optuna's by name, and successive halving.

They are data in a study file and built anew, as samplers are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from harness.base.errors import InputError
from harness.config.study import Study
from harness.search.samplers import check_options, make


@dataclass(frozen=True)
class Pruner:
    """An Optuna pruner: the name of its class and its arguments, e.g. Pruner("MedianPruner", n_warmup_steps=5).

    A pruner that wraps another takes it as an argument: Pruner("PatientPruner", wrapped_pruner=asha(), patience=2).
    """

    name: str
    options: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, **options: Any) -> None:
        inner = {option for option, value in options.items() if isinstance(value, Pruner)}
        check_options(name, {k: v for k, v in options.items() if k not in inner}, ' or a Pruner("NAME")')
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        self.build(epochs=1, warmup_epochs=0)

    def build(self, epochs: int, warmup_epochs: float) -> optuna.pruners.BasePruner:
        """Build the pruner for trainings of `epochs` epochs; converts a share of a training to epochs."""
        options: dict[str, Any] = {
            name: value.build(epochs, warmup_epochs) if isinstance(value, Pruner) else value
            for name, value in self.options
        }
        if self.name == "Asha" and "first" in options:
            options["min_epochs"] = first_rung(options.pop("first"), epochs, warmup_epochs)
        return make(optuna.pruners, Asha, self.name, options)

    def of(self, study: Study) -> optuna.pruners.BasePruner:
        """Build the pruner for a study."""
        return self.build(study.train.epochs, study.train.optim.warmup_epochs)


def first_rung(share: float, epochs: int, warmup_epochs: float) -> int:
    """Return the epoch of the first rung at a share of the training: at least 2, and after the warm-up."""
    if not isinstance(share, float) or not 0 < share < 1:
        raise InputError(f"asha needs first between 0 and 1, a share of the epochs, not {share!r}.")
    return max(round(share * epochs), 2, math.floor(warmup_epochs) + 1)


class Asha(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al., 2020, "A System for Massively Parallel Hyperparameter Tuning").

    Rungs are at epochs min_epochs * reduction**k. A trial continues beyond a rung if its value there is among the
    best 1/reduction of all trials that have reached the rung. The decisions are those of Optuna's
    SuccessiveHalvingPruner, but computed from the reported values alone: no state is written into the storage, so a
    trial that was killed at a rung gets the same decision again.
    """

    def __init__(self, min_epochs: int = 5, reduction: int = 2) -> None:
        whole = isinstance(min_epochs, int) and isinstance(reduction, int)
        if not whole or min_epochs < 1 or reduction < 2:
            given = f"{min_epochs!r} and {reduction!r}"
            raise InputError(f"asha needs whole numbers, min_epochs >= 1 and reduction >= 2, not {given}.")
        self.min_epochs = min_epochs
        self.reduction = reduction

    def rung(self, epoch: int) -> bool:
        while epoch > self.min_epochs and epoch % self.reduction == 0:
            epoch //= self.reduction
        return epoch == self.min_epochs

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        epoch = trial.last_step
        if epoch is None or not self.rung(epoch):
            return False
        value = trial.intermediate_values[epoch]
        if math.isnan(value):
            return True
        reached = [
            other.intermediate_values[epoch]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and epoch in other.intermediate_values
        ]
        # A diverged trial reached the rung too; NaN must not enter the ranking.
        ranked = sorted([value, *(v for v in reached if not math.isnan(v))])
        promotable = max(len(ranked) // self.reduction, 1)
        return value < ranked[-promotable]


def asha(*, first: float | None = None, min_epochs: int | None = None, reduction: int = 2) -> Pruner:
    """Asynchronous successive halving, with its first rung at a share of the epochs or at an epoch (by default 5).

    A share gives no rung before epoch 2, nor within the warm-up.
    """
    if first is None:
        return Pruner("Asha", min_epochs=5 if min_epochs is None else min_epochs, reduction=reduction)
    if min_epochs is not None:
        raise InputError("asha takes first, a share of the epochs, or min_epochs, not both.")
    return Pruner("Asha", first=first, reduction=reduction)


def no_pruning() -> Pruner:
    return Pruner("NopPruner")
