"""Labels under suspicion: validation images that most of the better half of the trials miss.

The trials' own predictions count. No trial trains on validation images, even if the final run does (`final.fit_on`): a
model that was trained on a wrong label repeats it.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from harness.base.packing import unpack, unpack_bits
from harness.data.splits import item_name, items_of, load_split
from harness.final.predictions import thumbnails

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from harness.config.events import Metrics
    from harness.config.study import Study
    from harness.store.records import TrialRecord
    from harness.store.store import Store

FEWEST = 4  # better trials; fewer say little
PICTURED = 24
MOST = 1000  # images in the record


def record_suspects(study: Study, store: Store) -> None:
    """Record the suspects among the current trials, once."""
    known, finished = store.facts().suspects, store.finished()
    if known is None or known["finished"] != finished:
        found = suspects(study, store.trials())
        store.set_as_leader({"suspects": None if found is None else {"finished": finished, **found}})


def suspects(study: Study, trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """Return the suspects as a record for the storage; None if there are none, or fewer than FEWEST better trials.

    `trials` is the number of better trials, `images` that of validation images, `found` that of suspects. `rows` are
    the MOST suspects missed by most trials, equals by path; `taken_for` is the class that most of these trials predict,
    None for trials that did not store it. `thumbnails` are base64 JPEGs of the first PICTURED of them.
    """
    better = better_half(trials)
    if len(better) < FEWEST:
        return None
    listed: Any = functools.cache(lambda data: items_of(data, "val"))
    items = listed(study.train.data)
    # A space may change the data set itself.
    vals = [val for trial, val in better if listed(study.config(trial.params).data) == items]
    if len(vals) < FEWEST:
        return None
    missed = (~numpy.stack([unpack_bits(val.hits or "", val.total) for val in vals])).sum(axis=0)
    names = [item_name(study.train.data, item) for item in items]
    chosen = [int(image) for image in numpy.flatnonzero(missed * 2 > len(vals))]
    if not chosen:
        return None
    order = sorted(chosen, key=lambda image: (-missed[image], names[image]))[:MOST]
    images = load_split(study.train.data, study.train.backbone.preprocessing(), "val")
    classes, guesses = study.train.data.classes(), [_predicted(val) for val in vals if val.missed is not None]
    pictures = thumbnails(images.images, order[:PICTURED])
    return {
        "trials": len(vals),
        "images": len(items),
        "found": len(chosen),
        "rows": [
            {
                "path": names[image],
                "label": classes[int(images.labels[image])],
                "taken_for": _most([guess[image] for guess in guesses if image in guess], classes),
                "missed_by": int(missed[image]),
            }
            for image in order
        ],
        "thumbnails": [pictures[str(image)] for image in order[:PICTURED]],
    }


def better_half(trials: Sequence[TrialRecord]) -> list[tuple[TrialRecord, Metrics]]:
    """Return the complete trials above the median of all, by the last value of each, with their last validation."""
    lasts = [[*trial.curve.values()][-1] for trial in trials if trial.state in ("complete", "pruned") and trial.curve]
    median = statistics.median(lasts) if lasts else 0.0
    complete = [trial for trial in trials if trial.value is not None and trial.value > median and trial.epochs]
    vals = [(trial, trial.epochs[-1].val) for trial in complete]
    return [(trial, val) for trial, val in vals if val is not None and val.hits is not None]


def _predicted(val: Metrics) -> dict[int, int]:
    """Return the predicted class of each missed image by its number."""
    places: NDArray[Any] = numpy.flatnonzero(~unpack_bits(val.hits or "", val.total))
    return dict(zip(places.tolist(), unpack(val.missed or "", "uint16").tolist(), strict=True))


def _most(guesses: Sequence[int], classes: Sequence[str]) -> str | None:
    """Return the most frequent class, the first of equals; None without guesses."""
    counts = Counter(guesses)
    return classes[min(counts, key=lambda label: (-counts[label], label))] if counts else None
