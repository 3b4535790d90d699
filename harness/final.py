"""The final run: the best configuration retrained on several seeds, then the test set opened, once.

All seeds are trained before the first test image is looked at, and which of them is saved as the model is decided
beforehand (seed 0), so nothing is chosen by the test set.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.checkpoint import SUFFIX, Checkpoint, fingerprint, identity_of, remove, write_tensors
from harness.config import Study
from harness.data.augment import MEAN, STD
from harness.data.tensors import load_test
from harness.engine import Runtime
from harness.environment import environment
from harness.errors import Halt
from harness.experiment import assemble, evaluation_of, with_validation_images
from harness.files import replace_file
from harness.results import EpochEnded, Event, Metrics, TrialStarted
from harness.seeds import derive_seed
from harness.space import label, leaves
from harness.storage import Store, TrialRecord, has_model
from harness.tracking import RunLog, Tracker, final_key, final_tags
from harness.trainer import Training, evaluate, fit

CONFIDENCE = 0.95


def final_run(
    study: Study, store: Store, tracker: Tracker, runtime: Runtime, folder: Path, checkpoints: Path
) -> Iterator[Event]:
    """Retrain the best configuration, open the test set, save the model in `folder`, record the result.

    A seed that was trained before an interruption is not trained again, for its last checkpoint stays until the result
    is recorded. When the result is there and only the model is lost, its seed is trained once more, and the test set
    stays closed. Does nothing when no trial is complete.
    """
    best = store.best()
    if best is None or (store.has_final() and has_model(folder)):
        return
    if store.has_final():
        print(
            f"The model in {folder} is missing: its seed is trained again, the test set stays closed.", file=sys.stderr
        )
    seeds = [FinalSeed(study, store, tracker, runtime, best, number, checkpoints) for number in _seeds(study, store)]
    for seed in seeds:
        yield from seed.train()
    if store.has_final():
        save_model(folder, seeds[0].trained(), best, store.attribute("final"))
    else:
        _open_test_set(study, store, seeds, best, folder)
    for seed in seeds:
        seed.end()


def _seeds(study: Study, store: Store) -> range:
    """The seeds to train: all, or the saved model's alone when the result is there."""
    return range(1) if store.has_final() else range(study.final.seeds)


def _open_test_set(study: Study, store: Store, seeds: list[FinalSeed], best: TrialRecord, folder: Path) -> None:
    # The only place where the test split is read. Every seed is trained; nothing is decided after this line.
    test = load_test(study.config(best.params).data)
    per_seed: list[dict[str, Any]] = []
    saved = None
    for seed in seeds:
        training = seed.trained()
        metrics = evaluate(training.learner, evaluation_of(training, test), training.runtime)
        per_seed.append({"seed": seed.number, **_counts(metrics), **seed.record(training)})
        saved = saved or training
    assert saved is not None
    openings = (store.attribute("final") or {}).get("test_openings", 0) + 1
    final = summary(per_seed) | {"trial": best.number, "fit_on": study.final.fit_on, "test_openings": openings}
    save_model(folder, saved, best, final)
    store.set_attribute("final", final)
    for seed, result in zip(seeds, per_seed, strict=True):  # nobody sees a test result before it is recorded
        seed.log.metrics({"test_accuracy": result["accuracy"], "test_loss": result["loss"]}, seed.epochs)


