"""Confidence intervals and exact tests for counts, and the division of an error among them.

The images are independent draws from a population, and the intervals are for the accuracy on the
population, not on these images; `search.stats.confidence_sequences` is for a finite set. Accuracies
are in percent, differences in points. May not know trials, splits or files.

The exact intervals miss with probability `error` at most, for every number of images and every
accuracy, without a normal approximation. Simultaneous intervals share the error by Bonferroni's
inequality, which does not assume that the accuracies are independent. Sidak's product does, and
gains little: for 20 intervals the error of each is 0.00256 instead of 0.0025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, ndtr
from scipy.stats import binom, binomtest

from vitpareto.search.errors import BadInput, Code

Floats = NDArray[np.float64]

#: The normal quantile of a two-sided 95 % interval. Rounded: results on disk were made with it.
Z95 = 1.959964
#: The confidence level of exactly this quantile, so that intervals on disk are reproduced.
LEVEL = float(2 * ndtr(Z95) - 1)
#: Part of a paired interval's error that bounds the rate of disagreements.
NUISANCE = 0.1
#: Probability that a sum over a binomial distribution leaves out; it is added to the sum.
LEFT_OUT = 1e-9
#: Precision of an interval's end, as a fraction; ends are rounded outwards.
PRECISION = 1e-6
#: Part of the error that the first round of intervals gets; each later round gets half of the rest.
FIRST_ROUND = 0.9


@lru_cache(maxsize=4096)
def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval for an accuracy, in percent.

    Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 22, 1927).
    """
    _check(correct, images)
    interval = binomtest(correct, images).proportion_ci(LEVEL, method="wilson")
    accuracy = correct / images
    # at 0 and 1, where an end is the accuracy itself, rounding must not exclude it
    return 100 * min(accuracy, float(interval.low)), 100 * max(accuracy, float(interval.high))


@lru_cache(maxsize=4096)
def clopper_pearson(correct: int, images: int, error: float) -> tuple[float, float]:
    """Return the exact interval for an accuracy, in percent, with half of `error` on either side.

    Clopper and Pearson, "The use of confidence or fiducial limits" (Biometrika 26, 1934).
    """
    _check(correct, images, error)
    interval = binomtest(correct, images).proportion_ci(1 - error, method="exact")
    return 100 * float(interval.low), 100 * float(interval.high)


@lru_cache(maxsize=4096)
def paired_difference(gained: int, lost: int, images: int, error: float) -> tuple[float, float]:
    """Return the exact interval for the difference of two accuracies on the same images, in points.

    Let p and q be the probabilities of a gain and of a loss on an image, and n the number of
    images. S = gained - lost has mean n(p - q). The rate of disagreements p + q is a nuisance
    parameter, with the upper bound u, which takes NUISANCE of the error (Berger and Boos, JASA 89,
    1994). For a given difference p - q the probability of S <= t is largest at p + q = u, because:

    - For p + q <= 1/2, n + S is a sum of 2n independent Bernoulli variables, so its mode is less
      than 1 from its mean (Darroch, Ann. Math. Stat. 35, 1964).
    - P(S <= t) increases with p + q if P(S = t + 1) >= P(S = t) for n - 1 images, that is for t
      below the mode (by the derivative of a binomial distribution function).

    If u exceeds 1/2, p and q are bounded separately.

    Args:
        gained: images that the first model alone has right.
        lost: images that the second model alone has right.
        images: number of images.
        error: probability of a miss.
    """
    if min(gained, lost) < 0:
        raise BadInput(
            f"gained and lost must be at least 0 (got {gained} and {lost})",
            Code.OUT_OF_RANGE, gained=gained, lost=lost,
        )  # fmt: skip
    _check(gained + lost, images, error)
    most = _upper_bound(gained + lost, images, NUISANCE * error)
    if most > 0.5:
        ends = [clopper_pearson(count, images, error / 2) for count in (gained, lost)]
        return ends[0][0] - ends[1][1], ends[0][1] - ends[1][0]
    side_error = (1 - NUISANCE) * error / 2
    disagreements = _distribution(images, most)
    high = _largest_difference(gained - lost, images, most, side_error, disagreements)
    low = -_largest_difference(lost - gained, images, most, side_error, disagreements)
    return 100 * low, 100 * high


