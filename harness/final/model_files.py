"""The final model's files: write them, and verify that they have not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.base.errors import InputError
from harness.base.files import Damaged, check_tensors, file_sha256, replace_file, sqlite_file
from harness.config.events import EpochResult
from harness.config.space import label, leaves
from harness.final.predictions import temperature_of

if TYPE_CHECKING:
    from harness.config.final_result import FinalResult
    from harness.config.study import Study
    from harness.config.train import TrainConfig
    from harness.data.splits import ImageSet
    from harness.store.records import TrialRecord
    from harness.store.store import Store
    from harness.training.loop import Training

WEIGHTS, DESCRIPTION, PROGRAM = "model.safetensors", "model.json", "model.pt2"
CHECK_FILE = "check.safetensors"  # test images as in the cache: `images` uint8 [N, S, S, 3]
AGAIN = "run the study again: it restores lost files, and the test set stays closed"
CHECK_IMAGES = 5  # unlike an exported program's example, to check that the batch size is free


def keep_check_images(folder: Path, test: ImageSet) -> None:
    """Save a few test images, spread over the classes, beside the weights: exported programs are checked on
    them later, without reading the test set again."""
    from harness.training.checkpoint import write_tensors

    step = max(1, len(test) // CHECK_IMAGES)
    images = test.images[::step][:CHECK_IMAGES]
    write_tensors(folder / CHECK_FILE, {"images": images}, {"split": "test"})


def save_model(store: Store, folder: Path, training: Training, chosen: TrialRecord, final: FinalResult) -> None:
    """Write model.safetensors and model.json."""
    from harness.training.checkpoint import fingerprint, write_tensors

    weights = training.model.state_dict()
    write_tensors(folder / WEIGHTS, weights, {"trial": chosen.number, "seed": 0})
    write_description(store, folder, training.config, chosen, final, fingerprint(weights))


def write_description(
    store: Store, folder: Path, config: TrainConfig, chosen: TrialRecord, final: FinalResult, weights: str
) -> None:
    """Write model.json: classes, preprocessing, configuration and test result, and whether these weights were tested.

    `weights` is the sha256 of those beside it. The files of tested weights are recorded; of others any intact
    file will do.
    """
    tested, preprocessing = final.per_seed[0], config.backbone.preprocessing()
    size = preprocessing.evaluation(config.data.image_size)
    epochs = [EpochResult.from_dict(each) for each in tested.epochs[-1:]]
    description = {
        "study_uid": store.uid,
        "weights": {"sha256": weights, "tested": weights == tested.weights},
        "classes": config.data.classes(),
        "preprocessing": {
            "resize_short_side": size.short_side,
            "interpolation": f"{size.interpolation}, antialiased",
            "centre_crop": size.side,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        },
        "configuration": {path: label(value) for path, value in leaves(config, identity_only=True)},
        "backbone": {"name": label(config.backbone), "pretrained_weights": config.backbone.origin()},
        "temperature": temperature_of(chosen, epochs),  # by which predictions divide the logits
        "fit_on": final.fit_on,
        "trial": chosen.number,
        "objective": store.facts().objective,  # of the next line
        "trial_validation_accuracy": chosen.value,  # not this model's, which may have trained on these images
        "test": {key: getattr(tested, key) for key in ("seed", "correct", "total", "accuracy")},
    }
    replace_file(folder / DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False).encode())
    if weights == tested.weights:
        record_files(store, folder, WEIGHTS, DESCRIPTION)
    elif recorded := store.facts().files:  # a copy of the tested ones is valid, too
        others = {name: value for name, value in recorded.items() if name not in (WEIGHTS, DESCRIPTION)}
        store.set_attribute("files", others)


def has_model(folder: Path) -> bool:
    """Return whether the final run's model is complete; it is written as these two files, in this order."""
    return (folder / WEIGHTS).is_file() and (folder / DESCRIPTION).is_file()