class FinalSeed:
    """The best configuration trained from one of the final run's seeds."""

    def __init__(
        self,
        study: Study,
        store: Store,
        tracker: Tracker,
        runtime: Runtime,
        best: TrialRecord,
        number: int,
        checkpoints: Path,
    ) -> None:
        self.number = number
        self._study, self._runtime, self._best = study, runtime, best
        self._config, self._key = study.config(best.params), final_key(best.number, number)
        self._path = checkpoints / f"{self._key}{SUFFIX}"
        self._uid = store.attribute("uid")
        self._tracker = tracker

    @property
    def epochs(self) -> int:
        return self._config.epochs

    @cached_property
    def log(self) -> RunLog:
        return self._tracker.run(self._key, self._config, final_tags(self._best.number, self.number))

    def train(self) -> Iterator[Event]:
        """Train to the end, from the checkpoint if there is one; leaves the trained weights in it."""
        checkpoint = self._checkpoint()
        training = checkpoint.training
        resumed = checkpoint.restore()
        for result in training.progress.epochs:
            self.log.epoch(result)
        if training.progress.epoch > self._config.epochs:
            return
        name = f"final seed {self.number}"
        yield TrialStarted(
            name=name,
            number=self.number,
            params=self._best.params,
            epochs=self._config.epochs,
            resumed=resumed,
            progress=training.progress,
        )
        with checkpoint.saved_when_stopped(), closing(fit(training, checkpoint.after_batch)) as results:
            for result in results:
                self.log.epoch(result)
                yield EpochEnded(name=name, number=self.number, result=result)
            checkpoint.save()

    def trained(self) -> Training:
        """The trained model, from its checkpoint. Raises Halt when that was damaged in the meantime."""
        checkpoint = self._checkpoint()
        if not checkpoint.restore():
            raise Halt(f"The trained weights {self._path} are gone or damaged; the same command trains them again.")
        return checkpoint.training

    def record(self, training: Training) -> dict[str, Any]:
        """What the storage keeps of the training: the weights' sha256 and every epoch."""
        return {
            "weights": fingerprint(training.model.state_dict()),
            "epochs": [result.to_dict() for result in training.progress.epochs],
        }

    def end(self) -> None:
        """Close the run and drop the checkpoint; to be called when the result is recorded."""
        self.log.end("complete")
        remove(self._path)

    def _checkpoint(self) -> Checkpoint:
        seed = derive_seed(self._study.seed, "final", self.number)
        training = assemble(self._config, self._runtime, seed)
        if self._study.final.fit_on == "train+val":
            training = with_validation_images(training)
        identity = identity_of(self._uid, self._key, seed, self._config) | {"fit_on": self._study.final.fit_on}
        return Checkpoint(self._path, identity, training, environment(self._runtime.device.type))


def _counts(metrics: Metrics) -> dict[str, Any]:
    return {"correct": metrics.correct, "total": metrics.total, "accuracy": metrics.accuracy, "loss": metrics.loss}


def summary(per_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, spread and interval of the seeds' test results.

    `correct` and `total` add up the seeds, so accuracy is correct / total. The interval (Wilson, 1927) counts each
    test image once: several seeds on the same images are not more images.
    """
    from scipy.stats import binomtest

    correct, total = sum(each["correct"] for each in per_seed), sum(each["total"] for each in per_seed)
    images = per_seed[0]["total"]
    interval = binomtest(round(correct / len(per_seed)), images).proportion_ci(CONFIDENCE, method="wilson")
    accuracies = [each["accuracy"] for each in per_seed]
    return {
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "per_seed": per_seed,
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "interval": [float(interval.low), float(interval.high)],
    }


def save_model(folder: Path, training: Training, best: TrialRecord, final: Mapping[str, Any]) -> None:
    """Write model.safetensors and model.json: weights, classes, preprocessing, configuration and test result."""
    size = training.config.data.image_size
    description = {
        "classes": training.classes,
        "preprocessing": {
            "resize_short_side": size,
            "interpolation": "bicubic, antialiased",
            "centre_crop": size,
            "mean": MEAN,
            "std": STD,
        },
        "configuration": {path: label(value) for path, value in leaves(training.config, identity_only=True)},
        "trial": best.number,
        "validation_accuracy": best.value,
        "test": {key: final["per_seed"][0][key] for key in ("seed", "correct", "total", "accuracy")},
    }
    write_tensors(folder / "model.safetensors", training.model.state_dict(), {"trial": best.number, "seed": 0})
    replace_file(folder / "model.json", json.dumps(description, indent=2, ensure_ascii=False).encode())
