"""What a study maximizes, as one number per image whose mean is the objective.

A mean over images has an interval, and two of them a comparison, whatever the objective. Where it is no mean over
images itself (all but accuracy), the numbers are its influence function (Hampel, 1974) around its value. Where it is a
mean over classes, the influence is around that mean and not around the class's own value: a class of a few images that
are all right would have no variance (benchmarks/coverage.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

COLDEST, HOTTEST = 0.2, 5.0  # temperatures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from harness.config.events import Objective


def contributions(
    objective: Objective, labels: NDArray[Any], predicted: NDArray[Any], losses: NDArray[Any]
) -> NDArray[numpy.float64]:
    """Return contributions [N] of images with these labels, predicted classes and losses (cross-entropy), each [N].

    The mean of them is the accuracy; the accuracy per class, averaged over the classes in `labels` (balanced accuracy);
    F1 per class, averaged over these (macro F1); or exp(-mean loss), the geometric mean of the probabilities of the
    right classes.
    """
    hits = (labels == predicted).astype(numpy.float64)
    if objective == "accuracy":
        return hits
    if objective == "loss":
        likelihood = numpy.exp(-losses.mean())
        return numpy.asarray(likelihood * (1 + losses.mean() - losses), dtype=numpy.float64)
    classes = numpy.unique(labels)
    scale = len(labels) / len(classes)
    if objective == "balanced_accuracy":
        images = _counts(labels, labels)  # of each image's class
        mean = _mean_of_classes(_counts(labels[hits == 1], labels) / images, labels)
        return mean + (hits - mean) / images * scale
    both = _counts(labels, labels) + _counts(predicted, labels)  # of each image's class, in labels and predictions
    mean = _mean_of_classes(2 * _counts(labels[hits == 1], labels) / both, labels)
    of_predicted = numpy.zeros(len(labels))
    known = numpy.isin(predicted, classes)
    of_predicted[known] = 1 / (_counts(labels, predicted[known]) + _counts(predicted, predicted[known]))
    return mean + ((2 * hits - mean) / both - mean * of_predicted) * scale


def _mean_of_classes(values: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the mean over the classes of a value [N] that is equal for all images of a class."""
    return float(numpy.mean(values[numpy.unique(labels, return_index=True)[1]]))


def _counts(of: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
    """Return how often each of `wanted` is in `of`."""
    return numpy.bincount(of, minlength=int(wanted.max(initial=0)) + 1)[wanted]


def class_weights(labels: NDArray[Any], classes: int, power: float) -> NDArray[numpy.float64]:
    """Return a weight per class [classes], images of it ** -power, with mean 1 over all images; 0 without any."""
    counts = numpy.bincount(labels, minlength=classes)
    weights = numpy.where(counts > 0, numpy.maximum(counts, 1.0) ** -power, 0.0)
    return weights * len(labels) / (weights @ counts)


def temperature(logits: NDArray[Any], labels: NDArray[Any]) -> float | None:
    """Return the temperature by which to divide logits [N, classes], so that their cross-entropy is lowest.

    Temperature scaling (Guo et al., 2017), within COLDEST and HOTTEST, as a few images that are all right would ask for
    none. None if a logit is not finite.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    if not numpy.isfinite(logits).all():
        return None
    z = logits.astype(numpy.float64)
    right = z[numpy.arange(len(z)), labels]

    def slope(inverse: float) -> float:
        """The derivative of the cross-entropy by 1 / temperature, in which it is convex."""
        return float(((softmax(inverse * z, axis=1) * z).sum(axis=1) - right).mean())

    if slope(1 / HOTTEST) >= 0:
        return HOTTEST
    if slope(1 / COLDEST) <= 0:
        return COLDEST
    return 1 / float(brentq(slope, 1 / HOTTEST, 1 / COLDEST))
