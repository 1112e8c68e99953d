"""Intervals and tests against exact enumeration and second implementations."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import beta, binomtest, false_discovery_control, multinomial, norm

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.stats.intervals import (
    clopper_pearson,
    errors_by_round,
    holm,
    mcnemar,
    paired_difference,
    wilson_interval,
)

#: Two inversions of one distribution; scipy's root finder stops at about 1e-12 of a fraction.
AGREE = 1e-7


def closed_form_wilson(correct: int, images: int, z: float) -> tuple[float, float]:
    """Wilson's interval in percent, as results on disk were made with it."""
    p, zz = correct / images, z * z
    centre = (p + zz / (2 * images)) / (1 + zz / images)
    half = z / (1 + zz / images) * math.sqrt(p * (1 - p) / images + zz / (4 * images * images))
    return 100 * max(0.0, min(p, centre - half)), 100 * min(1.0, max(p, centre + half))


@pytest.mark.parametrize(
    ("correct", "images"), [(0, 10), (10, 10), (7, 10), (39_900, 50_000), (1, 1), (0, 1)]
)
def test_wilson_interval_equals_the_closed_form(correct: int, images: int) -> None:
    low, high = wilson_interval(correct, images)
    assert (low, high) == pytest.approx(closed_form_wilson(correct, images, 1.959964), abs=1e-12)
    assert 0 <= low <= 100 * correct / images <= high <= 100


@pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (3, 10), (391, 400), (1, 40_000)])
@pytest.mark.parametrize("error", [0.05, 0.0004])
def test_clopper_pearson_equals_the_quantiles_of_the_beta_distribution(
    right: int, images: int, error: float
) -> None:
    low = 0.0 if right == 0 else beta.ppf(error / 2, right, images - right + 1)
    high = 1.0 if right == images else beta.isf(error / 2, right + 1, images - right)
    expected = (100 * low, 100 * high)
    assert clopper_pearson(right, images, error) == pytest.approx(expected, abs=AGREE)


@pytest.mark.parametrize("images", [3, 8, 17, 45])
@pytest.mark.parametrize("error", [0.2, 0.05])
def test_paired_interval_covers_for_all_probabilities(images: int, error: float) -> None:
    """Enumerates all outcomes of the trinomial distribution on a grid of its probabilities."""
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
def test_paired_interval_is_slightly_wider_than_the_asymptotic_one(
    gained: int, lost: int, images: int, wider: float
) -> None:
    """Relative to Wald's interval, which is accurate for so many images."""
    for error in (0.05, 0.0025):
        low, high = paired_difference(gained, lost, images, error)
        spread = math.sqrt(gained + lost - (gained - lost) ** 2 / images)
        wald = 200 * norm.isf(error / 2) * spread / images
        assert wald < high - low < wider * wald


@pytest.mark.parametrize(("gained", "lost", "images"), [(0, 0, 400), (3, 9, 400), (150, 60, 250)])
def test_paired_interval_is_symmetric_and_contains_its_estimate(
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


def test_rounds_share_one_error_and_a_later_one_changes_no_earlier_one() -> None:
    sizes, each = [20], errors_by_round([20], 0.05)
    assert each == [pytest.approx(0.9 * 0.05 / 20)]
    for more in (3, 1, 8, 5, 2):
        sizes.append(more)
        before, each = each, errors_by_round(sizes, 0.05)
        assert each[:-1] == before
    assert sum(n * e for n, e in zip(sizes, each, strict=True)) < 0.05


@pytest.mark.parametrize(
    ("call", "details"),
    [
        (lambda: wilson_interval(0, 0), {"count": 0, "images": 0}),
        (lambda: clopper_pearson(8, 7, 0.05), {"count": 8, "images": 7}),
        (lambda: clopper_pearson(0, 0, 0.05), {"count": 0, "images": 0}),
        (lambda: clopper_pearson(1, 7, 0.0), {"name": "error", "got": 0.0}),
        (lambda: clopper_pearson(1, 7, math.nan), {"name": "error"}),
        (lambda: paired_difference(-1, 2, 7, 0.05), {"gained": -1, "lost": 2}),
        (lambda: paired_difference(4, 4, 7, 0.05), {"count": 8, "images": 7}),
    ],
)
def test_impossible_counts_and_errors_are_refused(call, details: dict[str, object]) -> None:
    with refused(Code.OUT_OF_RANGE, **details):
        call()
