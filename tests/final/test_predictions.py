"""What the stored predictions say: counted by hand, and laws that hold for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.base.packing import pack
from harness.final.predictions import (
    calibration_sentence,
    confusions,
    described,
    from_record,
    mistakes,
    per_class,
    pictured,
)

NAMES = ["rose", "tulip", "daisy"]


def record_of(labels: Any, predicted: Any, confidence: Any, classes: list[str]) -> dict[str, Any]:
    """The storage's attribute, of labels [N] and of predictions and confidences [S, N]."""
    seeds = [
        {
            "seed": number,
            "predicted": pack(np.array(row, dtype="uint16")),
            "confidence": pack(np.array(sure, dtype="float32")),
        }
        for number, (row, sure) in enumerate(zip(predicted, confidence, strict=True))
    ]
    return {"classes": classes, "labels": pack(np.array(labels, dtype="uint16")), "seeds": seeds, "base": None}


#                   rose rose tulip tulip daisy
LABELS = [0, 0, 1, 1, 2]
SEEDS = [[0, 1, 1, 2, 1], [0, 1, 1, 1, 2]]
SURE = [[0.9, 0.8, 0.7, 0.6, 0.95], [0.9, 0.99, 0.9, 0.9, 0.9]]
RECORD = record_of(LABELS, SEEDS, SURE, NAMES)


def test_each_class_is_counted_over_all_seeds_the_worst_first() -> None:
    rows = per_class(from_record(RECORD))
    assert [(row["class"], row["correct"], row["total"]) for row in rows] == [
        ("daisy", 1, 2),
        ("rose", 2, 4),
        ("tulip", 3, 4),
    ]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)


def test_the_worst_confusion_comes_first_with_its_surest_images() -> None:
    worst = confusions(from_record(RECORD))[0]
    assert worst == {"class": "rose", "predicted": "tulip", "count": 2, "of": 4, "image": 1, "like": 2}
    assert sum(each["count"] for each in confusions(from_record(RECORD))) == 4


def test_a_class_that_was_never_recognised_has_no_picture_of_its_own() -> None:
    found = confusions(from_record(record_of([0, 1], [[1, 0]], [[0.9, 0.8]], NAMES[:2])))
    assert {each["like"] for each in found} == {None}


def test_the_mistakes_are_those_of_the_saved_model_the_surest_first() -> None:
    found = mistakes(from_record(RECORD))
    assert [(each["image"], each["class"], each["predicted"]) for each in found] == [
        (4, "daisy", "tulip"),
        (1, "rose", "tulip"),
        (3, "tulip", "daisy"),
    ]
    assert found[0]["confidence"] == pytest.approx(0.95)
    assert pictured(RECORD) == [1, 2, 3, 4]


def test_nothing_is_confused_when_all_is_right() -> None:
    found = described(record_of([0, 1], [[0, 1]], [[1.0, 1.0]], NAMES[:2]))
    assert (found["confusions"], found["mistakes"], found["ece"]) == ([], [], 0.0)


def test_the_calibration_of_the_saved_model_and_of_all_seeds_are_told_apart() -> None:
    # Seed 0 is 0.9 sure and right once in two, seed 1 is 0.9 sure and always right: 0.4 alone, 0.15 together.
    found = described(record_of([0, 1], [[0, 0], [0, 1]], [[0.9, 0.9], [0.9, 0.9]], NAMES[:2]))
    assert (found["ece_saved"], found["ece"]) == (pytest.approx(0.4), pytest.approx(0.15))
    said = "40.00 points for the saved model, seed 0, 15.00 points over all 2 seeds."
    assert calibration_sentence(found).endswith(said)
    alone = described(record_of([0, 1], [[0, 0]], [[0.9, 0.9]], NAMES[:2]))
    assert calibration_sentence(alone).endswith("40.00 points for the saved model, seed 0.")


def test_the_calibrated_error_stands_beside_the_raw_one() -> None:
    record = record_of([0, 1], [[0, 0]], [[0.9, 0.9]], NAMES[:2])
    record["seeds"][0] |= {"calibrated": pack(np.array([0.5, 0.5], dtype="float32")), "temperature": 2.0}
    found = described(record)
    assert (found["ece_saved"], found["ece_calibrated"]) == (pytest.approx(0.4), pytest.approx(0.0))
    assert calibration_sentence(found).endswith(
        "Calibrated, it is 0.00 points: predictions divide the logits by 2, fitted on the validation images, by a "
        "training without them."
    )


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    images, seeds, classes = draw(st.integers(1, 30)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    label = st.integers(0, classes - 1)
    row = st.lists(label, min_size=images, max_size=images)
    sure = st.lists(st.floats(0.0, 1.0, width=32), min_size=images, max_size=images)
    rows = draw(st.lists(st.tuples(row, sure), min_size=seeds, max_size=seeds))
    names = [f"class {number}" for number in range(classes)]
    return record_of(draw(row), [each for each, _ in rows], [each for _, each in rows], names)


@pytest.mark.slow
@given(record=records())
def test_every_prediction_is_counted_once(record: dict[str, Any]) -> None:
    found, said = from_record(record), described(record)
    seeds, images = found.predicted.shape
    assert sum(row["total"] for row in said["per_class"]) == seeds * images
    assert sum(row["correct"] for row in said["per_class"]) == (found.predicted == found.labels).sum()
    assert sum(each["count"] for each in said["calibration"]) == seeds * images
    assert 0 <= said["ece"] <= 1 + 1e-6
    counts = [each["count"] for each in said["confusions"]]
    assert counts == sorted(counts, reverse=True)
    assert all(0 <= image < images for image in pictured(record))
    assert len(pictured(record)) <= 60