def _distribution(images: int, rate: float) -> tuple[Floats, Floats]:
    """Return the likely counts of a binomial distribution, and their probabilities."""
    ends = binom.ppf(LEFT_OUT / 2, images, rate), binom.isf(LEFT_OUT / 2, images, rate)
    counts = np.arange(int(ends[0]), int(ends[1]) + 1, dtype=np.float64)
    return counts, binom.pmf(counts, images, rate)


def _probability_at_most(t: int, up: float, disagreements: tuple[Floats, Floats]) -> float:
    """Return P(S <= t), where each disagreement adds 1 with probability `up` and else -1."""
    counts, probabilities = disagreements
    ups = np.floor((counts + t) / 2)
    inside = (ups >= 0) & (ups < counts)
    at, of = np.where(inside, ups, 0), np.where(inside, counts, 1)
    below = np.where(inside, betainc(of - at, at + 1, 1 - up), ups >= counts)
    return min(1.0, float(probabilities @ below) + LEFT_OUT)


def _largest_difference(
    t: int, images: int, most: float, side_error: float, disagreements: tuple[Floats, Floats]
) -> float:
    """Return the largest difference, as a fraction, for which P(S <= t) exceeds `side_error`."""
    # for smaller differences `most` may not be the worst case of the nuisance parameter
    low = max(-most, (t + 2) / max(1, images - 1))

    def beyond(difference: float) -> float:
        up = (1 + difference / most) / 2
        return math.log(_probability_at_most(t, up, disagreements) / side_error)

    if low >= most:
        return most
    if beyond(low) <= 0:
        return low
    found: float = brentq(beyond, low, most, xtol=PRECISION)
    return min(most, found + PRECISION)


def mcnemar(against: int, disagreements: int) -> float:
    """Return the probability of at least `against` of the disagreements if both are as likely.

    One-sided exact test (McNemar, Psychometrika 12, 1947), conditional on their number.
    """
    return float(binom.sf(against - 1, disagreements, 0.5))


def holm(p_values: Sequence[float], error: float) -> NDArray[np.bool_]:
    """Return which hypotheses are rejected, with probability `error` at most of a false rejection.

    Holds for any dependence between the tests (Holm, Scand. J. Stat. 6, 1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    small = p[order] <= error / (len(p) - np.arange(len(p)))
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order] = np.logical_and.accumulate(small)
    return rejected


def errors_by_round(sizes: Sequence[int], error: float) -> list[float]:
    """Return the error of each interval of a round, for every round.

    The sum over all intervals is at most `error`. The error of a round does not depend on later
    rounds, because whether they take place may depend on its result.

    Args:
        sizes: number of intervals of each round.
        error: probability that any interval misses.
    """
    rest = (1 - FIRST_ROUND) * error
    parts = (FIRST_ROUND * error if i == 0 else rest * 0.5**i for i in range(len(sizes)))
    return [part / max(1, size) for part, size in zip(parts, sizes, strict=True)]


def _upper_bound(count: int, images: int, error: float) -> float:
    """Return the exact one-sided upper bound on a rate."""
    test = binomtest(count, images, alternative="less")
    return float(test.proportion_ci(1 - error, method="exact").high)


def _check(count: int, images: int, error: float | None = None) -> None:
    if images < 1 or not 0 <= count <= images:
        raise BadInput(
            f"a count must be 0 to the number of images, which is at least 1 (got {count} of "
            f"{images})",
            Code.OUT_OF_RANGE, count=count, images=images,
        )  # fmt: skip
    if error is not None and not 0 < error < 1:
        raise BadInput(
            f"error must be between 0 and 1 (got {error})",
            Code.OUT_OF_RANGE, name="error", got=error,
        )  # fmt: skip