def record_files(store: Store, folder: Path, *names: str) -> None:
    """Store the current sha256 of files of the model's folder; drop that of a missing file.

    Nothing is stored for a study on a server: each machine has its own folder, with weights of its own to the last
    bits.
    """
    if sqlite_file(store.url) is None:
        return
    others = {name: value for name, value in store.facts().files.items() if name not in names}
    here = {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}
    store.set_attribute("files", others | here)


def is_recorded(store: Store, folder: Path, name: str) -> bool:
    """Return whether a file of the model exists and is the one that was recorded."""
    return name in store.facts().files and file_fault(store, folder, name) is None


def wrong_files(store: Store, folder: Path) -> list[tuple[str, str]]:
    """Return the final model's files that are missing or have changed: names, and clauses that say so."""
    found = {name: file_fault(store, folder, name) for name in sorted({WEIGHTS, DESCRIPTION, *store.facts().files})}
    return [(name, fault) for name, fault in found.items() if fault is not None]


def file_fault(store: Store, folder: Path, name: str) -> str | None:
    """Return a clause that names what is wrong with a file of the final model; None if no fault is known."""
    path, recorded = folder / name, store.facts().files.get(name)
    if not path.is_file():
        return f"{path} is missing"
    if recorded is not None:
        return None if file_sha256(path) == recorded else f"{path} is damaged (its checksum is wrong)"
    try:  # a study on a server stores none
        if name == WEIGHTS:
            check_tensors(path)
        elif name == DESCRIPTION:
            read_description(path)
    except Damaged as error:
        return str(error)
    return None


DESCRIBED = {
    "study_uid": str,
    "weights": dict,
    "classes": list,
    "preprocessing": dict,
    "configuration": dict,
    "fit_on": str,
    "trial": int,
    "trial_validation_accuracy": float | int,
    "test": dict,
}


def read_description(path: Path) -> dict[str, Any]:
    """Read the final model's model.json. Raises Damaged if it is not JSON, or lacks a field."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    if not isinstance(description, dict):
        raise Damaged(f"{path} is damaged (it is not a JSON object)")
    lacking = [name for name, kind in DESCRIBED.items() if not isinstance(description.get(name), kind)]
    if not lacking and description["fit_on"] not in ("train", "train+val"):
        lacking = ["fit_on"]
    if lacking:
        raise Damaged(f"{path} is damaged (it lacks the model's {', '.join(lacking)})")
    return description


def is_untested(folder: Path) -> bool:
    """Return whether the model was retrained, with other bits than the tested one.

    It is not logged to MLflow, which has the tested one, or may still get it from another machine.
    """
    return _holds_tested(folder) is False


def _holds_tested(folder: Path) -> bool | None:
    """Return whether the model is the tested one; None if there is no complete one."""
    try:
        return bool(read_description(folder / DESCRIPTION)["weights"].get("tested")) if has_model(folder) else None
    except Damaged:  # reported elsewhere, and restored
        return None


def check_folder(folder: Path, url: str, uid: str | None) -> None:
    """Raise InputError if the model in `folder` is not that of the study at `url`; its `uid` is None until it begins.

    Studies of one name in several databases share a folder.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    owner = description.get("study_uid") if isinstance(description, dict) else None
    if owner not in (None, uid):
        other = "give this study another name" if sqlite_file(url) is None else "give another --storage"
        raise InputError(f"{folder} holds the model of another study than {url}; move that folder away, or {other}.")


def published(store: Store, model: Path) -> list[Path]:
    """Return the folders logged to the study's own MLflow run: its report, and its model if that was tested."""
    report = model.with_suffix(".report")
    wanted = [report, model] if store.has_final() and _holds_tested(model) else [report]
    return [folder for folder in wanted if folder.is_dir()]


def is_registered(study: Study, store: Store, model: Path) -> bool:
    """Return whether the model is registered in MLflow; one that cannot be exported is not."""
    is_there = store.has_final() and _holds_tested(model) is True and (model / PROGRAM).is_file()
    return study.final.publish and is_there and store.facts().is_registered()
