"""Analysis of the final run's predictions: classes, confusions, confident mistakes, calibration.

All seeds are counted together, as in the final accuracy; the mistakes shown are those of seed 0,
which is the saved model.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from harness.base.errors import InputError
from harness.base.packing import pack, unpack
from harness.final.statistics import calibration_error, reliability, wilson

if TYPE_CHECKING:
    import torch

    from harness.config.events import EpochResult
    from harness.store.records import TrialRecord

PAIRS = 12  # worst confusions shown, two pictures each
MISTAKES = 24  # most confident ones shown
SIDE = 96  # maximum pixels of a picture
QUALITY = 80  # of its JPEG: about 4 KB a photograph


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """S seeds on N test images of C classes."""

    labels: NDArray[Any]  # int [N]
    predicted: NDArray[Any]  # int [S, N]
    confidence: NDArray[Any]  # float [S, N], of the predicted class
    classes: tuple[str, ...]  # C names
    images: NDArray[Any] | None  # uint64 [N], `marks` of their contents; None: not recorded

    @property
    def hits(self) -> NDArray[Any]:
        """Whether each prediction is right: bool [S, N]."""
        return self.predicted == self.labels

    @property
    def matrix(self) -> NDArray[Any]:
        """Confusion matrix, true classes in rows, predicted in columns, over all seeds: int [C, C]."""
        counts = numpy.zeros((len(self.classes), len(self.classes)), dtype=int)
        numpy.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    @property
    def totals(self) -> NDArray[Any]:
        """Test images of each class, over all seeds: int [C]."""
        return len(self.predicted) * numpy.bincount(self.labels, minlength=len(self.classes))


def marks(contents: Sequence[str]) -> str:
    """Return the first 64 bits of each sha256, packed: they tell the test images of all studies apart."""
    return pack(numpy.array([int(each[:16], 16) for each in contents], dtype="uint64"))


def temperature_of(trial: TrialRecord, epochs: Sequence[EpochResult]) -> float | None:
    """Return the temperature of a retrained model, fitted on validation images that it was not trained on.

    That is its own after the last of its `epochs`; if it was trained on the validation images, the trial's. None if
    neither is known.
    """
    vals = (each[-1].val for each in (epochs, trial.epochs) if each)
    return next((val.temperature for val in vals if val is not None), None)


def from_record(record: Mapping[str, Any]) -> Predictions:
    """Unpack the storage's attribute "predictions".

    Raises InputError if they are damaged.
    """
    try:
        labels = unpack(record["labels"], "uint16").astype(int)
        predicted = numpy.stack([unpack(each["predicted"], "uint16").astype(int) for each in record["seeds"]])
        confidence = numpy.stack([unpack(each["confidence"], "float32") for each in record["seeds"]])
        images = unpack(record["images"], "uint64") if "images" in record else None
        count = 1 + max(int(labels.max()), int(predicted.max()))
        names = record["classes"]
        fits = predicted.shape == confidence.shape == (len(predicted), len(labels))
        if len(names) < count or not fits or (images is not None and len(images) != len(labels)):
            raise ValueError(f"{len(labels)} labels of {len(names)} classes do not fit")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"The study's 'predictions' are damaged ({error}); restore the storage from a backup."
        ) from error
    return Predictions(labels=labels, predicted=predicted, confidence=confidence, classes=tuple(names), images=images)


def per_class(found: Predictions) -> list[dict[str, Any]]:
    """Return each class's accuracy over all seeds, the worst first; the interval counts an image once."""
    seeds, totals = len(found.predicted), found.totals
    right = numpy.broadcast_to(found.labels, found.predicted.shape)[found.hits]
    hits = numpy.bincount(right, minlength=len(found.classes))
    rows = []
    for number, name in enumerate(found.classes):
        correct, total = int(hits[number]), int(totals[number])
        if total:
            interval = list(wilson(correct / seeds, total // seeds))
            counted = {"class": name, "correct": correct, "total": total, "accuracy": correct / total}
            rows.append(counted | {"interval": interval})
    return sorted(rows, key=lambda row: (row["accuracy"], row["class"]))


def confusions(found: Predictions) -> list[dict[str, Any]]:
    """Return the pairs of classes that are confused most often, over all seeds.

    `image` is the number of the test image that was most confidently taken for the other class; `like` is
    the one of the other class that was most confidently recognised, None if none was.
    """
    totals, numbered = found.totals, found.labels * len(found.classes) + found.predicted  # a number for each pair
    pairs, counts = numpy.unique(numbered[~found.hits], return_counts=True)
    order = numpy.argsort(-counts, kind="stable")[:PAIRS].tolist()
    worst = [(*divmod(int(pairs[place]), len(found.classes)), int(counts[place])) for place in order]
    return [
        {
            "class": found.classes[true],
            "predicted": found.classes[predicted],
            "count": count,
            "of": int(totals[true]),
            "image": _surest(found, true, predicted),
            "like": _surest(found, predicted, predicted),
        }
        for true, predicted, count in worst
    ]


def _surest(found: Predictions, true: int, predicted: int) -> int | None:
    chosen = (found.labels == true) & (found.predicted == predicted)
    confidence = numpy.where(chosen, found.confidence, -1.0).max(axis=0)
    return int(confidence.argmax()) if chosen.any() else None


def mistakes(found: Predictions) -> list[dict[str, Any]]:
    """Return the saved model's most confident mistakes; `image` is the number of the test image."""
    predicted, confidence = found.predicted[0], found.confidence[0]
    wrong = numpy.flatnonzero(predicted != found.labels)
    order = wrong[numpy.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return [
        {
            "image": int(image),
            "class": found.classes[found.labels[image]],
            "predicted": found.classes[predicted[image]],
            "confidence": float(confidence[image]),
        }
        for image in order
    ]


def pictured(record: Mapping[str, Any]) -> list[int]:
    """Return the test images that a report shows; `record` is "predictions"."""
    found = from_record(record)
    pairs = [each[key] for each in confusions(found) for key in ("image", "like")]
    return sorted({image for image in [*pairs, *(each["image"] for each in mistakes(found))] if image is not None})


def thumbnails(images: torch.Tensor, chosen: Sequence[int]) -> dict[str, str]:
    """Return chosen images of uint8 [N, side, side, 3] by number, as base64 JPEGs of at most 96 x 96 pixels.

    The storage keeps them, so that a report can show them without the data set.
    """
    from PIL import Image

    small = {}
    for number in chosen:
        picture = Image.fromarray(images[number].numpy())
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        small[str(number)] = base64.b64encode(file.getvalue()).decode()
    return small


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the analysis for JSON. `ece` is the expected calibration error over all `seeds`, a share.

    `ece_saved` is the saved model's, `ece_calibrated` the same with its `temperature`, if it has one.
    """
    found = from_record(record)
    hits = found.hits
    bins, alone = reliability(found.confidence.ravel(), hits.ravel()), reliability(found.confidence[0], hits[0])
    saved = record["seeds"][0]
    calibrated = {}
    if saved.get("temperature") is not None:
        calibrated["temperature"] = saved["temperature"]
        calibrated["ece_calibrated"] = calibration_error(reliability(unpack(saved["calibrated"], "float32"), hits[0]))
    return calibrated | {
        "per_class": per_class(found),
        "confusions": confusions(found),
        "mistakes": mistakes(found),
        "calibration": [asdict(each) for each in bins],
        "ece": calibration_error(bins),
        "ece_saved": calibration_error(alone),
        "seeds": len(found.predicted),
    }


def calibration_sentence(tested: Mapping[str, Any]) -> str:
    """State the calibration errors, for the report and the model card; `tested` comes from `described`."""
    every = f", {100 * tested['ece']:.2f} points over all {tested['seeds']} seeds" if tested["seeds"] > 1 else ""
    raw = (
        "Expected calibration error on the test images (Guo et al., 2017): "
        f"{100 * tested['ece_saved']:.2f} points for the saved model, seed 0{every}."
    )
    if "ece_calibrated" not in tested:
        return raw
    return (
        f"{raw} Calibrated, it is {100 * tested['ece_calibrated']:.2f} points: predictions divide the logits by "
        f"{tested['temperature']:.3g}, fitted on the validation images, by a training without them."
    )
