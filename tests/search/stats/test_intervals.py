"""Exact intervals against exact enumeration, second implementations and what they promise."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control, multinomial, norm

from vitpareto.search.stats.intervals import (
    clopper_pearson,
    holm,
    mcnemar,
    paired_difference,
    shares,
)

#: scipy inverts the same distribution by another algorithm; its answers are good to 1e-9 and more
AGREE = 1e-7


@pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (3, 10), (391, 400), (1, 40_000)])
@pytest.mark.parametrize("error", [0.05, 0.0004])
def test_clopper_pearson_is_scipys(right: int, images: int, error: float) -> None:
    expected = binomtest(right, images).proportion_ci(1 - error, "exact")
    assert clopper_pearson(right, images, error) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=AGREE
    )


@pytest.mark.parametrize("images", [3, 8, 17, 45])
@pytest.mark.parametrize("error", [0.2, 0.05])
def test_the_paired_interval_covers_whatever_the_chances_are(images: int, error: float) -> None:
    """Exact enumeration: every outcome of the trinomial distribution, on a grid of its chances."""
    outcomes = [(g, x) for g, x in product(range(images + 1), repeat=2) if g + x <= images]
    ends = np.array([paired_difference(g, x, images, error) for g, x in outcomes])
    counts = np.array([(g, x, images - g - x) for g, x in outcomes])
    worst = 0.0
    for p, q in product(np.linspace(0, 1, 26), repeat=2):
        if p + q <= 1 + 1e-12:
            chances = multinomial.pmf(counts, images, [p, q, max(0.0, 1 - p - q)])
            truth = 100 * (p - q)
            missed = (ends[:, 0] > truth + 1e-9) | (ends[:, 1] < truth - 1e-9)
            worst = max(worst, float(chances[missed].sum()))
    assert 0 < worst <= error


@pytest.mark.parametrize(
    ("gained", "lost", "images", "wider"),
    [(300, 280, 10_000, 1.10), (200, 900, 10_000, 1.08), (2500, 4000, 39_000, 1.06)],
)
def test_the_paired_interval_is_little_wider_than_the_asymptotic_one(
    gained: int, lost: int, images: int, wider: float
) -> None:
    """The price of being exact, in parts of Wald's interval, which is right for so many images."""
    for error in (0.05, 0.0025):
        low, high = paired_difference(gained, lost, images, error)
        spread = math.sqrt(gained + lost - (gained - lost) ** 2 / images)
        wald = 200 * norm.isf(error / 2) * spread / images
        assert wald < high - low < wider * wald


@pytest.mark.parametrize(("gained", "lost", "images"), [(0, 0, 400), (3, 9, 400), (150, 60, 250)])
def test_the_paired_interval_mirrors_and_holds_its_estimate(
    gained: int, lost: int, images: int
) -> None:
    low, high = paired_difference(gained, lost, images, 0.05)
    assert paired_difference(lost, gained, images, 0.05) == (-high, -low)
    assert -100 <= low < 100 * (gained - lost) / images < high <= 100
    wider = paired_difference(gained, lost, images, 0.005)
    assert wider[0] < low and high < wider[1]


def test_mcnemar_is_the_binomial_test() -> None:
    for against, disagree in ((0, 0), (5, 5), (9, 12), (40, 75)):
        expected = 1.0
        if disagree:
            expected = binomtest(against, disagree, alternative="greater").pvalue
        assert mcnemar(against, disagree) == pytest.approx(expected, rel=1e-9)


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.012, 0.03, 0.9, 0.02], 0.05).tolist() == [True, False, False, False]
    assert holm([0.01, 0.012, 0.02, 0.04], 0.05).tolist() == [True] * 4
    assert holm([0.02, 0.001], 0.05).tolist() == [True, True], "Bonferroni would keep the first"
    assert holm([], 0.05).tolist() == []
    # never more than the false discovery rate under any dependence allows
    p = np.random.default_rng(0).uniform(size=200) ** 4
    assert not (holm(p, 0.05) & (false_discovery_control(p, method="by") > 0.05)).any()


def test_rounds_share_one_error_and_none_changes_an_earlier_one() -> None:
    sizes, each = [20], shares([20], 0.05)
    assert each == [pytest.approx(0.9 * 0.05 / 20)]
    for more in (3, 1, 8, 5, 2):
        sizes.append(more)
        before, each = each, shares(sizes, 0.05)
        assert each[:-1] == before
    assert sum(n * e for n, e in zip(sizes, each, strict=True)) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clopper_pearson(8, 7, 0.05), "8 of 7 images"),
        (lambda: clopper_pearson(0, 0, 0.05), "0 of 0 images"),
        (lambda: clopper_pearson(1, 7, 0.0), "the error is 0.0"),
        (lambda: paired_difference(-1, 2, 7, 0.05), "got -1 gained"),
        (lambda: paired_difference(4, 4, 7, 0.05), "8 of 7 images"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
