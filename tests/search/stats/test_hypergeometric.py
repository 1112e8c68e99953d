"""Exact tails against enumeration: what they promise holds for every set of images there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import hypergeom

from vitpareto.search.stats.hypergeometric import Seen, hypergeometric, least_of, most_of

ROUNDING = 1e-9


@pytest.mark.parametrize("images", [1, 7, 30])
def test_hypergeometric_is_scipys(images: int) -> None:
    for marked, drawn in itertools.product(range(images + 1), range(images + 1)):
        count = np.arange(-1, images + 2)
        own = hypergeometric(count, images, np.array([marked]), drawn)
        assert own == pytest.approx(hypergeom.pmf(count, images, marked, drawn), abs=1e-12)


@pytest.mark.parametrize("error", [0.2, 0.01])
def test_bounds_are_the_largest_and_smallest_that_are_not_refuted(error: float) -> None:
    images = 24
    for drawn in range(1, images + 1):
        for seen in range(drawn + 1):
            possible = range(seen, images - (drawn - seen) + 1)
            likely = [k for k in possible if hypergeom.cdf(seen, images, k, drawn) > error]
            assert most_of(seen, drawn, images, error) == max(likely, default=seen)
            least = [k for k in possible if hypergeom.sf(seen - 1, images, k, drawn) > error]
            assert least_of(seen, drawn, images, error) == min(
                least, default=images - (drawn - seen)
            )


def wrongly_refuted(right: int, wrong: int, wanted: int, drawn: int, error: float) -> float:
    """The largest chance, over all candidates that are right on `wanted` images or more and over
    how many images of either kind are drawn, that this is refuted after `drawn` images.
    """
    worst = 0.0
    for had in range(max(0, drawn - wrong), min(drawn, right) + 1):
        had_not = drawn - had
        refuted = np.zeros((had + 1, had_not + 1), dtype=bool)
        for lost, gained in np.ndindex(refuted.shape):
            seen = Seen(right, wrong, had, had_not, lost, gained)
            refuted[lost, gained] = seen.refutes(wanted, error)
        for losses, gains in itertools.product(range(right + 1), range(wrong + 1)):
            if right - losses + gains < wanted:
                continue  # not what is claimed
            lost = hypergeometric(np.arange(had + 1), right, np.array([losses]), had)
            gained = hypergeometric(np.arange(had_not + 1), wrong, np.array([gains]), had_not)
            worst = max(worst, float(lost @ refuted @ gained))
    return worst


@pytest.mark.parametrize(("right", "wrong"), [(10, 6), (14, 2), (16, 0), (5, 11)])
@pytest.mark.parametrize("error", [0.2, 0.05])
def test_a_true_claim_is_refuted_no_more_often_than_promised(
    right: int, wrong: int, error: float
) -> None:
    """Of all candidates and samples of 16 images, by enumeration."""
    tried = 0
    for wanted, drawn in itertools.product((right - 2, right, right + 1), (4, 9, 13)):
        chance = wrongly_refuted(right, wrong, wanted, drawn, error)
        assert chance <= error + ROUNDING, (wanted, drawn)
        tried += chance > 0
    # of 16 images that all were right too few can be lost to refute anything
    assert tried >= 3 or wrong == 0, "a test that never refutes keeps every promise"


def test_nothing_is_left_open_once_every_image_was_seen() -> None:
    for losses, gains in itertools.product(range(9), range(5)):
        seen = Seen(8, 4, 8, 4, losses, gains)
        assert seen.refutes(8 - losses + gains + 1, 1e-12)
        assert not seen.refutes(8 - losses + gains, 0.4)


def test_counts_are_those_of_the_prefix() -> None:
    reference = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    assert Seen.of(np.array([1, 0, 1, 0], dtype=bool), reference) == Seen(3, 3, 2, 2, 1, 1)
