"""Exact tests against enumeration of all candidates and samples of a few images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import hypergeom

from vitpareto.search.stats.hypergeometric import (
    PairedCounts,
    hypergeometric,
    lower_bound,
    upper_bound,
)

ROUNDING = 1e-9


@pytest.mark.parametrize("images", [1, 7, 30])
def test_hypergeometric_equals_scipy(images: int) -> None:
    for marked, drawn in itertools.product(range(images + 1), range(images + 1)):
        count = np.arange(-1, images + 2)
        computed = hypergeometric(count, images, np.array([marked]), drawn)
        assert computed == pytest.approx(hypergeom.pmf(count, images, marked, drawn), abs=1e-12)


@pytest.mark.parametrize("error", [0.2, 0.01])
def test_bounds_are_the_extreme_numbers_that_are_not_rejected(error: float) -> None:
    images = 24
    for drawn in range(1, images + 1):
        for seen in range(drawn + 1):
            possible = range(seen, images - (drawn - seen) + 1)
            likely = [k for k in possible if hypergeom.cdf(seen, images, k, drawn) > error]
            assert upper_bound(seen, drawn, images, error) == max(likely, default=seen)
            least = [k for k in possible if hypergeom.sf(seen - 1, images, k, drawn) > error]
            assert lower_bound(seen, drawn, images, error) == min(
                least, default=images - (drawn - seen)
            )


def probability_of_wrong_rejection(
    right: int, wrong: int, wanted: int, drawn: int, error: float
) -> float:
    """Return the largest probability of rejecting a true hypothesis after `drawn` images.

    The maximum is over all candidates that are right on at least `wanted` images, and over the
    number of drawn images that the reference has right.
    """
    worst = 0.0
    for right_seen in range(max(0, drawn - wrong), min(drawn, right) + 1):
        wrong_seen = drawn - right_seen
        rejected = np.zeros((right_seen + 1, wrong_seen + 1), dtype=bool)
        for lost, gained in np.ndindex(rejected.shape):
            counts = PairedCounts(right, wrong, right_seen, wrong_seen, lost, gained)
            rejected[lost, gained] = counts.rejects(wanted, error)
        for losses, gains in itertools.product(range(right + 1), range(wrong + 1)):
            if right - losses + gains < wanted:
                continue  # the hypothesis is false
            lost = hypergeometric(np.arange(right_seen + 1), right, np.array([losses]), right_seen)
            gained = hypergeometric(np.arange(wrong_seen + 1), wrong, np.array([gains]), wrong_seen)
            worst = max(worst, float(lost @ rejected @ gained))
    return worst


@pytest.mark.parametrize(("right", "wrong"), [(10, 6), (14, 2), (16, 0), (5, 11)])
@pytest.mark.parametrize("error", [0.2, 0.05])
def test_true_hypothesis_is_rejected_with_at_most_the_error(
    right: int, wrong: int, error: float
) -> None:
    """Enumerates all candidates and samples of 16 images."""
    rejections = 0
    for wanted, drawn in itertools.product((right - 2, right, right + 1), (4, 9, 13)):
        found = probability_of_wrong_rejection(right, wrong, wanted, drawn, error)
        assert found <= error + ROUNDING, (wanted, drawn)
        rejections += found > 0
    # with 16 images that the reference has right, no possible loss is large enough to reject
    assert rejections >= 3 or wrong == 0, "the test must reject something, or the check is empty"


def test_decision_is_exact_once_all_images_are_seen() -> None:
    for losses, gains in itertools.product(range(9), range(5)):
        counts = PairedCounts(8, 4, 8, 4, losses, gains)
        assert counts.rejects(8 - losses + gains + 1, 1e-12)
        assert not counts.rejects(8 - losses + gains, 0.4)


def test_counts_are_of_the_images_seen() -> None:
    reference = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    assert PairedCounts.of(np.array([1, 0, 1, 0], dtype=bool), reference) == PairedCounts(
        3, 3, 2, 2, 1, 1
    )
