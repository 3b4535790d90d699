"""Statistics of results: intervals, comparisons, selection bias, calibration.

The functions take counts and arrays, and are independent of studies and models. Scipy is imported when something is
computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy
from numpy.typing import NDArray

from harness.config.final_result import Comparison, Selection

CONFIDENCE = 0.95
ALPHA = 0.05  # a difference with a larger p-value is not significant
RESAMPLES = 2000
BLOCK = 2**25  # resamples times images that are in memory at a time
BINS = 10
EQUAL = 1e-9  # scores that differ by rounding alone


def wilson(correct: float, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927). `correct` may be a mean over seeds, not an integer."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    share = correct / total
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_interval(scores: NDArray[Any], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `scores` [images], within 0 to 1.

    Percentiles over bootstrap resamples of the images (Efron and Tibshirani, 1993, chapter 13). If all images score
    alike, `wilson`'s, as resamples do not differ then.
    """
    images = len(scores)
    if numpy.ptp(scores) < EQUAL:
        return wilson(float(scores.sum()), images)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = numpy.percentile(_resampled(scores, seed, RESAMPLES), (tail, 100 - tail)).clip(0, 1)
    return float(low), float(high)


def _resampled(scores: NDArray[Any], seed: int, resamples: int) -> NDArray[Any]:
    """Return the means of `scores` [images, ...] over resamples of the images, [resamples, ...]."""
    images, generator = len(scores), numpy.random.default_rng(seed)
    # How often each image is drawn, times its scores: one product instead of copies.
    blocks = -(-resamples * images // BLOCK)
    sizes = [len(each) for each in numpy.array_split(numpy.arange(resamples), blocks)]
    equal = numpy.full(images, 1 / images)
    return numpy.concatenate([generator.multinomial(images, equal, size=size) @ scores / images for size in sizes])


def balanced_accuracy(labels: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Return the mean accuracy per class, over the classes in `labels` [N]."""
    return float(numpy.mean([(predicted[labels == label] == label).mean() for label in numpy.unique(labels)]))


def compare(first: NDArray[Any], second: NDArray[Any]) -> Comparison:
    """Compare two configurations by their hits or contributions, [seeds, images] each, on the same images.

    The numbers of seeds may differ; `Comparison.seeds` is the smaller one. Seeds and images are samples. The variance
    of the difference of the mean hits has three parts: that of each configuration's seeds, and that of the images, each
    with the mean of its hits over the seeds (Owen, "The pigeonhole bootstrap", 2007). Student's t has the degrees of
    freedom of Welch (1947) and Satterthwaite (1946).
    The images are paired; the seeds are not, since that would leave half of the degrees of freedom and exceed
    the error rate (benchmarks/false_claims.py). If a seed affects both alike, this is conservative.
    """
    from scipy.special import stdtr, stdtrit  # Student's t: its distribution function, and the inverse

    seeds, images = min(len(first), len(second)), first.shape[1]
    by_image = first.mean(axis=0) - second.mean(axis=0)
    difference = float(by_image.mean())
    if seeds < 2 or images < 2:
        return Comparison(difference=difference, low=None, high=None, p=None, seeds=seeds, images=images)
    parts = [(float(hits.mean(axis=1).var(ddof=1)) / len(hits), len(hits) - 1) for hits in (first, second)]
    parts.append((float(by_image.var(ddof=1)) / images, images - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0 and difference:  # on every image alike: nothing says how much it varies
        return Comparison(difference=difference, low=None, high=None, p=None, seeds=seeds, images=images)
    half, p = 0.0, 1.0
    if variance:
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
        error = math.sqrt(variance)
        half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
        p = float(2 * stdtr(freedom, -abs(difference) / error))
    low, high = difference - half, difference + half
    return Comparison(difference=difference, low=low, high=high, p=p, seeds=seeds, images=images)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979): one below ALPHA is significant among all of them."""
    corrected, highest = [1.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min((len(p) - rank) * p[place], 1.0))
        corrected[place] = highest
    return corrected


def selection_excess(hits: NDArray[Any], resamples: int = RESAMPLES) -> Selection | None:
    """Bootstrap over images (Efron and Tibshirani, 1993, chapter 17: optimism) of hits [candidates, images].

    Each resample of the images chooses its own winner; the excess is how much better that winner scores there than on
    all images. Candidates are resampled together, which keeps their correlation. Contributions
    serve as hits. None with fewer than two.
    """
    candidates, images = hits.shape
    if candidates < 2 or images < 1:
        return None
    scores = hits.mean(axis=1)
    resampled = _resampled(hits.T.astype(numpy.float64), 0, resamples)
    winners = resampled.argmax(axis=1)
    noise = resampled - scores
    lead = scores.max() - scores.mean()
    leads = noise.max(axis=1) - noise.mean(axis=1)
    # The observed lead counts as one of the draws, so that p is never 0 (Davison and Hinkley, 1997, section 4.2).
    p_equal = (1 + int((leads >= lead - 1e-12).sum())) / (1 + resamples)
    return Selection(
        candidates=candidates,
        images=images,
        excess=float(noise[numpy.arange(resamples), winners].mean()),
        excess_if_equal=float(noise.max(axis=1).mean()),
        p_equal=float(p_equal),
    )


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The predictions whose confidence lies in (low, high]; the averages are shares."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: NDArray[Any], hits: NDArray[Any]) -> list[Bin]:
    """Return confidence of the predicted class [N] against accuracy, in bins of equal width, without empty ones.

    The reliability diagram of Guo et al., "On Calibration of Modern Neural Networks" (2017).
    """
    place = numpy.clip(numpy.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        Bin(
            low=number / BINS,
            high=(number + 1) / BINS,
            count=int((place == number).sum()),
            confidence=float(confidence[place == number].mean()),
            accuracy=float(hits[place == number].mean()),
        )
        for number in range(BINS)
        if (place == number).any()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error (Guo et al., 2017): the bins' gaps, weighted by their predictions."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.accuracy - each.confidence) for each in bins) / total
