"""Retrain a trial's configuration from another seed, for the test, the comparison or the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.base.environment import environment
from harness.base.errors import Halt, first_line
from harness.base.keys import RETRAINING
from harness.base.seeds import derive_seed
from harness.config.events import EpochEnded, EpochResult, Event, Kind, RetrainingEnded, TrialStarted
from harness.config.jobs import Train, Workers
from harness.config.study import Study
from harness.data.splits import content_of
from harness.store.opening import check_definition
from harness.store.store import Store, TrialRecord
from harness.training.assemble import assemble, with_validation_images
from harness.training.checkpoint import SUFFIX, Checkpoint, fingerprint, identity_of, remove
from harness.training.loop import Training, fit
from harness.training.step import Runtime, is_device_failure


@dataclass(frozen=True, kw_only=True)
class Context:
    """Context of a study's retrainings."""

    study: Study
    store: Store
    runtime: Runtime
    checkpoints: Path
    workers: Workers | None = None  # train for this process; None: it trains itself

    def check_content(self) -> None:
        """Raise InputError if images or weights are no longer those of the study's start, where they were recorded."""
        if any(path.startswith("content of ") for path in self.store.facts().definition or {}):
            check_definition(self.study, self.store, content_of(self.study))

    def ahead(self, retrainings: Sequence[Retraining]) -> Iterator[Event]:
        """Have the workers, if any, train these in parallel; `train` then has nothing left to do."""
        if self.workers is not None:
            yield from self.workers.train([Train(each.kind, each.trial.number, each.number) for each in retrainings])


class Retraining:
    """One training; its last checkpoint, with the trained weights, stays until `end`.

    The base configuration is trained from the final run's seeds, so that equal configurations give equal weights.
    """

    def __init__(self, context: Context, kind: Kind, trial: TrialRecord, number: int, logged: bool = True) -> None:
        """`logged`: whether to log the events to MLflow."""
        self.kind, self.trial, self.number, self.logged = kind, trial, number, logged
        self.config = context.study.config(trial.params)
        self.key = RETRAINING[kind](trial.number, number)
        # Set by `trained`: the training's epochs, and the environments it ran in.
        self.epochs: tuple[EpochResult, ...] = ()
        self.diverged: EpochResult | None = None  # set by `train`: the epoch in which it diverged
        self.environments: Sequence[Mapping[str, str]] = ()
        self._context = context
        self._path = context.checkpoints / f"{self.key}{SUFFIX}"
        self._seed = derive_seed(context.study.seed, "rerank" if kind == "rerank" else "final", number)
        # What compares on the validation images must not train on them.
        self._fit_on = "train" if kind in ("rerank", "ablation") else context.study.final.fit_on

    def train(self) -> Iterator[Event]:
        """Train to the end, from the checkpoint if there is one; leaves the trained weights in it.

        A training that diverges ends there, see `diverged`.
        """
        checkpoint = self._checkpoint()
        training = checkpoint.training
        resumed = checkpoint.restore()
        self.diverged = next((each for each in training.progress.epochs if not each.is_finite()), None)
        if self.diverged or training.progress.epoch > self.config.epochs:
            return
        of = f" of trial {self.trial.number}" if self.kind == "rerank" else ""
        name = f"{self.kind} seed {self.number}{of}"
        key = self.key if self.logged else None
        yield TrialStarted(
            key=key,
            kind=self.kind,
            name=name,
            number=self.number,
            trial=self.trial.number,
            params=self.trial.params,
            epochs=self.config.epochs,
            resumed=resumed,
            groups=None,
            progress=training.progress,
        )
        try:
            with checkpoint.saved_when_stopped(), closing(fit(training, checkpoint.after_batch)) as results:
                for result in results:
                    if not result.is_finite():
                        self.diverged = result
                        break
                    yield EpochEnded(key=key, name=name, number=self.number, result=result)
                checkpoint.save()
        except RuntimeError as error:
            if is_device_failure(error):
                raise Halt(f"The device failed ({first_line(error)}); run the same command again.") from error
            raise

    def trained(self) -> Training:
        """Restore the trained model from its checkpoint. Raises Halt if that is missing, damaged or unfinished."""
        checkpoint = self._checkpoint()
        if not checkpoint.restore():
            raise Halt(f"The trained weights {self._path} are missing or damaged; run the same command again.")
        progress = checkpoint.training.progress
        # A machine that lost the training to another one may have written its older state over the other's.
        if progress.epoch <= self.config.epochs and all(each.is_finite() for each in progress.epochs):
            raise Halt(f"The training {self._path} has not ended; run the same command again.")
        self.environments = checkpoint.environments
        self.epochs = tuple(each.without_hits() for each in checkpoint.training.progress.epochs if each.is_finite())
        return checkpoint.training

    def divergence(self) -> str:
        """Describe, as a clause, where it diverged."""
        assert self.diverged is not None
        step = f" at step {self.diverged.diverged_step}" if self.diverged.diverged_step else ""
        return (
            f"{self.kind} seed {self.number} of trial {self.trial.number} diverged in epoch {self.diverged.epoch}{step}"
        )

    def record(self, training: Training) -> dict[str, Any]:
        """Return the training's record for the storage: the weights' sha256, environments, and every epoch."""
        return {
            "seed": self.number,
            "weights": fingerprint(training.model.state_dict()),
            "environments": [dict(each) for each in self.environments],
            "epochs": [result.to_dict() for result in self.epochs],
        }

    def end(self, metrics: Mapping[str, float] = {}) -> Iterator[Event]:
        """Yield the end event and remove the checkpoint; call it once the result is recorded."""
        if self.logged:
            yield RetrainingEnded(
                key=self.key,
                kind=self.kind,
                number=self.number,
                trial=self.trial.number,
                params=self.trial.params,
                epochs=self.epochs,
                metrics=dict(metrics),
            )
        remove(self._path)

    def _checkpoint(self) -> Checkpoint:
        context = self._context
        training = assemble(self.config, context.runtime, self._seed, context.study.objective)
        if self._fit_on == "train+val":
            training = with_validation_images(training)
        identity = identity_of(context.store.uid, self.key, self._seed, self.config) | {"fit_on": self._fit_on}
        here = environment(context.runtime.device)
        return Checkpoint(self._path, identity, training, here, check=context.store.check_lead)


@contextmanager
def threads_of(environments: Sequence[Mapping[str, str]]) -> Iterator[None]:
    """Use as many torch threads as a training did, since on a CPU their number decides the last bits.

    The number does not change if it is unknown or varied.
    """
    before = torch.get_num_threads()
    known = {int(each.get("threads", before)) for each in environments}
    torch.set_num_threads(known.pop() if len(known) == 1 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
