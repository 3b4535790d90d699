"""The final run: the best configuration retrained on several seeds, then the test set opened, once.

All seeds are trained before the first test image is looked at, and which of them is saved as the model is decided
beforehand (seed 0), so nothing is chosen by the test set.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from harness.config import Study, TrainConfig
from harness.data.augment import MEAN, STD
from harness.data.tensors import load_test
from harness.engine import Runtime
from harness.experiment import assemble, with_validation_images
from harness.results import EpochEnded, Event, Metrics, TrialStarted
from harness.seeds import derive_seed
from harness.space import label, leaves
from harness.storage import Store, TrialRecord, has_model
from harness.tracking import RunLog, Tracker, final_key
from harness.trainer import Training, evaluate, fit

CONFIDENCE = 0.95


def final_run(study: Study, store: Store, tracker: Tracker, runtime: Runtime, folder: Path) -> Iterator[Event]:
    """Retrain the best configuration, open the test set, save the model in `folder`, record the result.

    A seed that was trained before an interruption is not trained again. When the result is there and only the model is
    lost, its seed is trained once more, and the test set stays closed. Does nothing when no trial is complete.
    """
    best = store.best()
    if best is None or (store.has_final() and has_model(folder)):
        return
    config = study.config(best.params)
    folder.mkdir(parents=True, exist_ok=True)
    if store.has_final():
        yield from _train_seed(study, config, best, 0, tracker, runtime, folder)
        model = _assemble(study, config, 0, runtime)
        _load(model, _weights(folder, best, 0))
        save_model(folder, model, best, store.attribute("final"))
        _run_of(tracker, config, best, 0).end("complete")
        _weights(folder, best, 0).unlink()
        return
    seeds = range(study.final.seeds)
    for number in seeds:
        yield from _train_seed(study, config, best, number, tracker, runtime, folder)
    # The only place where the test split is read. Every seed is trained; nothing is decided after this line.
    test = load_test(config.data)
    per_seed: list[dict[str, Any]] = []
    saved = None
    for number in seeds:
        training = _assemble(study, config, number, runtime)
        _load(training, _weights(folder, best, number))
        metrics = evaluate(training.model, test, runtime)
        per_seed.append({"seed": number, **_counts(metrics)})
        log = _run_of(tracker, config, best, number)
        log.metrics({"test_accuracy": metrics.accuracy, "test_loss": metrics.loss}, step=config.epochs)
        log.end("complete")
        saved = saved or training
    assert saved is not None
    openings = (store.attribute("final") or {}).get("test_openings", 0) + 1
    final = summary(per_seed) | {"trial": best.number, "fit_on": study.final.fit_on, "test_openings": openings}
    save_model(folder, saved, best, final)
    store.set_attribute("final", final)
    for trained in folder.glob("trial-*-seed-*.safetensors*"):
        trained.unlink()


def _train_seed(
    study: Study, config: TrainConfig, best: TrialRecord, number: int, tracker: Tracker, runtime: Runtime, folder: Path
) -> Iterator[Event]:
    if _weights(folder, best, number).exists():
        return
    name = f"final seed {number}"
    training = _assemble(study, config, number, runtime)
    log = _run_of(tracker, config, best, number)
    yield TrialStarted(
        name=name,
        number=number,
        params=best.params,
        epochs=config.epochs,
        resumed=False,
        progress=training.progress,
    )
    with closing(fit(training)) as results:
        for result in results:
            log.epoch(result)
            yield EpochEnded(name=name, number=number, result=result)
    _save(training, _weights(folder, best, number))


def _assemble(study: Study, config: TrainConfig, number: int, runtime: Runtime) -> Training:
    training = assemble(config, runtime, derive_seed(study.seed, "final", number))
    return training if study.final.fit_on == "train" else with_validation_images(training)


def _run_of(tracker: Tracker, config: TrainConfig, best: TrialRecord, number: int) -> RunLog:
    tags = {"harness.kind": "final", "harness.final_seed": str(number), "harness.best_trial": str(best.number)}
    return tracker.run(final_key(best.number, number), config, tags)


def _counts(metrics: Metrics) -> dict[str, Any]:
    return {"correct": metrics.correct, "total": metrics.total, "accuracy": metrics.accuracy}


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
        "test": {"seed": 0, **final["per_seed"][0]},
    }
    _save(training, folder / "model.safetensors")
    _replace(folder / "model.json", json.dumps(description, indent=2, ensure_ascii=False).encode())


def _weights(folder: Path, best: TrialRecord, number: int) -> Path:
    return folder / f"trial-{best.number}-seed-{number}.safetensors"


def _save(training: Training, path: Path) -> None:
    """Write the weights under another name and rename: the file is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in training.model.state_dict().items()}
    with partial.open("wb") as file:
        file.write(save(state))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _load(training: Training, path: Path) -> None:
    training.model.load_state_dict(load_file(path, device=str(training.runtime.device)))


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
