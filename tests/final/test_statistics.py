"""Numbers about numbers, held against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from benchmarks.false_claims import OWN, hits, latent, mcnemar, ours
from harness.final import statistics
from harness.final.statistics import (
    balanced_accuracy,
    bootstrap_interval,
    calibration_error,
    compare,
    reliability,
    selection_excess,
    wilson,
)


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe (1998), table I: 81 of 263.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_a_mean_over_seeds_is_not_rounded_to_a_count() -> None:
    low, high = wilson(40.5, 96)
    assert wilson(40, 96) < (low, high) < wilson(41, 96)
    assert (low + high) / 2 == pytest.approx((wilson(40, 96)[0] + wilson(41, 96)[1]) / 2, abs=1e-3)


@given(st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilsons_interval_holds_the_share(counted: tuple[int, int]) -> None:
    correct, total = counted
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1


def test_balanced_accuracy_counts_each_class_once() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    assert balanced_accuracy(labels, np.zeros(100, dtype=int)) == 0.5
    assert balanced_accuracy(labels, labels) == 1.0


def test_two_configurations_are_compared_over_seeds_and_images() -> None:
    # Accuracies of 0.8, 0.7, 0.9 and 0.5, 0.6, 0.4 on ten images each, worked out by hand.
    first = np.array([[True] * right + [False] * (10 - right) for right in (8, 7, 9)])
    second = np.array([[True] * right + [False] * (10 - right) for right in (5, 6, 4)])
    found = compare(first, second)
    assert (found.seeds, found.images) == (3, 10)
    assert found.difference == pytest.approx(0.3)
    by_image = np.array([0, 0, 0, 0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0])
    parts = [0.01 / 3, 0.01 / 3, by_image.var(ddof=1) / 10]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2 + parts[2] ** 2 / 9)
    assert found.p == pytest.approx(2 * t.sf(0.3 / sum(parts) ** 0.5, freedom))
    assert found.low is not None
    assert found.high is not None
    assert (found.low + found.high) / 2 == pytest.approx(0.3)
    assert found.high - found.low == pytest.approx(2 * t.ppf(0.975, freedom) * sum(parts) ** 0.5)
    other = compare(second, first)
    assert (other.difference, other.p) == (pytest.approx(-0.3), pytest.approx(found.p))


def test_the_numbers_of_seeds_may_differ() -> None:
    first = np.array([[True] * right + [False] * (10 - right) for right in (8, 7, 9)])
    second = np.array([[True] * right + [False] * (10 - right) for right in (5, 7)])
    found = compare(first, second)
    by_image = first.mean(axis=0) - second.mean(axis=0)
    parts = [0.01 / 3, 0.02 / 2, by_image.var(ddof=1) / 10]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1 + parts[2] ** 2 / 9)
    assert found.difference == pytest.approx(0.2)
    assert found.p == pytest.approx(2 * t.sf(0.2 / sum(parts) ** 0.5, freedom))
    assert compare(first, second[:1]).p is None


def test_of_one_seed_nothing_is_claimed_and_equal_hits_do_not_differ() -> None:
    hits = np.array([[True, False, True], [True, True, False]])
    assert compare(hits[:1], hits[1:]).p is None
    assert compare(hits[:1], hits[1:]).low is None
    same = compare(np.tile(hits[:1], (2, 1)), np.tile(hits[:1], (2, 1)))
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_where_all_images_and_seeds_differ_alike_nothing_is_claimed() -> None:
    right = np.ones((2, 5), dtype=bool)
    found = compare(right, ~right)
    assert (found.difference, found.low, found.high, found.p) == (1.0, None, None, None)


def test_resamples_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = np.random.default_rng(0).random((3, 400)) < 0.7
    whole = selection_excess(hits), bootstrap_interval(hits[0].astype(float))
    monkeypatch.setattr(statistics, "BLOCK", 4000)  # ten resamples of these images
    assert whole == (selection_excess(hits), pytest.approx(bootstrap_interval(hits[0].astype(float)), abs=1e-12))


@pytest.mark.parametrize("own", [0.0, OWN])
@pytest.mark.parametrize("spread", [0.0, 0.25, 0.5])
def test_equal_configurations_are_seldom_called_different_whatever_their_seeds_do(spread: float, own: float) -> None:
    """In 6 % of the studies at most, and half a percent for the 600 that are simulated here."""
    draw = np.random.default_rng(7)
    studies = ((latent(draw, 3, 1020, own), draw.standard_normal((2, 3))) for _ in range(600))
    claims = [ours(*hits(*each, spread, 0.0), draw) for each in studies]
    assert np.mean(claims) <= 0.06 + 0.005


def test_one_seed_of_each_calls_them_different_as_soon_as_seeds_spread() -> None:
    draw = np.random.default_rng(8)
    studies = ((latent(draw, 1, 6149, 0.0), draw.standard_normal((2, 1))) for _ in range(200))
    claims = [mcnemar(*hits(*each, 0.25, 0.0), draw) for each in studies]
    assert np.mean(claims) > 0.15


def test_the_best_of_equals_looks_better_than_it_is() -> None:
    """Fifty equal candidates with independent mistakes: the excess is known by drawing new images for the winner."""
    draw = np.random.default_rng(0)
    found, real = [], []
    for _ in range(20):
        hits = draw.random((50, 1020)) < 0.97
        selection = selection_excess(hits, resamples=500)
        assert selection is not None
        found.append(selection)
        real.append(hits.mean(axis=1).max() - 0.97)
    assert np.mean([each.excess_if_equal for each in found]) == pytest.approx(np.mean(real), rel=0.1)
    # What lies apart by chance is taken for real: the bootstrap finds about 1 / sqrt(2) of it.
    assert 0.6 < np.mean([each.excess for each in found]) / np.mean(real) < 0.85
    assert np.mean([each.p_equal < 0.05 for each in found]) <= 0.15


def test_a_winner_far_ahead_owes_nothing_to_the_choice() -> None:
    draw = np.random.default_rng(1)
    hits = draw.random((50, 1000)) < np.array([0.95] + [0.5] * 49)[:, None]
    selection = selection_excess(hits)
    assert selection is not None
    assert selection.excess == pytest.approx(0, abs=0.002)
    assert selection.excess_if_equal > 0.02
    assert selection.p_equal < 0.01


def test_the_same_predictions_have_no_excess() -> None:
    hits = np.tile(np.random.default_rng(2).random(500) < 0.9, (8, 1))
    selection = selection_excess(hits)
    assert selection is not None
    assert (selection.candidates, selection.images) == (8, 500)
    assert selection.p_equal == 1.0
    assert abs(selection.excess) < 0.002
    assert selection_excess(hits[:1]) is None


def test_what_chance_draws_is_drawn_the_same_again() -> None:
    hits = np.random.default_rng(3).random((5, 100)) < 0.8
    assert selection_excess(hits) == selection_excess(hits)


def test_a_model_that_knows_how_sure_it_may_be_has_no_calibration_error() -> None:
    draw = np.random.default_rng(4)
    confidence = draw.uniform(0.05, 1, 200_000)
    hits = draw.random(200_000) < confidence
    bins = reliability(confidence, hits)
    assert sum(each.count for each in bins) == 200_000
    assert calibration_error(bins) < 0.005
    too_sure = reliability(np.full(1000, 0.95), draw.random(1000) < 0.6)
    assert [(each.low, each.high) for each in too_sure] == [(0.9, 1.0)]
    assert calibration_error(too_sure) == pytest.approx(0.35, abs=0.05)


def test_certainty_and_a_bins_edge_lie_in_the_bin_below() -> None:
    bins = reliability(np.array([1.0, 0.1, 0.100001]), np.array([True, False, True]))
    assert [(each.low, each.count) for each in bins] == [(0.0, 1), (0.1, 1), (0.9, 1)]
